"""GPT-2, BERT and ModernBERT in every pass of the trunk: who influences whom by gradients, cached = uncached, and what
may not change the numbers. What the layers compute is compared with published outputs in
tests/checkpoints/published."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from trunk_passes import run_pass

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR, Masked
from bd3lm_jax.models import build, sharding_rules, trunk
from bd3lm_jax.models.bert import BertConfig
from bd3lm_jax.models.gpt2 import GPT2Config
from bd3lm_jax.models.modernbert import ModernBertConfig
from bd3lm_jax.models.trunk import Stream
from bd3lm_jax.parallel import sharding
from bd3lm_jax.planning import flops

VOCAB, LENGTH, BLOCK = 30, 12, 4
SIZES = dict(vocab_size=VOCAB, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=24, dropout=0.0,
             norm_eps=1e-5)
GPT2 = GPT2Config(**SIZES, positions=16)
BERT = BertConfig(**SIZES, positions=16, unused_positions=2, token_types=2)
MODERN = ModernBertConfig(**SIZES, window=2, local_layers=(1,), rope_theta=1e4, local_rope_theta=100.0)
LOCAL = dataclasses.replace(MODERN, num_layers=1, local_layers=(0,))
ALL = pytest.mark.parametrize("config", [GPT2, BERT, MODERN], ids=lambda config: config.kind)


@functools.cache
def network(config, dtype=jnp.float32):
    """A network with random parameters everywhere."""
    model = build(config, dtype)
    shapes = jax.eval_shape(functools.partial(trunk.init, model), jax.random.key(0))
    draw = np.random.default_rng(0)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + 0.25 * draw.normal(size=x.shape), jnp.float32), shapes)


def make_stream(ids, block_size):
    """A stream of rows with one document each; ids `[B, T]` or `[B, M, T]`, or with the vocabulary as last axis."""
    length = ids.shape[-1] if ids.dtype.kind == "i" else ids.shape[-2]
    position = np.broadcast_to(np.arange(length, dtype=np.int32), (ids.shape[0], length))
    return Stream(ids, position, position // block_size, np.ones_like(position))


@functools.partial(jax.jit, static_argnames=("model", "rule", "block_size", "backend", "remat", "layers"))
def run(model, params, noised, clean, *, rule="block_causal", block_size=BLOCK, backend="dense", remat="none",
        layers="scan", dropout_keys=None, cache=None, write_at=None):
    return run_pass(model, params, noised, clean, cache=cache, write_at=write_at, rule=rule, block_size=block_size,
                    execution=trunk.Execution(backend, layers, remat, False), dropout_keys=dropout_keys)


def influence(outputs_of, *inputs):
    """Which tokens of the inputs (weights of the vocabulary `[T, V]`) move which outputs: bool [outputs, tokens]."""
    weight = np.random.default_rng(1).normal(size=SIZES["hidden_size"]).astype(np.float32)
    gradients = jax.jit(jax.jacrev(lambda *xs: outputs_of(*xs) @ weight, argnums=range(len(inputs))))(*inputs)
    return np.concatenate([np.any(np.asarray(x) != 0, axis=-1).reshape(x.shape[0], -1) for x in gradients], axis=1)


def one_hot(*shape):
    return jax.nn.one_hot(np.random.default_rng(2).integers(0, VOCAB, size=shape), VOCAB)


def two_stream_influence(config, block_size, backend):
    model, params = network(config)

    def outputs(xt, x0):
        noised, clean = make_stream(xt[None, None], block_size), make_stream(x0[None], block_size)
        return run(model, params, noised, clean, block_size=block_size, backend=backend).noised[0, 0]

    return influence(outputs, one_hot(LENGTH), one_hot(LENGTH - block_size))


@pytest.mark.parametrize("config, backend", some([
    (GPT2, "dense"), (BERT, "dense"), (MODERN, "dense"), (MODERN, "blocked")], 0, 3),
                         ids=lambda x: getattr(x, "kind", x))
def test_two_streams_leak_nothing(config, backend):
    seen = two_stream_influence(config, BLOCK, backend)
    block = np.arange(LENGTH) // BLOCK
    own, earlier = block[:, None] == block[None], block[:, None] > block[None, :LENGTH - BLOCK]
    np.testing.assert_array_equal(seen, np.concatenate([own, earlier], axis=1))


@pytest.mark.parametrize("backend", some(["dense", "blocked"], 0))
def test_a_local_layer_sees_its_window_in_both_streams(backend):
    seen = two_stream_influence(LOCAL, BLOCK, backend)
    i = np.arange(LENGTH)
    near, block = abs(i[:, None] - i) <= LOCAL.window, i // BLOCK
    own, earlier = near & (block[:, None] == block), near & (block[:, None] > block)
    np.testing.assert_array_equal(seen, np.concatenate([own, earlier[:, :LENGTH - BLOCK]], axis=1))
    assert 0 < earlier.sum() < (block[:, None] > block).sum()


@pytest.mark.parametrize("config, rule", some([(GPT2, "causal"), (BERT, "bidirectional"), (MODERN, "block_causal")], 0),
                         ids=lambda x: getattr(x, "kind", x))
def test_one_stream_leaks_nothing(config, rule):
    model, params = network(config)
    seen = influence(lambda x0: run(model, params, None, make_stream(x0[None], BLOCK), rule=rule).clean[0],
                     one_hot(LENGTH))
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    expected = {"causal": j <= i, "block_causal": j // BLOCK <= i // BLOCK, "bidirectional": i + j >= 0}[rule]
    np.testing.assert_array_equal(seen, expected)


def batch_of_two():
    draw = np.random.default_rng(3)
    noised = make_stream(draw.integers(0, VOCAB, size=(2, 2, LENGTH)), BLOCK)
    return noised, make_stream(draw.integers(0, VOCAB, size=(2, LENGTH)), BLOCK)


def without_last_block(clean):
    return jax.tree.map(lambda x: x[:, :LENGTH - BLOCK], clean)


@ALL
def test_cached_blocks_equal_the_two_stream_pass(config):
    model, params = network(config)
    noised, clean = batch_of_two()
    noised = noised.replace(ids=noised.ids[:, :1])
    whole = run(model, params, noised, without_last_block(clean)).noised
    cache, finished = trunk.new_cache(model, params, batch=2, capacity=LENGTH, dtype="compute"), None
    for b in range(LENGTH // BLOCK):
        where = slice(b * BLOCK, (b + 1) * BLOCK)
        block = jax.tree.map(lambda x: x[..., where], noised)
        out = run(model, params, block, finished, cache=cache, write_at=max(0, (b - 1) * BLOCK))
        np.testing.assert_allclose(out.noised, whole[:, :, where], atol=3e-5)
        cache, finished = out.cache, jax.tree.map(lambda x: x[:, where], clean)


@pytest.mark.ci_slow
@ALL
def test_cached_tokens_equal_one_causal_pass(config):
    model, params = network(config)
    clean = make_stream(np.random.default_rng(3).integers(0, VOCAB, size=(2, LENGTH)), 1)
    whole = run(model, params, None, clean, rule="causal", block_size=1).clean
    cache = trunk.new_cache(model, params, 2, LENGTH + 3, "compute")
    for i in range(LENGTH):
        token = jax.tree.map(lambda x: x[:, i:i + 1], clean)
        out = run(model, params, None, token, rule="causal", block_size=1, cache=cache, write_at=i)
        np.testing.assert_allclose(out.clean[:, 0], whole[:, i], atol=3e-5)
        cache = out.cache


@pytest.mark.ci_slow
@ALL
def test_views_are_rows_of_their_own(config):
    """Two copies of a row in one pass, and each alone without scan, in tiles, with everything computed again."""
    model, params = network(config)
    noised, clean = batch_of_two()
    both = run(model, params, noised, without_last_block(clean)).noised
    for view in range(2):
        alone = noised.replace(ids=noised.ids[:, view:view + 1])
        found = run(model, params, alone, without_last_block(clean), backend="blocked", layers="unroll", remat="full")
        np.testing.assert_allclose(found.noised[:, 0], both[:, view], atol=3e-5)


@pytest.mark.ci_slow
@ALL
def test_bfloat16_is_close_to_float32(config):
    noised, clean = batch_of_two()
    exact, rounded = (run(*network(config, dtype), noised, without_last_block(clean)).noised
                      for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    difference = np.asarray(rounded, np.float32) - exact
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.05 * np.sqrt(np.mean(np.asarray(exact)**2))


@pytest.mark.ci_slow
@ALL
def test_dropout_follows_the_keys_of_its_rows(config):
    model, params = network(dataclasses.replace(config, dropout=0.5))
    _, clean = batch_of_two()
    keys = jax.random.split(jax.random.key(1), 2)
    both = run(model, params, None, clean, dropout_keys=keys).clean
    second = run(model, params, None, jax.tree.map(lambda x: x[1:], clean), dropout_keys=keys[1:]).clean
    np.testing.assert_allclose(second[0], both[1], atol=3e-5)
    plain, off = run(*network(config), None, clean).clean, run(model, params, None, clean).clean
    np.testing.assert_allclose(off, plain, atol=3e-5)
    assert np.mean(np.abs(np.asarray(both - plain)) > 1e-3) > 0.5


@pytest.mark.ci_slow
@ALL
def test_vocabulary_padding_is_invisible(config):
    model, params = network(config)
    assert params["embed"]["embedding"].shape == (128, 16)
    ids = jnp.array([[1, VOCAB - 1, 3]])

    @jax.jit
    def logits_of(params):
        return trunk.logits(model, params, model.embed.apply({"params": params["embed"]}, ids, ids))

    spoiled = jax.tree.map(np.copy, params)
    spoiled["embed"]["embedding"][VOCAB:] = 1e9
    if "bias" in spoiled["head"]:
        spoiled["head"]["bias"][VOCAB:] = 1e9
    assert logits_of(params).shape == (1, 3, VOCAB)
    np.testing.assert_array_equal(logits_of(spoiled), logits_of(params))


@ALL
def test_every_parameter_has_a_sharding_rule_that_fits(config):
    shapes = jax.eval_shape(functools.partial(trunk.init, build(config, jnp.float32)), jax.random.key(0))
    specs, name = sharding.param_specs(shapes, sharding_rules(config)), "blocks0" if config is MODERN else "blocks"
    for leaf, spec in zip(jax.tree.leaves(shapes), jax.tree.leaves(specs)):
        assert len(spec) <= leaf.ndim
    heads = specs[name]["q" if config is BERT else "qkv"]["kernel"]
    assert heads[-2] == "tensor" and heads[1] == "fsdp"


def test_layers_that_are_alike_are_stacked():
    config = dataclasses.replace(MODERN, num_layers=7, local_layers=(1, 2, 4, 5))
    assert config.runs() == (("blocks0", range(1), False), ("blocks1", range(1, 3), True),
                             ("blocks2", range(3, 4), False), ("blocks3", range(4, 6), True),
                             ("blocks4", range(6, 7), False))
    params = jax.eval_shape(functools.partial(trunk.init, build(config, jnp.float32)), jax.random.key(0))
    assert "norm1" not in params["blocks0"] and params["blocks1"]["norm1"]["scale"].shape == (2, 16)


def by_hand(config, tokens: int, pairs: float, mlp_matrices: int) -> float:
    """Forward pass: 8 D^2 + 4 D F (6 D F with gates) a token and layer, 4 D a pair, a head with a layer of its own."""
    width, hidden, vocab = config.hidden_size, config.intermediate_size, 128
    layers = config.num_layers * tokens * (8 * width**2 + 2 * mlp_matrices * width * hidden)
    dense = 0 if config is GPT2 else 2 * width**2
    return layers + 4 * width * pairs + tokens * (dense + 2 * width * vocab)


def test_flops_by_hand():
    causal = 2 * LENGTH * (LENGTH + 1) / 2
    assert flops.forward(GPT2, AR(bos=False), batch=1, length=LENGTH, noise_samples=1) == by_hand(GPT2, LENGTH, causal,
                                                                                                  2)
    whole = Masked.uniform_counts(LENGTH)  # every token may be masked, and is scored
    assert flops.scored_positions(whole, 1, LENGTH, 1) == LENGTH
    assert flops.forward(BERT, whole, batch=1, length=LENGTH, noise_samples=1) == by_hand(BERT, LENGTH, 2 * LENGTH**2,
                                                                                          2)
    local = sum(abs(i - j) <= MODERN.window for i in range(LENGTH) for j in range(LENGTH))
    expected = by_hand(MODERN, LENGTH, LENGTH**2 + local, 3)
    assert flops.forward(MODERN, whole, batch=1, length=LENGTH, noise_samples=1) == expected


@pytest.mark.parametrize("config, change, message", [
    (GPT2, {"positions": 0}, "model.positions is 0"),
    (GPT2, {"hidden_size": 15}, "model.hidden_size=15 must be a multiple of model.num_heads=2"),
    (BERT, {"unused_positions": -1}, "model.unused_positions is -1"),
    (BERT, {"dropout": 1.0}, "model.dropout is 1.0"),
    (MODERN, {"hidden_size": 18, "num_heads": 18},
     r"model.hidden_size=18 must be a multiple of 2 \* model.num_heads=36"),
    (MODERN, {"local_layers": (2,)}, r"model.local_layers is \(2,\), expected numbers from 0 to model.num_layers-1=1"),
    (MODERN, {"vocab_size": 1}, "model.vocab_size is 1"),
])
def test_wrong_config(config, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change)
