"""A deep encoder over clean blocks and a shallow decoder over noised ones: against a loop written out, and who sees
whom; what a reveal call leaves out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_runs import quick_jit, toy_config

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.generation.denoise import BlockDenoiser, UncachedDenoiser
from bd3lm_jax.generation.sampling import SAMPLERS, DenoiserContext, Filters, Request, Settings, run_blocks, start
from bd3lm_jax.generation.sampling.generate import PreviousBlock
from bd3lm_jax.models import build, forward, trunk
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.models.forward import Execution
from bd3lm_jax.planning import flops

VOCAB, MASK, END, BLOCK, LENGTH, VIEWS = 31, 30, 3, 4, 12, 2
CONFIG = DiTConfig(vocab_size=VOCAB, num_layers=4, hidden_size=16, num_heads=2, mlp_ratio=2, dropout=0.0, adaln=True,
                   cond_dim=8,
                   time_conditioning=True, rope_theta=1e4, decoder_layers=2)
X0 = np.random.default_rng(1).integers(0, MASK, size=(2, LENGTH)).astype(np.int32)
XT = np.where(np.random.default_rng(2).uniform(size=(2, VIEWS, LENGTH)) < 0.5, MASK, X0[:, None])
SIGMA = np.random.default_rng(3).uniform(0.1, 2, size=(2, VIEWS, LENGTH // BLOCK)).astype(np.float32)


@functools.cache
def network(time_conditioning=True, **changes):
    """Random parameters everywhere: a fresh network ignores its input."""
    model = build(dataclasses.replace(CONFIG, time_conditioning=time_conditioning, **changes), jnp.float32)
    shapes = jax.eval_shape(functools.partial(trunk.init, model), jax.random.key(0))
    draw = np.random.default_rng(0)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + 0.25 * draw.normal(size=x.shape), jnp.float32), shapes)


def two_streams(model, params, layers="scan", remat="none", backend="dense", xt=XT, x0=X0, sigma=SIGMA):
    position, segment = forward.single_document_rows(x0)
    h = forward.two_stream(model, params, xt, x0, position, segment, block_size=BLOCK, sigma_BxMxn=sigma,
                           execution=Execution(backend, layers, remat, False))
    return trunk.logits(model, params, h, sigma)


def attention(query, key, value, mask):
    scores = jnp.where(mask, jnp.einsum("...qhd,...khd->...hqk", query, key) / np.sqrt(query.shape[-1]), -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores, axis=-1), value)


def by_hand(model, params, decoder=CONFIG.decoder_layers):
    """Two passes, one after the other: clean tokens through all layers, keeping keys and values of each; then every
    copy through the last ones, with a dense mask."""
    (_, block, count), = model.groups
    layer = [{"params": jax.tree.map(lambda x, i=i: x[i], params["blocks"])} for i in range(count)]
    place = np.arange(LENGTH)
    rotary, number = model.rotary(jnp.asarray(place)[None]), place // BLOCK
    table = params["embed"]["embedding"]
    h, kept = table[X0], []
    cond = model.condition.apply({"params": params["condition"]}, jnp.zeros((1, 1)))
    for i in range(count):
        query, key, value = block.apply(layer[i], h, cond, rotary, True, method=block.project_qkv)
        kept.append((key, value))
        h, _ = block.apply(layer[i], h, attention(query, key, value, number[:, None] >= number), cond, None,
                           method=block.attention_output_and_mlp)
    logits = []
    for view in range(VIEWS):
        h = table[XT[:, view]]
        cond = model.condition.apply({"params": params["condition"]}, jnp.repeat(SIGMA[:, view], BLOCK, axis=-1))
        for i in range(count - decoder, count):
            query, key, value = block.apply(layer[i], h, cond, rotary, True, method=block.project_qkv)
            keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(kept[i], (key, value)))
            mask = np.concatenate([number[:, None] > number, number[:, None] == number], axis=1)
            h, _ = block.apply(layer[i], h, attention(query, keys, values, mask), cond, None,
                               method=block.attention_output_and_mlp)
        logits.append(model.head.apply({"params": params["head"]}, h, cond))
    return jnp.stack(logits, axis=1)


def values_and_gradients(function, params):
    def total(params):
        logits = function(params)
        return jnp.mean(jax.nn.logsumexp(3 * logits, axis=-1)), logits

    (_, logits), gradients = quick_jit(jax.value_and_grad(total, has_aux=True))(params)
    return logits, gradients


@functools.cache
def expected():
    model, params = network()
    return values_and_gradients(functools.partial(by_hand, model), params)


@pytest.mark.parametrize("execution", [
    {"layers": "scan"},
    pytest.param({"layers": "unroll", "remat": "full"}, marks=pytest.mark.ci_slow),
    pytest.param({"layers": "scan", "remat": "attention", "backend": "blocked"}, marks=pytest.mark.ci_slow),
], ids=lambda execution: "-".join(execution.values()))
def test_equals_two_passes_written_out(execution):
    model, params = network()
    logits, gradients = values_and_gradients(lambda params: two_streams(model, params, **execution), params)
    np.testing.assert_allclose(logits, expected()[0], atol=2e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), gradients, expected()[1])


def test_one_decoder_layer_and_as_many_as_there_are():
    model, params = network(decoder_layers=1)
    logits = quick_jit(functools.partial(two_streams, model))(params)
    np.testing.assert_allclose(logits, quick_jit(lambda params: by_hand(model, params, 1))(params), atol=2e-5)
    (plain, params), (whole, _) = network(decoder_layers=0), network(decoder_layers=4)
    programs = [str(jax.make_jaxpr(functools.partial(two_streams, model))(params)) for model in (plain, whole)]
    assert programs[0] == programs[1] != str(jax.make_jaxpr(functools.partial(two_streams, model))(params))


def test_nothing_leaks():
    """Which embedding rows move the logits of each block: its own noised tokens and the clean blocks before it."""
    model, params = network()
    xt, x0 = np.arange(12)[None, None], np.arange(12, 24)[None]  # every token its own embedding row
    weight = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)

    def outputs(table):
        logits = two_streams(model, {**params, "embed": {"embedding": table}}, xt=xt, x0=x0, sigma=SIGMA[:1, :1])
        return (logits[0, 0].reshape(-1, BLOCK, VOCAB) @ weight).sum(1)

    seen = np.any(np.asarray(quick_jit(jax.jacrev(outputs))(params["embed"]["embedding"])) != 0, axis=-1)
    row = np.arange(seen.shape[1])
    for block in range(LENGTH // BLOCK):
        own = (row < 12) & (row // BLOCK == block)
        before = (row >= 12) & (row < 12 + block * BLOCK)
        np.testing.assert_array_equal(seen[block], own | before)


def test_blocks_with_a_cache_equal_two_streams():
    model, params = network(time_conditioning=False)
    xt = XT[:, 0]
    whole = quick_jit(functools.partial(two_streams, model, xt=XT[:, :1], sigma=None))(params)[:, 0]
    denoiser = BlockDenoiser(model, BLOCK, LENGTH, "float32")
    ask = quick_jit(lambda *args: denoiser(*args))
    cache = denoiser.prefill(params, X0[:, :0], np.ones((2, 0), bool), 0)
    places = np.tile(np.arange(BLOCK), (2, 1))
    for block in range(LENGTH // BLOCK):
        here, before = (np.s_[:, b * BLOCK:(b + 1) * BLOCK] for b in (block, max(block - 1, 0)))
        previous = PreviousBlock(X0[before], np.full((2, BLOCK), block > 0))
        logits, cache = ask(params, xt[here], block, previous, places, np.ones(2), cache)
        np.testing.assert_allclose(logits, whole[here], atol=2e-5)
        again, _ = ask(params, xt[here], block, None, places, np.ones(2), cache)
        np.testing.assert_allclose(again, whole[here], atol=2e-5)


def asked_once(model, previous):
    """A question about one block and its abstract arguments; params first."""
    denoiser = BlockDenoiser(model, BLOCK, LENGTH, "float32")
    places = np.tile(np.arange(BLOCK), (2, 1))
    shapes = jax.eval_shape(lambda: trunk.init(model, jax.random.key(0)))
    cache = jax.eval_shape(lambda p: denoiser.prefill(p, X0[:, :BLOCK], np.ones((2, BLOCK), bool), 0), shapes)

    def ask(params, cache):
        known = PreviousBlock(X0[:, :BLOCK], np.ones((2, BLOCK), bool)) if previous else None
        return denoiser(params, XT[:, 0, BLOCK:2 * BLOCK], 1, known, places, np.ones(2), cache)[0]

    return ask, shapes, cache


@pytest.mark.ci_slow
def test_a_reveal_call_runs_the_decoder_alone():
    """Its products are those of a plain network of so many layers, and encoder layers have no influence."""
    config = dict(time_conditioning=False)
    split, shallow, plain = (network(**config, **changes)[0] for changes in (
        {}, {"num_layers": 2, "decoder_layers": 0}, {"decoder_layers": 0}))
    calls = {name: flops.count(*asked_once(model, False))
             for name, model in (("split", split), ("shallow", shallow), ("plain", plain))}
    assert calls["split"] == calls["shallow"] < 0.7 * calls["plain"]
    first = [flops.count(*asked_once(model, True)) for model in (split, plain)]
    assert calls["split"] < first[0] < first[1]
    model, params = network(**config)
    ask, _, _ = asked_once(model, False)
    cache = BlockDenoiser(model, BLOCK, LENGTH, "float32").prefill(params, X0[:, :BLOCK], np.ones((2, BLOCK), bool), 0)
    gradient = quick_jit(jax.grad(lambda p: jnp.sum(ask(p, cache)**2)))(params)["blocks"]["mlp_in"]["kernel"]
    assert not np.any(gradient[:2]) and np.all(np.any(gradient[2:], axis=(1, 2)))


@pytest.mark.ci_slow
def test_a_cache_changes_no_token():
    model, params = network(time_conditioning=False)
    outcomes = []
    for denoiser in (BlockDenoiser(model, BLOCK, LENGTH, "float32"), UncachedDenoiser(model, BLOCK, LENGTH)):
        def generate(params, denoiser=denoiser):
            cache = denoiser.prefill(params, jnp.asarray(X0[:, :0]), jnp.ones((2, 0), bool), 0)
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(2))
            request = Request(keys, np.arange(LENGTH) < np.array([[1], [6]]), np.full(2, LENGTH), np.zeros(2, int),
                              np.arange(VOCAB) == MASK, np.float32(0.5))
            settings = Settings(BLOCK, BLOCK, 6, Filters(1.0), MASK, -1)
            denoiser_context = DenoiserContext(functools.partial(denoiser, params), SAMPLERS["first_hitting"], settings)
            return run_blocks(denoiser_context, request, start(denoiser_context, request, X0, 0, cache),
                              LENGTH // BLOCK).tokens
        outcomes.append(quick_jit(generate)(params))
    np.testing.assert_array_equal(*outcomes)
    assert np.all(outcomes[0] != MASK)


def gradient_of(config):
    model = build(config, jnp.float32)
    params = jax.eval_shape(lambda: trunk.init(model, jax.random.key(0)))
    return jax.grad(lambda p: two_streams(model, p, layers="unroll", sigma=None).sum()), params


@pytest.mark.ci_slow
def test_the_count_of_operations():
    """One more encoder layer: 24 D^2 a clean token (a smaller MLP here: 16 D^2), all pairs in dense attention, no
    noised token; what `flops` says of it, with the pairs that see each other; and what the compiler counts."""
    rows, width, clean = 2, 256, LENGTH - BLOCK
    configs = [dataclasses.replace(CONFIG, time_conditioning=False, num_layers=layers, hidden_size=width,
                                   decoder_layers=1)
               for layers in (2, 3)]
    before, after = (flops.count(*gradient_of(config)) for config in configs)
    tokens = 3 * 16 * width**2 * rows * clean
    adaln = 3 * 2 * 8 * 6 * width
    assert after - before == pytest.approx(tokens + 3 * 4 * width * rows * clean**2, abs=2 * adaln)
    said = [flops.parts(config, Masked.uniform_counts(BLOCK), batch=rows, length=LENGTH, noise_samples=VIEWS)
            for config in configs]
    assert 3 * (said[1].layers - said[0].layers) == pytest.approx(tokens, abs=2 * adaln)
    assert said[1].attention - said[0].attention == 4 * width * rows * (clean * LENGTH / 2)
    assert said[1].head == said[0].head
    compiled = []
    for config in configs:
        function, params = gradient_of(config)
        compiled.append(quick_jit(function).lower(params).compile().cost_analysis()["flops"])
    assert compiled[1] - compiled[0] == pytest.approx(after - before, rel=0.05)  # with norms and gates


@pytest.mark.parametrize("changes, message", [
    ({"model.decoder_layers": 2}, "expected 0 .all layers. to model.num_layers=1"),
    ({"model.num_layers": 2, "model.decoder_layers": 1, "diffusion": {"kind": "ar", "bos": True}}, "no clean blocks"),
    ({"model.num_layers": 2, "model.decoder_layers": 1, "diffusion.block_size": 32}, "no clean blocks"),
])
def test_what_cannot_be_split(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        toy_config(tmp_path, changes)
