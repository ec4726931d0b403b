"""The trunk: who influences whom by gradients, and ways of execution that must not change the numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from toy_trunk import BLOCK, CONFIG, LENGTH, batch_of_two, make_stream, network, run

from bd3lm_jax.attention import blocked
from bd3lm_jax.models import trunk
from bd3lm_jax.models.forward import DEFAULT_EXECUTION
from bd3lm_jax.planning import flops


def influence(logits_of, params, groups):
    """Which embedding rows move the logits of each group of positions: bool [groups, rows]."""
    weight = np.random.default_rng(1).normal(size=CONFIG.vocab_size).astype(np.float32)

    def outputs(table):
        logits = logits_of({**params, "embed": {"embedding": table}})
        return jnp.stack([jnp.sum(logits[..., group, :] @ weight) for group in groups])

    gradient = jax.jit(jax.jacrev(outputs))(params["embed"]["embedding"])
    return np.any(np.asarray(gradient) != 0, axis=-1)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(blocked, "TILE", 8)


@pytest.mark.parametrize("backend, block_size, documents", some([
    ("dense", 1, [12]), ("dense", 2, [4, 6]), ("dense", 12, [12]), ("blocked", 4, [12]), ("blocked", 2, [4, 6]),
], 1, 3))
def test_two_streams_leak_nothing(small_tiles, backend, block_size, documents):
    model, params = network()
    xt, x0 = np.arange(12)[None, None], np.arange(12, 24)[None]  # every token its own embedding row
    noised = make_stream(xt, block_size, documents)
    clean = make_stream(x0[:, :12 - block_size], block_size, documents) if block_size < 12 else None

    def logits_of(params):
        out = run(model, params, noised, clean, block_size=block_size, backend=backend)
        return trunk.logits(model, params, out.noised)

    seen = influence(logits_of, params, [np.arange(start, start + block_size) for start in range(0, 12, block_size)])
    document = np.repeat(range(len(documents) + 1), [*documents, 12 - sum(documents)])
    expected = np.zeros((12 // block_size, 128), bool)
    for b in range(12 // block_size):
        own = np.arange(b * block_size, (b + 1) * block_size)
        earlier = np.arange(b * block_size)
        expected[b, own] = True
        if document[own[0]] < len(documents):
            expected[b, 12 + earlier[document[earlier] == document[own[0]]]] = True
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("rule, backend", some([
    ("causal", "dense"), ("block_causal", "dense"), ("bidirectional", "dense"), ("block_causal", "blocked"),
], 0, 3))
def test_one_stream_leaks_nothing(small_tiles, rule, backend):
    model, params = network()
    clean = make_stream(np.arange(12)[None], BLOCK, [4, 8])

    def logits_of(params):
        return trunk.logits(model, params, run(model, params, None, clean, rule=rule, backend=backend).clean)

    seen = influence(logits_of, params, [np.array([i]) for i in range(12)])
    i, j = np.arange(12)[:, None], np.arange(12)[None]
    reached = {"causal": j <= i, "block_causal": j // BLOCK <= i // BLOCK, "bidirectional": i == i + 0 * j}[rule]
    np.testing.assert_array_equal(seen[:, :12], reached & ((i < 4) == (j < 4)))
    assert not seen[:, 12:].any()


def values_and_gradients(model, params, **execution):
    noised, clean = batch_of_two()

    def total(params):
        logits = trunk.logits(model, params, run(model, params, noised, clean, **execution).noised, noised.sigma)
        return jnp.mean(jax.nn.logsumexp(3 * logits, axis=-1)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return logits, gradients


def loop_over_layers(model, params):
    """Both streams as one long row through every layer in full, without scan, peeling or tiles."""
    noised, clean = batch_of_two()
    _, block, count = model.groups[0]
    noise_samples, length, kept = 2, LENGTH, LENGTH - BLOCK
    views_of = np.repeat([1, 2, 0], [length, length, kept])
    place = np.concatenate([np.arange(length), np.arange(length), np.arange(kept)])
    q, k = (views_of[:, None], place[:, None] // BLOCK), (views_of[None], place[None] // BLOCK)
    own_block = (q[0] == k[0]) & (q[0] > 0) & (q[1] == k[1])
    mask = own_block | (k[0] == 0) & np.where(q[0] > 0, k[1] < q[1], k[1] <= q[1])
    sigma = jnp.repeat(noised.sigma, BLOCK, axis=-1).reshape(2, noise_samples * length)
    cond = model.condition.apply({"params": params["condition"]}, jnp.pad(sigma, ((0, 0), (0, kept))))
    ids = jnp.concatenate([noised.ids.reshape(2, -1), clean.ids], axis=1)
    h = params["embed"]["embedding"][ids]
    for layer in range(count):
        variables = {"params": jax.tree.map(lambda x: x[layer], params["blocks"])}
        query, key, value = block.apply(variables, h, cond, model.rotary(jnp.asarray(place)[None]), True,
                                        method=block.project_qkv)
        scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(8), -jnp.inf)
        attended = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)
        h, _ = block.apply(variables, h, attended, cond, None, method=block.attention_output_and_mlp)
    logits = model.head.apply({"params": params["head"]}, h, cond)[:, :noise_samples * length]
    return logits.reshape(2, noise_samples, length, -1)


@functools.cache
def loop_values_and_gradients():
    model, params = network()

    def total(params):
        logits = loop_over_layers(model, params)
        return jnp.mean(jax.nn.logsumexp(3 * logits, axis=-1)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return logits, gradients


@pytest.mark.ci_slow
@pytest.mark.parametrize("execution", [
    {"layers": "scan"}, {"layers": "scan", "remat": "dots"}, {"layers": "unroll", "remat": "full"},
    {"layers": "scan", "remat": "full", "backend": "blocked"},
    {"layers": "scan", "remat": "attention", "backend": "blocked"},
], ids=lambda execution: "-".join(execution.values()))
def test_execution_equals_plain_loop(small_tiles, execution):
    logits, gradients = loop_values_and_gradients()
    found_logits, found_gradients = values_and_gradients(*network(), **execution)
    np.testing.assert_allclose(found_logits, logits, atol=2e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), found_gradients, gradients)


@pytest.mark.ci_slow
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_unstacked_layers_equal_plain_loop(small_tiles, layers):
    model, params = network()
    noised, clean = batch_of_two()
    h = run(model, trunk.unstack_layers(model, params), noised, clean, layers=layers).noised
    np.testing.assert_allclose(trunk.logits(model, params, h, noised.sigma), loop_values_and_gradients()[0], atol=2e-5)


def test_padding_influences_nothing_and_gets_no_gradient():
    model, params = network()
    noised = make_stream(np.arange(12)[None, None], BLOCK, [8])
    clean = make_stream(np.arange(12, 20)[None], BLOCK, [8])

    def logits_of(params):
        return trunk.logits(model, params, run(model, params, noised, clean).noised)

    seen = influence(logits_of, params, [np.arange(8)])
    assert seen[0, :8].all() and not seen[0, 8:12].any()


@pytest.mark.ci_slow
def test_dropout_follows_the_keys_of_its_rows_and_is_off_without():
    model, params = network(dropout=0.5)
    noised, clean = batch_of_two()

    def noised_with(keys, noised, clean):
        return run(model, params, noised, clean, dropout_keys=keys).noised

    keys, others = (jax.random.split(jax.random.key(seed), 2) for seed in (1, 2))
    both = noised_with(keys, noised, clean)
    assert np.mean(np.asarray(both != noised_with(others, noised, clean))) > 0.9
    second_alone = noised_with(keys[1:], *jax.tree.map(lambda x: x[1:], (noised, clean)))
    np.testing.assert_allclose(second_alone[0], both[1], atol=1e-5)
    network_without, _ = network()
    np.testing.assert_allclose(noised_with(None, noised, clean), run(network_without, params, noised, clean).noised,
                               atol=1e-5)


def test_dropout_drops_its_share_and_keeps_the_mean():
    model, params = network(dropout=0.25)
    _, block, _ = model.groups[0]
    variables = {"params": jax.tree.map(lambda x: x[0], params["blocks"])}
    h, attended, cond = jnp.zeros((64, 8, 16)), jnp.ones((64, 8, 2, 8)), jnp.ones((1, 1, 8))
    half = {"params": {**variables["params"], "mlp_out": jax.tree.map(jnp.zeros_like, variables["params"]["mlp_out"])}}

    def after(keys):
        return np.asarray(block.apply(half, h, attended, cond, keys, method=block.attention_output_and_mlp)[0])

    dropped = after(jax.random.split(jax.random.key(0), 64)) / after(None)
    np.testing.assert_allclose(np.unique(dropped.round(4)), [0, 1.3333])
    assert abs(np.mean(dropped == 0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / dropped.size)


@pytest.mark.ci_slow
def test_dropout_is_the_same_scanned_and_unrolled():
    model, params = network(dropout=0.5)
    keys = jax.random.split(jax.random.key(3), 2)
    scanned, unrolled = (run(model, params, *batch_of_two(), layers=layers, dropout_keys=keys).noised
                         for layers in ("scan", "unroll"))
    np.testing.assert_allclose(scanned, unrolled, atol=2e-5)


@pytest.mark.ci_slow
def test_bfloat16_is_close_to_float32():
    model, params = network()
    rounded_model, _ = network(dtype=jnp.bfloat16)
    noised, clean = batch_of_two()
    exact = run(model, params, noised, clean).noised
    rounded = run(rounded_model, params, noised, clean).noised
    assert rounded.dtype == jnp.bfloat16
    difference = np.asarray(rounded, np.float32) - exact
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.05 * np.sqrt(np.mean(np.asarray(exact)**2))


def test_layers_start_different():
    model, _ = network()
    kernels = np.asarray(jax.jit(functools.partial(trunk.init, model))(jax.random.key(0))["blocks"]["qkv"]["kernel"])
    assert kernels.shape == (3, 16, 3, 2, 8)
    assert not np.any(kernels[0] == kernels[1])
    np.testing.assert_allclose(kernels.std(), 1 / np.sqrt(3 * 16), rtol=0.05)  # U(+-1 / sqrt(fan in))


@pytest.mark.ci_slow
def test_what_is_not_wanted_costs_nothing_behind_the_last_attention():
    model, params = network()
    ids = np.random.default_rng(2).integers(0, CONFIG.vocab_size, size=(2, 1, LENGTH)).astype(np.int32)
    noised = make_stream(jnp.asarray(ids), BLOCK)
    output_positions = np.array([[3, 0], [7, 11]])

    def forward(params, output_positions):
        return trunk.two_streams(model, params, noised, None, block_size=BLOCK, execution=DEFAULT_EXECUTION,
                                 output_positions_BxP=output_positions).noised

    every, some = jax.jit(lambda p: (forward(p, None), forward(p, output_positions)))(params)
    np.testing.assert_allclose(some, np.take_along_axis(np.asarray(every), output_positions[:, None, :, None], 2),
                               atol=1e-5)
    saved = flops.count(lambda p: forward(p, None), params) - flops.count(lambda p: forward(p, output_positions),
                                                                          params)
    width = CONFIG.hidden_size
    assert saved == 2 * (LENGTH - 2) * 2 * (width * width + 2 * CONFIG.mlp_ratio * width * width)
