"""Whole passes against the published implementations, and identities between passes of one network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from places import GOLDEN

from bd3lm_jax.checkpoints import hf
from bd3lm_jax.diffusion import Masked
from bd3lm_jax.diffusion.masked import cross_entropy_subs
from bd3lm_jax.models import build, forward, trunk
from bd3lm_jax.models.dit import DiTConfig
from bd3lm_jax.models.forward import DEFAULT_EXECUTION, Execution
from bd3lm_jax.models.trunk import Stream

BLOCK_MODELS = ("bd3lm_block4", "bd3lm_time_conditioned", "bd3lm_block32_is_mdlm")
TOLERANCE = 2e-5
CONFIG = DiTConfig(vocab_size=31, num_layers=2, hidden_size=16, num_heads=2, mlp_ratio=2, dropout=0.0, adaln=True,
                   cond_dim=8,
                   time_conditioning=True, rope_theta=1e4)
MASK = 30


@functools.cache
def published(name):
    """A published network and what its own implementation gave."""
    (config, objective, *_), params = hf.read_model(GOLDEN / name)
    return build(config, jnp.float32), params, objective, dict(np.load(GOLDEN / name / "io.npz"))


@functools.cache
def network(time_conditioning=False):
    model = build(dataclasses.replace(CONFIG, time_conditioning=time_conditioning), jnp.float32)
    shapes = jax.eval_shape(functools.partial(trunk.init, model), jax.random.key(0))
    draw = np.random.default_rng(0)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + 0.25 * draw.normal(size=x.shape), jnp.float32), shapes)


def make_ids(*shape):
    return np.random.default_rng(1).integers(0, MASK, size=shape).astype(np.int32)


def masked_somewhere(ids):
    return np.where(np.random.default_rng(2).uniform(size=ids.shape) < 0.5, MASK, ids)


STATIC = ("model", "block_size", "execution")


@functools.partial(jax.jit, static_argnames=STATIC)
def two_stream_logits(model, params, xt_BxMxL, x0_BxL, position, segment, *, block_size, sigma=None, clean_sigma=None,
                      execution=DEFAULT_EXECUTION):
    h = forward.two_stream(model, params, xt_BxMxL, x0_BxL, position, segment, block_size=block_size,
                           sigma_BxMxn=sigma, clean_sigma_Bx1=clean_sigma, execution=execution)
    return trunk.logits(model, params, h, sigma)


@functools.partial(jax.jit, static_argnames=(*STATIC, "rule"))
def one_stream_logits(model, params, ids_BxL, position, segment, *, rule, block_size, sigma=None,
                      execution=DEFAULT_EXECUTION):
    h = forward.one_stream(model, params, ids_BxL, position, segment, rule=rule, block_size=block_size, sigma_Bxn=sigma,
                           execution=execution)
    return trunk.logits(model, params, h, sigma)


def published_sigma(model, io):
    return io["sigma"][:, None] if model.config.time_conditioning else None


@pytest.mark.parametrize("backend", some(["dense", "blocked"], 0))
@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_two_streams_equal_published(name, backend):
    model, params, objective, io = published(name)
    sigma = published_sigma(model, io)
    view_sigma = None if sigma is None else sigma[:, None]
    logits = two_stream_logits(model, params, io["xt"][:, None], io["x0"], *forward.single_document_rows(io["x0"]),
                               block_size=objective.block_size, sigma=view_sigma, clean_sigma=sigma,
                               execution=Execution(backend, "scan", "none", False))[:, 0]
    np.testing.assert_allclose(logits, io["logits"], atol=TOLERANCE, rtol=0)

    masked, mask_id = io["xt"] == io["mask_id"], int(io["mask_id"])
    nats = np.zeros(io["x0"].shape, np.float32)
    nats[masked] = cross_entropy_subs(jnp.asarray(logits)[masked], io["x0"][masked], mask_id)
    np.testing.assert_allclose(nats / io["t"], io["token_loss"], atol=TOLERANCE, rtol=0)
    for token in (0, 17, mask_id - 1):
        target = np.full(masked.sum(), token)
        np.testing.assert_allclose(-cross_entropy_subs(jnp.asarray(logits)[masked], target, mask_id),
                                   io["log_probs"][masked][:, token], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", some(["dense", "blocked"], 0))
@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_block_causal_stream_equals_published(name, backend):
    model, params, objective, io = published(name)
    ids = io["sample_input"]
    logits = one_stream_logits(model, params, ids, *forward.single_document_rows(ids), rule="block_causal",
                               block_size=objective.block_size, sigma=published_sigma(model, io),
                               execution=Execution(backend, "unroll", "none", False))
    np.testing.assert_allclose(logits, io["sample_logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", some(["dense", "blocked"], 0))
def test_autoregression_equals_published(backend):
    model, params, _, io = published("ar")
    logits = one_stream_logits(model, params, io["x0"], *forward.single_document_rows(io["x0"]), rule="causal",
                               block_size=1, execution=Execution(backend, "scan", "none", False))
    np.testing.assert_allclose(logits, io["logits"], atol=TOLERANCE, rtol=0)
    log_probs = jax.nn.log_softmax(jnp.where(jnp.arange(67) == io["mask_id"], -jnp.inf, logits))
    real = np.arange(67) != io["mask_id"]
    np.testing.assert_allclose(log_probs[..., real], io["log_probs"][..., real], atol=TOLERANCE, rtol=0)
    nll = -np.take_along_axis(np.asarray(log_probs)[:, :-1], io["x0"][:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, io["token_nll"], atol=TOLERANCE, rtol=0)


def test_score_network_equals_published():
    model, params, objective, io = published("sedd")
    logits = one_stream_logits(model, params, io["xt"], *forward.single_document_rows(io["xt"]), rule="bidirectional",
                               block_size=objective.block_size, sigma=io["sigma"][:, None])
    np.testing.assert_allclose(logits, io["logits"], atol=TOLERANCE, rtol=0)


def test_one_block_a_row_is_plain_masked_diffusion():
    model, params = network()
    x0 = make_ids(2, 12)
    xt, rows = masked_somewhere(x0), forward.single_document_rows(x0)
    blocks = two_stream_logits(model, params, xt[:, None], x0, *rows, block_size=12)[:, 0]
    plain = one_stream_logits(model, params, xt, *rows, rule="bidirectional", block_size=12)
    np.testing.assert_allclose(blocks, plain, atol=1e-5)


@pytest.mark.ci_slow
def test_bound_at_block_size_one_is_the_chain_rule():
    """The oracle feeds one token at a time through the cache and asks a mask token for the next."""
    model, params = network()
    length, x0 = 9, make_ids(2, 9)
    rows = forward.single_document_rows(x0)
    objective = Masked.uniform_counts(1)
    noised = objective.corrupt(jax.random.key(0), x0, rows[1], noise_samples=1, mask_id=MASK, end_id=-1)
    logits = two_stream_logits(model, params, noised.xt_BxMxL, x0, *rows, block_size=1)
    nats = cross_entropy_subs(logits.reshape(-1, 31), x0.reshape(-1), MASK).reshape(2, length)
    bound = np.sum(noised.weight_BxMxL[:, 0] * nats, axis=-1)

    @jax.jit
    def ask(cache, asked, before, write_at):
        out = trunk.decode(model, params, asked, before, cache, write_at, block_size=1,
                           execution=Execution("dense", "scan", "none", False))
        return trunk.logits(model, params, out.noised)[:, 0, 0], out.cache

    cache, before, chain = trunk.new_cache(model, params, 2, length, "compute"), None, np.zeros(2)
    for i in range(length):
        place = np.full((2, 1), i, np.int32)
        ones = np.ones_like(place)
        logits, cache = ask(cache, Stream(np.full((2, 1, 1), MASK), place, place, ones), before, max(i - 1, 0))
        odds = np.exp(np.asarray(logits, np.float64))[:, :MASK]
        chain -= np.log(odds[np.arange(2), x0[:, i]] / odds.sum(-1))
        before = Stream(x0[:, i:i + 1], place, place, ones)
    np.testing.assert_allclose(bound, chain, rtol=1e-5)


@pytest.mark.parametrize("backend", some(["dense", "blocked"], 1))
def test_padded_and_packed_rows_equal_plain_ones(backend):
    model, params = network()
    execution = Execution(backend, "scan", "none", False)
    run = functools.partial(two_stream_logits, model, params, block_size=4, execution=execution)
    first, second = make_ids(20)[:8], make_ids(20)[8:]
    documents = [(ids, masked_somewhere(ids)) for ids in (first, second)]
    plain = [run(xt[None, None], x0[None], *forward.single_document_rows(x0[None]))[0, 0] for x0, xt in documents]

    x0, xt = (np.concatenate(pair) for pair in zip(*documents))
    lengths = [8, 12, 4]
    position = np.concatenate([np.arange(n) for n in lengths])[None]
    segment = np.repeat([1, 2, 0], lengths)[None]
    junk = np.full(4, 5)
    packed = run(np.concatenate([xt, junk])[None, None], np.concatenate([x0, junk])[None], position, segment)[0, 0]
    np.testing.assert_allclose(packed[:8], plain[0], atol=1e-5)
    np.testing.assert_allclose(packed[8:20], plain[1], atol=1e-5)

    left = np.concatenate([junk, first])  # padded on the left
    position, segment = np.concatenate([np.zeros(4, int), np.arange(8)]), np.repeat([0, 1], [4, 8])
    padded = run(np.concatenate([junk, documents[0][1]])[None, None], left[None], position[None], segment[None])[0, 0]
    np.testing.assert_allclose(padded[4:], plain[0], atol=1e-5)


@pytest.mark.parametrize("backend", some(["dense", "blocked"], 1))
def test_views_equal_separate_passes(backend):
    model, params = network(time_conditioning=True)
    x0 = make_ids(2, 12)
    xt = masked_somewhere(np.repeat(x0[:, None], 3, axis=1))
    sigma = np.random.default_rng(3).uniform(0.1, 2, size=(2, 3, 3)).astype(np.float32)
    execution = Execution(backend, "scan", "none", False)
    run = functools.partial(two_stream_logits, model, params, block_size=4, execution=execution)
    together = run(xt, x0, *forward.single_document_rows(x0), sigma=sigma)
    for view in range(3):
        one = slice(view, view + 1)
        alone = run(xt[:, one], x0, *forward.single_document_rows(x0), sigma=sigma[:, one])
        np.testing.assert_allclose(together[:, one], alone, atol=1e-5)


def changed_blocks(first, second):
    """Which blocks of 4 differ between two outputs [1, 1, 12, V]."""
    return np.any(np.asarray(first != second).reshape(3, -1), axis=-1).tolist()


@pytest.mark.ci_slow
def test_noise_level_acts_on_its_own_block():
    model, params = network(time_conditioning=True)
    x0 = make_ids(1, 12)
    xt, rows = masked_somewhere(x0)[:, None], forward.single_document_rows(x0)
    run = functools.partial(two_stream_logits, model, params, xt, x0, *rows, block_size=4)
    level = np.full((1, 1, 3), 0.5, np.float32)
    base = run(sigma=level, clean_sigma=np.zeros((1, 1), np.float32))
    np.testing.assert_allclose(run(sigma=level), base, atol=1e-5)  # the clean stream's level is 0 unless given

    noised_changed = run(sigma=np.array([[[0.5, 1.5, 0.5]]], np.float32), clean_sigma=np.zeros((1, 1), np.float32))
    assert changed_blocks(noised_changed, base) == [False, True, False]
    clean_changed = run(sigma=level, clean_sigma=np.ones((1, 1), np.float32))
    assert changed_blocks(clean_changed, base) == [False, True, True]


def test_plain_rows():
    position, segment = forward.single_document_rows(make_ids(2, 3))
    np.testing.assert_array_equal(position, [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(segment, np.ones((2, 3)))
