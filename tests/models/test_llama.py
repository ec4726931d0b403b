"""The Llama backbone against NumPy, by gradients, and in every way that it can be run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import llama_oracle
import numpy as np
import pytest
from grids import some
from llama_oracle import network
from trunk_passes import run_pass

from bd3lm_jax.attention import blocked
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR, Masked
from bd3lm_jax.models import build, forward, shared, trunk
from bd3lm_jax.models.llama import LlamaConfig, llama3_frequencies, rope_frequencies
from bd3lm_jax.models.trunk import Stream
from bd3lm_jax.parallel import sharding
from bd3lm_jax.planning import flops

TINY = LlamaConfig(vocab_size=31, num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=6,
                   intermediate_size=24, dropout=0.0,
                   rope_theta=100.0, rope_scaling=(), norm_eps=1e-5, qkv_bias=True, qk_norm=True, tie_embeddings=False)
TIED = dataclasses.replace(TINY, qkv_bias=False, qk_norm=False, tie_embeddings=True, num_kv_heads=1)
LENGTH, BLOCK = 12, 4


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blocked, "TILE", 8)


def rows(seed=0):
    return np.random.default_rng(seed).integers(0, 31, size=(2, LENGTH))


@functools.partial(jax.jit, static_argnames=("model", "execution"))
def two_stream(model, params, xt, x0, execution=trunk.Execution("dense", "scan", "none", False)):
    position, segment = forward.single_document_rows(x0)
    h = forward.two_stream(model, params, xt[:, None], x0, position, segment, block_size=BLOCK, execution=execution)
    return trunk.logits(model, params, h)[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "rule"))
def one_stream(model, params, ids, rule):
    position, segment = forward.single_document_rows(ids)
    h = forward.one_stream(model, params, ids, position, segment, rule=rule, block_size=BLOCK,
                           execution=forward.DEFAULT_EXECUTION)
    return trunk.logits(model, params, h)


@pytest.mark.parametrize("config", some([TINY, TIED], 0), ids=["biases-norms", "tied"])
def test_two_streams_in_numpy(config):
    model, params = network(config)
    xt, x0 = rows(0), rows(1)
    mask, place = llama_oracle.two_stream_mask(LENGTH, BLOCK)
    expected = [llama_oracle.logits(config, params, np.concatenate([a, b[:-BLOCK]]), place, mask)[:LENGTH]
                for a, b in zip(xt, x0)]
    np.testing.assert_allclose(two_stream(model, params, xt, x0), expected, atol=1e-4)


@pytest.mark.parametrize("rule", some(["causal", "block_causal", "bidirectional"], 1))
def test_one_stream_in_numpy(rule):
    model, params = network(TINY)
    ids, place = rows(), np.arange(LENGTH)
    mask = {"causal": place <= place[:, None], "block_causal": place // BLOCK <= place[:, None] // BLOCK,
            "bidirectional": np.ones((LENGTH, LENGTH), bool)}[rule]
    expected = [llama_oracle.logits(TINY, params, row, place, mask) for row in ids]
    np.testing.assert_allclose(one_stream(model, params, ids, rule), expected, atol=1e-4)


def test_two_streams_leak_nothing():
    """Which embedding rows move the logits of a block: every token of both streams is its own row."""
    config = dataclasses.replace(TINY, vocab_size=24)
    model, params = network(config)
    weight = np.random.default_rng(1).normal(size=24).astype(np.float32)

    def of_blocks(table):
        logits = two_stream(model, {**params, "embed": {"embedding": table}}, np.arange(12)[None],
                            np.arange(12, 24)[None])
        return (logits[0] @ weight).reshape(3, BLOCK).sum(-1)

    seen = np.any(np.asarray(jax.jit(jax.jacrev(of_blocks))(params["embed"]["embedding"])) != 0, axis=-1)
    expected = np.zeros((3, 128), bool)
    for block in range(3):
        expected[block, block * BLOCK:(block + 1) * BLOCK] = True
        expected[block, 12:12 + block * BLOCK] = True
    np.testing.assert_array_equal(seen, expected)


@functools.cache
def values_and_gradients(execution):
    model, params = network(TINY)

    def total(params):
        return jnp.mean(jax.nn.logsumexp(two_stream(model, params, rows(0), rows(1), execution), axis=-1))

    return jax.jit(jax.value_and_grad(total))(params)


@pytest.mark.ci_slow
@pytest.mark.parametrize("backend, layers, remat", some([("dense", "unroll", "full"), ("blocked", "scan", "dots")], 1))
def test_executions_agree(small_tiles, backend, layers, remat):
    found = values_and_gradients(trunk.Execution(backend, layers, remat, True))
    expected = values_and_gradients(trunk.Execution("dense", "scan", "none", False))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-6), found, expected)


def part(ids, where):
    position = np.broadcast_to(np.arange(LENGTH), ids.shape)[:, where]
    return Stream(ids[:, where], position, position // BLOCK, np.ones_like(position))


@functools.partial(jax.jit, static_argnames=("model", "rule", "block_size"))
def cached(model, params, noised, clean, cache, write_at, rule, block_size):
    return run_pass(model, params, noised, clean, cache=cache, write_at=write_at, rule=rule, block_size=block_size,
                    execution=forward.DEFAULT_EXECUTION)


def test_cached_blocks_equal_the_two_stream_pass():
    model, params = network(TINY)
    xt, x0 = rows(0), rows(1)
    whole = two_stream(model, params, xt, x0)
    cache, finished = trunk.new_cache(model, params, 2, LENGTH, "compute"), None
    assert jax.tree.leaves(cache.keys)[0].shape == (2, 2, 6, LENGTH)  # heads of keys, not of queries
    for start in range(0, LENGTH, BLOCK):
        where = slice(start, start + BLOCK)
        noised = part(xt, where)
        out = cached(model, params, noised.replace(ids=noised.ids[:, None]), finished, cache,
                     max(0, start - BLOCK), "block_causal", BLOCK)
        cache, finished = out.cache, part(x0, where)
        np.testing.assert_allclose(trunk.logits(model, params, out.noised)[:, 0], whole[:, where], atol=1e-4)


@pytest.mark.ci_slow
def test_cached_tokens_equal_the_causal_pass():
    model, params = network(TIED)
    ids = rows(2)
    whole = one_stream(model, params, ids, "causal")
    cache = trunk.new_cache(model, params, 2, LENGTH + 3, "compute")
    for at in range(LENGTH):
        out = cached(model, params, None, part(ids, slice(at, at + 1)), cache, at, "causal", 1)
        cache = out.cache
        np.testing.assert_allclose(trunk.logits(model, params, out.clean)[:, 0], whole[:, at], atol=1e-4)


def test_wavelengths_of_llama3():
    """By its three cases: turns a lot in the original context, turns little, in between."""
    frequencies, (factor, low, high, context) = rope_frequencies(64, 5e5), (8.0, 1.0, 4.0, 8192.0)
    for old, new in zip(frequencies, llama3_frequencies(frequencies, factor, low, high, context), strict=True):
        turns = context / (2 * np.pi / old)
        mix = (turns - low) / (high - low)
        expected = old if turns > high else old / factor if turns < low else (1 - mix) * old / factor + mix * old
        assert new == pytest.approx(expected, rel=1e-12)
    assert len(set(np.round(llama3_frequencies(frequencies, 8, 1, 4, 8192) / frequencies, 6)) - {1, 0.125}) > 2


def test_linear_scaling_is_a_slower_clock():
    scaled = build(dataclasses.replace(TINY, rope_scaling=(4.0,)), jnp.float32)
    for slow, fast in zip(scaled.rotary(jnp.arange(8)[None]), build(TINY, jnp.float32).rotary(jnp.arange(8)[None] / 4)):
        np.testing.assert_allclose(slow, fast, atol=1e-6)


def test_dropout_drops():
    model, params = network(dataclasses.replace(TINY, dropout=0.5))
    _, block, _ = model.groups[0]
    p = {"params": jax.tree.map(lambda x: x[0], params["blocks"])}
    h, attended = jnp.ones((8, 4, 16)), jnp.ones((8, 4, 4, 6))
    without, with_ = (block.apply(p, h, attended, None, keys, method=block.attention_output_and_mlp)[0]
                      for keys in (None, jax.random.split(jax.random.key(0), 8)))
    assert np.mean(np.asarray(with_ != without)) > 0.9


@pytest.mark.parametrize("config", [TINY, TIED], ids=["biases-norms", "tied"])
def test_every_leaf_has_a_sharding(config):
    params = jax.eval_shape(lambda: trunk.init(build(config, jnp.float32), jax.random.key(0)))
    specs = sharding.param_specs(params, shared.SHARDING)
    jax.tree.map(lambda leaf, spec: None if len(spec) <= leaf.ndim else pytest.fail(str(spec)), params, specs)
    assert "tensor" in specs["blocks"]["k"]["kernel"] and "tensor" in specs["blocks"]["up"]["kernel"]


@pytest.mark.parametrize("objective", [AR(bos=False), Masked.uniform_counts(16)], ids=["causal", "blocks"])
def test_flops_by_hand(objective):
    """2 a multiply-add: projections with fewer key heads, three matrices of the MLP, attention of all query heads."""
    config, length = dataclasses.replace(TINY, vocab_size=128, num_layers=3), 64
    width, q, kv, hidden = 16, 4 * 6, 2 * 6, 24
    layer = 2 * (width * (q + 2 * kv) + q * width + 3 * width * hidden)
    if objective.causal:
        tokens, pairs, scored = 3 * length * layer, 3 * length * (length + 1) / 2, length
    else:
        clean = length - 16
        noised_pairs = sum(16 * (block * 16 + 16) for block in range(4))
        clean_pairs = sum(16 * (block + 1) * 16 for block in range(3))
        tokens = 3 * length * layer + 2 * clean * layer + clean * 4 * width * kv
        pairs, scored = 3 * noised_pairs + 2 * clean_pairs, flops.scored_positions(objective, 1, length, 1)
    expected = tokens + 4 * q * pairs + 2 * width * 128 * scored
    assert flops.forward(config, objective, batch=1, length=length,
                         noise_samples=1) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("change, message", [
    ({"num_layers": 0}, "model.num_layers is 0"), ({"intermediate_size": 0}, "model.intermediate_size is 0"),
    ({"num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4"),
    ({"head_dim": 5}, "model.head_dim is 5, expected an even number"),
    ({"rope_scaling": (2.0, 1.0)}, "model.rope_scaling is"), ({"rope_scaling": (0.0,)}, "model.rope_scaling is"),
    ({"dropout": 1.0}, "model.dropout is 1.0"), ({"vocab_size": 1}, "model.vocab_size is 1"),
    ({"norm_eps": 0.0}, "model.norm_eps is 0.0"),
])
def test_wrong_config(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)
