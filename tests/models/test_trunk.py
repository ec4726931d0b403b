"""The trunk: who influences whom by gradients, and ways of execution that must not change the numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from trunk_passes import run_pass

from bd3lm_jax.attention import blocked
from bd3lm_jax.models import build, trunk
from bd3lm_jax.models.cache import DTYPES
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.models.forward import DEFAULT_EXECUTION
from bd3lm_jax.models.trunk import Stream
from bd3lm_jax.planning import flops

CONFIG = DiTConfig(vocab_size=31, num_layers=3, hidden_size=16, num_heads=2, mlp_ratio=2, dropout=0.0, adaln=True,
                   cond_dim=8,
                   time_conditioning=True, rope_theta=1e4)
LENGTH, BLOCK = 12, 4


@functools.cache
def network(dropout=0.0, dtype=jnp.float32):
    """A network with random parameters everywhere: a fresh one, zero at its gates and head, ignores its input."""
    model = build(dataclasses.replace(CONFIG, dropout=dropout), dtype)
    shapes = jax.eval_shape(functools.partial(trunk.init, model), jax.random.key(0))
    draw = np.random.default_rng(0)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + 0.25 * draw.normal(size=x.shape), jnp.float32), shapes)


def make_stream(ids, block_size, documents=None, sigma=None):
    """A stream over rows of the given documents (lengths; the rest is padding), noised if ids are [B, M, T]."""
    length = ids.shape[-1]
    documents = documents or [length]
    starts = np.cumsum([0, *documents])
    position, segment = np.zeros(length, np.int32), np.zeros(length, np.int32)
    for index, (start, size) in enumerate(zip(starts, documents)):
        kept = max(0, min(size, length - start))
        position[start:start + kept], segment[start:start + kept] = np.arange(kept), index + 1
    rows = [np.broadcast_to(x, (ids.shape[0], length)) for x in (position, position // block_size, segment)]
    return Stream(ids, *rows, sigma)


@functools.partial(jax.jit, static_argnames=("model", "rule", "block_size", "backend", "remat", "layers"))
def run(model, params, noised, clean, *, rule="block_causal", block_size=BLOCK, backend="dense", remat="none",
        layers="scan", dropout_keys=None, cache=None, write_at=None):
    return run_pass(model, params, noised, clean, cache=cache, write_at=write_at, rule=rule, block_size=block_size,
                    execution=trunk.Execution(backend, layers, remat, False), dropout_keys=dropout_keys)


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


def batch_of_two():
    draw = np.random.default_rng(2)
    sigma = draw.uniform(0.1, 2, size=(2, 2, 3)).astype(np.float32)
    noised = make_stream(draw.integers(0, 31, size=(2, 2, LENGTH)), BLOCK, sigma=sigma)
    return noised, make_stream(draw.integers(0, 31, size=(2, LENGTH - BLOCK)), BLOCK)


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


def test_cached_blocks_equal_the_two_stream_pass():
    model, params = network()
    noised, clean = batch_of_two()
    whole = run(model, params, noised, clean).noised
    cache = trunk.new_cache(model, params, batch=2, capacity=LENGTH, dtype="compute")

    finished = None
    for b in range(LENGTH // BLOCK):
        where = slice(b * BLOCK, (b + 1) * BLOCK)
        block = jax.tree.map(lambda x: x[..., where], noised.replace(sigma=None))
        block = block.replace(sigma=noised.sigma[..., b:b + 1])
        out = run(model, params, block, finished, cache=cache, write_at=max(0, (b - 1) * BLOCK))
        cache = out.cache
        np.testing.assert_allclose(out.noised, whole[:, :, where], atol=2e-5)
        finished = jax.tree.map(lambda x: x[:, where], clean)


def test_cached_tokens_equal_one_causal_pass():
    model, params = network()
    clean = make_stream(np.random.default_rng(3).integers(0, 31, size=(2, LENGTH)), 1)
    whole = run(model, params, None, clean, rule="causal", block_size=1).clean
    cache = trunk.new_cache(model, params, 2, LENGTH + 3, "compute")  # unused slots are seen by nobody

    for i in range(LENGTH):
        token = jax.tree.map(lambda x: x[:, i:i + 1], clean)
        out = run(model, params, None, token, rule="causal", block_size=1, cache=cache, write_at=i)
        cache = out.cache
        np.testing.assert_allclose(out.clean[:, 0], whole[:, i], atol=2e-5)


def cached_step(dtype, sigma=None, rounding=None):
    """A cache that holds the first block, changed by `rounding`; what the second one stores; the third one's outcome
    when the second is stored in the same call, without levels (sigma None) or with a level for every stream."""
    model, params = network()
    clean = make_stream(np.random.default_rng(4).integers(0, 31, size=(2, LENGTH)), BLOCK)
    parts = [jax.tree.map(lambda x, b=b: x[:, b * BLOCK:(b + 1) * BLOCK], clean) for b in range(3)]
    cache = trunk.new_cache(model, params, 2, LENGTH, dtype)
    cache = run(model, params, None, parts[0], cache=cache, write_at=0).cache
    if rounding is not None:
        cache = cache.replace(**{part: jax.tree.map(rounding, getattr(cache, part)) for part in ("keys", "values")})
    noised = parts[2].replace(ids=parts[2].ids[:, None], sigma=sigma)
    return run(model, params, noised, parts[1].replace(sigma=None if sigma is None else sigma[:, 0]), cache=cache,
               write_at=BLOCK)


def assert_close(found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


@pytest.mark.ci_slow
def test_streams_that_share_their_weights_are_two_streams():
    """One row of both streams' tokens, or each on its own because levels were given, all of them 0."""
    assert_close(cached_step("compute"), cached_step("compute", sigma=np.zeros((2, 1, 1), np.float32)))


