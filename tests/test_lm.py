"""The facade: published logits, the contract of `logits`, likelihood against enumeration and the chain rule."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN
from scipy.special import log_softmax
from toy_lm import END, LETTERS, MASK, VOCAB, make_ids, make_lm, masked

import bd3lm_jax
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.generation import stream
from bd3lm_jax.generation.denoise import BlockDenoiser
from bd3lm_jax.generation.options import make_options
from bd3lm_jax.generation.sampling.generate import PreviousBlock


def nats(logits_NxV, targets_N):
    """-log p, the mask token excluded."""
    return -log_softmax(np.asarray(logits_NxV, np.float64)[..., :MASK], -1)[np.arange(len(targets_N)), targets_N]


# Logits


@functools.cache
def published(name):
    return bd3lm_jax.load(str(GOLDEN / name)), dict(np.load(GOLDEN / name / "io.npz"))


@pytest.mark.parametrize("name", ["bd3lm_block4", "bd3lm_time_conditioned", "bd3lm_block32_is_mdlm"])
def test_published_block_models(name):
    lm, io = published(name)
    assert lm.tokenizer is None and lm.context == 32 and lm.special.mask == io["mask_id"]
    logits = lm.logits(io["xt"], io["x0"], sigma=io["sigma"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, io["logits"], atol=2e-5, rtol=0)
    plain = lm.logits(io["sample_input"], sigma=io["sigma"])
    np.testing.assert_allclose(plain, io["sample_logits"], atol=2e-5, rtol=0)


def test_published_autoregression():
    lm, io = published("ar")
    np.testing.assert_allclose(lm.logits(io["x0"]), io["logits"], atol=2e-5, rtol=0)
    per_token = lm.nll(io["x0"]).per_token
    np.testing.assert_allclose(per_token[:, 1:], io["token_nll"], atol=2e-5, rtol=0)
    np.testing.assert_array_equal(per_token[:, 0], 0)


def test_published_score_network():
    lm, io = published("sedd")
    np.testing.assert_allclose(lm.logits(io["xt"], sigma=io["sigma"]), io["logits"], atol=2e-5, rtol=0)


def test_level_of_a_block_acts_on_that_block():
    lm, x0 = make_lm(time_conditioning=True), make_ids(1, 10)  # the last of 3 blocks is cut short
    xt = np.where(np.arange(10) % 2, x0, MASK)
    base = lm.logits(xt, x0, sigma=[[0.5, 0.5, 0.5]])
    assert base.shape == (1, 10, VOCAB)
    for block in range(3):
        sigma = np.full((1, 3), 0.5)
        sigma[0, block] = 1.5
        changed = np.any(np.asarray(lm.logits(xt, x0, sigma=sigma) != base)[0], -1)
        np.testing.assert_array_equal(changed, np.arange(10) // 4 == block)
    # One level for the row is also the level of the clean tokens: only the first block, which reads none, agrees.
    both = np.asarray(lm.logits(xt, x0, sigma=[0.5]))
    np.testing.assert_allclose(both[:, :4], base[:, :4], atol=1e-5)
    assert np.abs(both - base)[:, 4:].max() > 1e-3


@pytest.mark.parametrize("length", [8, 10])
def test_plain_pass_takes_levels_of_row_or_blocks(length):
    lm, ids = make_lm(time_conditioning=True), make_ids(2, length)
    row = lm.logits(ids, sigma=[0.5, 2.0])
    blocks = lm.logits(ids, sigma=np.repeat([[0.5], [2.0]], -(-length // 4), axis=1))
    assert row.shape == (2, length, VOCAB)
    np.testing.assert_allclose(row, blocks, atol=1e-5)
    longer = lm.logits(np.pad(ids, ((0, 0), (0, 4))), sigma=[0.5, 2.0])[:, :length - length % 4]
    np.testing.assert_allclose(row[:, :length - length % 4], longer, atol=1e-5)


def test_levels_are_ignored_where_the_network_takes_none():
    ids = make_ids(1, 8)
    np.testing.assert_array_equal(make_lm().logits(ids, sigma=[0.3]), make_lm().logits(ids))


@pytest.mark.parametrize("arguments, message", [
    (([[0, 13]],), "token id 13 is out of range, expected 0 to 12"),
    (([[0, -1]],), "token id -1 is out of range"),
    (([0, 1],), r"shape \(2,\) and type int64, expected integers \[batch, length\]"),
    (([[0.5]],), "type float64, expected integers"),
    (([[0, 1]], [[0, 1, 2]]), r"x0 has shape \(1, 3\), expected that of xt, \(1, 2\)"),
    (([[0, 1]], [[0, 99]]), "token id 99 is out of range"),
])
def test_bad_ids(arguments, message):
    with pytest.raises(UserError, match=message):
        make_lm().logits(*arguments)


@pytest.mark.parametrize("sigma, message", [
    (None, r"conditioned on the noise level: give sigma = -log\(alpha\)"),
    ([0.5, 0.5], r"sigma has shape \(2,\), expected \(1,\) or \(1, 3\)"),
    ([[0.5, 0.5]], r"sigma has shape \(1, 2\)"),
])
def test_bad_sigma(sigma, message):
    with pytest.raises(UserError, match=message):
        make_lm(time_conditioning=True).logits(make_ids(1, 10), sigma=sigma)


# Likelihood


def enumerated_bound(lm, x0_L):
    """NELBO of one row in nats: for every block the sum over its masked sets M of the integral over mask probability
    p of p^(|M|-1) (1-p)^(n-|M|) sum of -log p(x_i | x0 outside M, earlier blocks) over i in M."""
    size, length = lm.config.block_size, len(x0_L)
    nodes, node_weights = np.polynomial.legendre.leggauss(8)
    rows, levels, terms = [], [], []
    for start in range(0, length, size):
        places = range(start, min(start + size, length))
        for count in range(1, len(places) + 1):
            for chosen in itertools.combinations(places, count):
                for p, weight in zip((nodes + 1) / 2, node_weights / 2):
                    xt = x0_L.copy()
                    xt[list(chosen)] = MASK
                    rows.append(xt)
                    levels.append(p)
                    terms.append((list(chosen), weight * p**(count - 1) * (1 - p)**(len(places) - count)))
    sigma = np.repeat(-np.log1p(-np.array(levels))[:, None], -(-length // size), axis=1)
    logits = np.asarray(lm.logits(np.array(rows), np.tile(x0_L, (len(rows), 1)), sigma=sigma))
    return sum(weight * nats(row[chosen], x0_L[chosen]).sum() for row, (chosen, weight) in zip(logits, terms))


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_bound_agrees_with_enumeration(time_conditioning):
    """5 tokens in blocks of 3: the last block is short."""
    lm, x0 = make_lm(masked(3), time_conditioning), make_ids(5)
    exact = enumerated_bound(lm, x0)
    rows = lm.nll(np.tile(x0, (1000, 1)))
    half = (rows.ci95[1] - rows.ci95[0]) / 2
    assert abs(rows.mean - exact / 5) < 2 * half < 0.05 * exact / 5
    assert rows.per_token.shape == (1000, 5)
    np.testing.assert_allclose(rows.total, 1000 * 5 * rows.mean, rtol=1e-6)


def given_bound(lm, x0_L, scored):
    """The NELBO of the scored places given the others, in nats, by all masks of them: no level, blocks of any
    length."""
    size, total = lm.config.block_size, 0.0
    for start in range(0, len(x0_L), size):
        places = [i for i in range(start, min(start + size, len(x0_L))) if scored[i]]
        for count in range(1, len(places) + 1):
            for chosen in map(list, itertools.combinations(places, count)):
                xt = x0_L.copy()
                xt[chosen] = MASK
                found = nats(np.asarray(lm.logits(xt[None], x0_L[None]))[0][chosen], x0_L[chosen]).sum()
                total += found / count / math.comb(len(places), count)
    return total


@pytest.mark.parametrize("scored", [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
def test_a_prompt_of_weight_0_is_given(scored):
    """5 tokens in blocks of 3, all masks: the bound of the rest after the prompt."""
    lm, x0 = make_lm(masked(3)), make_ids(5)
    found = lm.nll(x0[None], weights=np.array([scored], float), estimator="exact")
    assert found.total == pytest.approx(given_bound(lm, x0, scored), rel=1e-5)
    assert found.mean == pytest.approx(found.total / sum(scored))
    drawn = lm.nll(np.tile(x0, (400, 1)), weights=np.tile(np.array(scored, float), (400, 1)))
    half = (drawn.ci95[1] - drawn.ci95[0]) / 2
    assert abs(drawn.mean - found.mean) < 2 * half + 1e-6


def test_weights_scale_what_is_counted():
    lm, x0 = make_lm(masked(3)), make_ids(5)
    plain, doubled = (lm.nll(x0[None], weights=np.array([[0, w, w, w, w]]), estimator="exact") for w in (1.0, 2.0))
    assert doubled.total == pytest.approx(2 * plain.total) and doubled.mean == pytest.approx(plain.mean)


@pytest.mark.parametrize("call", [
    lambda lm: lm.nll(make_ids(1, 5)), lambda lm: lm.generate([[1]], length=5), lambda lm: lm.generate(length=5),
    lambda lm: lm.score([[1]], [[2]]), lambda lm: lm.score([()], [[2]]), lambda lm: lm.choose([1], [[2], [3]]),
    lambda lm: lm.infill([[1, 2, MASK]]), lambda lm: next(stream.stream(lm, [[1]], 1, 5, make_options()))])
def test_a_beginning_token_that_nothing_names(call):
    """Without tokenizer the id would be -1: the last row of the embedding table."""
    with pytest.raises(UserError, match="reads its end token before the first one") as error:
        call(make_lm(AR(bos=True)))
    assert "\n" not in str(error.value)


@pytest.mark.ci_slow
def test_interval_covers_at_its_rate():
    """300 single rows with their own draws: the 95 % interval holds the truth in 89 to 99 % of them."""
    lm, x0 = make_lm(masked(3)), make_ids(5)
    exact = enumerated_bound(lm, x0) / 5
    covered = 0
    for seed in range(300):
        low, high = lm.nll(x0[None], draws=8, seed=seed).ci95
        covered += low < exact < high
    assert 0.89 < covered / 300 < 0.99


def test_blocks_of_one_token_are_the_chain_rule():
    """The oracle asks a mask token for the next one and keeps a cache."""
    lm, x0 = make_lm(masked(1)), make_ids(2, 7)
    denoiser = BlockDenoiser(lm.model, 1, 6, "compute")
    ask = jax.jit(lambda *args: denoiser(lm.params, *args))
    cache, expected = jax.jit(lambda: denoiser.prefill(lm.params, x0[:, :0], x0[:, :0], 0))(), []
    for i in range(7):
        before = PreviousBlock(x0[:, max(i - 1, 0)][:, None], np.full((2, 1), i > 0))
        logits, cache = ask(np.full((2, 1), MASK), i, before, np.zeros((2, 1), int), np.ones(2), cache)
        expected.append(nats(logits[:, 0], x0[:, i]))
    result = lm.nll(x0, draws=5)
    np.testing.assert_allclose(result.per_token, np.transpose(expected), atol=1e-5)
    np.testing.assert_allclose([result.mean, result.total], [np.mean(expected), np.sum(expected)], rtol=1e-5)
    single = lm.nll(x0[:1], estimator="nll")
    assert single.ci95 == (single.mean, single.mean)  # exact: no draws to be unsure of
    np.testing.assert_array_equal(single.per_token, result.per_token[:1])


@pytest.mark.parametrize("bos", [False, True])
def test_autoregressive_likelihood(bos):
    lm, x0 = make_lm(AR(bos=bos), tokenizer=LETTERS), make_ids(2, 7)
    inputs = np.pad(x0, ((0, 0), (1, 0)), constant_values=END)[:, :-1] if bos else x0[:, :-1]
    logits, targets = np.asarray(lm.logits(inputs)), x0 if bos else x0[:, 1:]
    expected = np.stack([nats(*row) for row in zip(logits, targets)])
    result = lm.nll(x0)
    np.testing.assert_allclose(result.per_token[:, 7 - targets.shape[1]:], expected, atol=1e-5)
    np.testing.assert_allclose(result.mean, expected.mean(), rtol=1e-5)
    if not bos:
        np.testing.assert_array_equal(result.per_token[:, 0], 0)


def test_weights_choose_tokens():
    lm, x0 = make_lm(), make_ids(3, 10)
    weights = np.random.default_rng(0).integers(0, 3, size=x0.shape)
    weights[:, 0] = 1  # no prompt
    plain, weighted = lm.nll(x0, draws=2), lm.nll(x0, weights=weights, draws=2)
    np.testing.assert_allclose(weighted.per_token, plain.per_token * weights, rtol=1e-6)
    np.testing.assert_allclose(weighted.total, (plain.per_token * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(weighted.mean, weighted.total / weights.sum(), rtol=1e-6)


def test_rows_keep_their_noise_in_other_batches():
    lm, x0 = make_lm(), make_ids(3, 10)
    few, many = lm.nll(x0[:2], seed=4).per_token, lm.nll(x0, seed=4).per_token
    np.testing.assert_allclose(few, many[:2], atol=1e-5)
    assert np.abs(lm.nll(x0, seed=5).per_token - many).max() > 0.1


@pytest.mark.parametrize("options, message", [
    ({"estimator": "nll"}, "exact only for AR and for block size 1 .* this model has block size 4"),
    ({"estimator": "exactcount"}, "unknown estimator 'exactcount'"),
    ({"draws": 0}, "draws is 0, expected at least 1"),
    ({"weights": np.ones((1, 3))}, r"weights have shape \(1, 3\), expected that of tokens, \(2, 8\)"),
    ({"weights": np.zeros((2, 8))}, "nothing to average"),
])
def test_bad_likelihood_options(options, message):
    with pytest.raises(UserError, match=message):
        make_lm().nll(make_ids(2, 8), **options)


# Loading


def test_load_names_what_is_not_a_model(tmp_path):
    with pytest.raises(UserError, match="no run directory .*nowhere"):
        bd3lm_jax.load(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        bd3lm_jax.load(str(tmp_path))