@pytest.mark.ci_slow
def test_several_views_with_a_cache_are_single_ones():
    model, params = network()
    first, *_ = batch_of_two()
    cache = cached_step("compute").cache
    clean = make_stream(np.random.default_rng(5).integers(0, 31, size=(2, BLOCK)), BLOCK)
    noised = jax.tree.map(lambda x: x[..., :BLOCK], first.replace(sigma=None))
    both = run(model, params, noised, clean, cache=cache, write_at=0).noised
    for view in range(2):
        one = noised.replace(ids=noised.ids[:, view:view + 1])
        alone = run(model, params, one, clean, cache=cache, write_at=0).noised
        np.testing.assert_allclose(both[:, view:view + 1], alone, atol=2e-5)


def slots_last(values):
    """Arrays of slots `[..., Dh, P]`, one a layer."""
    return [np.asarray(x, np.float64) for x in values["blocks"]]


@pytest.mark.ci_slow
def test_int8_keeps_each_token_and_head_to_a_127th_of_its_largest():
    """Against NumPy: integers and scales of what the float32 cache holds; half a step is the most that is lost."""
    exact, small = (cached_step(dtype).cache for dtype in ("float32", "int8"))
    step = 2 * BLOCK  # slots that are filled
    for part in ("keys", "values"):
        for x, stored in zip(slots_last(getattr(exact, part)), getattr(small, part)["blocks"], strict=True):
            assert stored.integers.dtype == jnp.int8 and stored.scale.dtype == jnp.float32
            x, scale = x[..., :BLOCK], np.abs(x[..., :BLOCK]).max(-2, keepdims=True) / 127
            np.testing.assert_allclose(stored.scale[..., :BLOCK], scale, rtol=1e-5)
            error = np.abs(stored.integers[..., :BLOCK] * scale - x) / scale
            assert error.max() <= 0.5 + 1e-3 and np.abs(stored.integers[..., :step]).max() == 127
    jax.tree.map(np.testing.assert_array_equal, (exact.position, exact.block, exact.segment),
                 (small.position, small.block, small.segment))


def rounded_to_int8(x):
    x = np.asarray(x, np.float64)
    scale = np.maximum(np.abs(x).max(-2, keepdims=True), 1e-12) / 127
    return jnp.asarray(np.round(x / scale) * scale, jnp.float32)


def rounded_to_bfloat16(x):
    """Round to nearest even at 8 bits, by integers."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return jnp.asarray(((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32))


@pytest.mark.ci_slow
@pytest.mark.parametrize("dtype, rounding", [("int8", rounded_to_int8), ("bfloat16", rounded_to_bfloat16)])
def test_a_small_cache_is_a_rounded_one(dtype, rounding):
    """What attends to it sees the rounded keys and values, and computes as before."""
    found, expected = cached_step(dtype).noised, cached_step("float32", rounding=rounding).noised
    np.testing.assert_allclose(found, expected, atol=2e-5)
    exact = np.asarray(cached_step("float32").noised)
    assert 1e-3 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_cache_bytes():
    model, params = network()
    sizes = {dtype: sum(x.nbytes for x in jax.tree.leaves(trunk.new_cache(model, params, 2, LENGTH, dtype).keys))
             for dtype in DTYPES}
    heads, width = 2, 8
    tokens = 3 * 2 * LENGTH * heads
    assert sizes == {"compute": 4 * tokens * width, "float32": 4 * tokens * width, "bfloat16": 2 * tokens * width,
                     "int8": tokens * (width + 4)}
    half, _ = network(dtype=jnp.bfloat16)
    assert jax.tree.leaves(trunk.new_cache(half, params, 2, LENGTH, "compute").keys)[0].dtype == jnp.bfloat16


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
