"""Likelihood of continuations against enumeration and the chain rule, masks that depend on nothing but their place."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from scipy.special import log_softmax
from toy_lm import CONTEXT, END, LETTERS, MASK, make_ids, make_lm, masked

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.tokenizers import ByteTokenizer, train_bpe
from bd3lm_jax.diffusion import AR
from bd3lm_jax.likelihood import conditional
from bd3lm_jax.scoring.score import SpecialIds

OPTIONS = {"estimator": "exact_count", "draws": 2, "seed": 0, "greedy": False, "batch": 8}
PAIRS = [(0, 4), (2, 3), (5, 6), (4, 1), (3, 9), (14, 10)]  # tokens of prompts and continuations


def pair(prompt, continuation, seed=3):
    ids = make_ids(prompt + continuation, seed=seed)
    return ids[:prompt], ids[prompt:]


def score(lm, pairs, **options):
    return conditional.score(lm, *zip(*pairs), **{**OPTIONS, **options})


def log_p(lm, xt, x0, **kwargs):
    """Log-probabilities `[L, V]` of one row in the two-stream pass, the mask token excluded."""
    return log_softmax(np.asarray(lm.logits(xt[None], x0[None], **kwargs)[0], np.float64)[:, :MASK], -1)


def canvas(lm, prompt, continuation):
    """The text, and masks after it (blocks that begin there are seen by nobody); the scored places of every block."""
    size, whole = lm.config.block_size, np.concatenate([prompt, continuation])
    text = np.pad(whole, (0, CONTEXT - len(whole)), constant_values=MASK)
    places = np.arange(len(prompt), len(whole))
    return text, [places[places // size == block] for block in np.unique(places // size)]


def enumerated(lm, prompt, continuation):
    """The bound by its definition, in nats."""
    text, blocks = canvas(lm, prompt, continuation)
    total = 0.0
    for places in blocks:
        for k in range(1, len(places) + 1):
            for chosen in itertools.combinations(places, k):
                xt = text.copy()
                xt[list(chosen)] = MASK
                found = log_p(lm, xt, text)
                total -= sum(found[i, text[i]] for i in chosen) / k / math.comb(len(places), k)
    return total


@pytest.mark.parametrize("lengths", PAIRS)
def test_all_masks_are_the_enumerated_bound(lengths):
    lm, given = make_lm(masked(4)), pair(*lengths)
    found, = score(lm, [given], estimator="exact")
    assert found.nats == pytest.approx(-enumerated(lm, *given), rel=1e-5)
    assert found.mc_se == 0 and found.tokens == lengths[1] and found.greedy is None


@pytest.mark.parametrize("lengths", [(2, 3), (5, 6), (3, 9)])
def test_drawn_masks_are_unbiased(lengths):
    """Sampled error bars: 4 standard errors of 400 estimates, and small beside the number itself."""
    lm, given = make_lm(masked(4)), pair(*lengths)
    found, = score(lm, [given], draws=200)
    assert abs(found.nats + enumerated(lm, *given)) < 4 * found.mc_se < 0.03 * abs(found.nats)


@pytest.mark.ci_slow
def test_one_block_as_long_as_the_context():
    lm, given = make_lm(masked(CONTEXT)), pair(9, 4)
    found, = score(lm, [given], draws=100)
    assert abs(found.nats + enumerated(lm, *given)) < 4 * found.mc_se < 0.1 * abs(found.nats)


@pytest.mark.ci_slow
def test_a_network_that_sees_the_noise_level():
    """Two scored tokens of the second block: the level given k of 2 masked has law Beta(k, 3 - k), by quadrature."""
    lm, given = make_lm(masked(4), time_conditioning=True), pair(4, 2)
    text, _ = canvas(lm, *given)
    total, t = 0.0, (np.arange(32) + 0.5) / 32
    for chosen in ([4], [5], [4, 5]):
        xt = text.copy()
        xt[chosen] = MASK
        density = 2 * t if len(chosen) == 2 else 2 * (1 - t)
        for level, weight in zip(t, density / density.sum()):
            found = log_p(lm, xt, text, sigma=[[-math.log1p(-level)] * 6])
            total -= weight * sum(found[i, text[i]] for i in chosen) / 2  # 1/2 is 1 / (k C(2, k)) for both k
    found, = score(lm, [given], draws=200)
    assert abs(found.nats + total) < 4 * found.mc_se + 1e-3 and found.mc_se < 0.01 * total


@pytest.mark.ci_slow
def test_error_bars_are_the_spread_over_seeds():
    lm, given = make_lm(masked(4)), pair(3, 9)
    found = [score(lm, [given], draws=4, seed=seed)[0] for seed in range(100)]
    spread = np.std([x.nats for x in found], ddof=1)
    assert 0.75 < np.sqrt(np.mean([x.mc_se**2 for x in found])) / spread < 1.33


@pytest.mark.parametrize("bos", some([False, True], 1))
def test_autoregression_is_the_chain_rule(bos):
    lm, given = make_lm(AR(bos=bos), tokenizer=LETTERS), [pair(5, 6), pair(1, 3)] + [pair(0, 4)] * bos
    for (prompt, continuation), found in zip(given, score(lm, given)):
        whole = np.concatenate([[END] * bos, prompt, continuation]).astype(np.int32)
        logits = np.asarray(lm.logits(whole[None, :-1])[0], np.float64)[-len(continuation):, :MASK]
        expected = log_softmax(logits, -1)[np.arange(len(continuation)), continuation].sum()
        assert found.nats == pytest.approx(expected, rel=1e-5) and found.mc_se == 0
        assert found.greedy == (logits.argmax(-1) == continuation).all()


def test_blocks_of_one_token_are_the_chain_rule():
    lm, (prompt, continuation) = make_lm(masked(1)), pair(5, 6)
    whole = np.concatenate([prompt, continuation])
    found = log_p(lm, np.full_like(whole, MASK), whole)[np.arange(5, 11), continuation].sum()
    assert score(lm, [(prompt, continuation)])[0] == (pytest.approx(found, rel=1e-5), 0.0, 6, False)


@pytest.mark.ci_slow
@pytest.mark.parametrize("objective", some([masked(4), AR(bos=True)], 0))
def test_scores_do_not_depend_on_batch_order_or_padding(objective, monkeypatch):
    lm, lengths = make_lm(objective, tokenizer=LETTERS), [(2, 3), (3, 9), (5, 7), (14, 10)]
    given = [pair(*x, seed=i) for i, x in enumerate(lengths)]
    expected = np.array([x.nats for x in score(lm, given)])
    order = np.random.default_rng(0).permutation(len(given))
    shuffled = np.array([x.nats for x in score(lm, [given[i] for i in order], batch=2)])
    np.testing.assert_allclose(shuffled, expected[order], rtol=1e-5)
    monkeypatch.setattr(conditional, "LEAST_ROW", 4)
    monkeypatch.setattr(conditional, "LEAST_SCORED", 1)
    np.testing.assert_allclose([score(lm, [x])[0].nats for x in given], expected, rtol=1e-5)
    if not objective.causal:
        assert np.abs([x.nats for x in score(lm, given, seed=1)] - expected).max() > 0.1


@functools.partial(jax.jit, static_argnums=3)
def draw_masks(key, index, segments_L, size=4):
    keyed = conditional.PositionKeyed(dataclasses.replace(masked(size), complement=True))
    noised = keyed.noised(key, index, 1, jnp.zeros(24, int), segments_L, SpecialIds(MASK, END))
    return noised.xt_BxMxL == MASK


def hidden(start, stop, prompt_noise=7, index=0, size=4):
    """Which places are masked in every copy, bool `[M, L]`, for a continuation at start..stop-1."""
    segments = (np.arange(24) >= start) & (np.arange(24) < stop)
    return np.asarray(draw_masks(jax.random.key(prompt_noise), index, segments.astype(np.int32), size))


def test_continuations_of_a_prompt_share_their_masks():
    short, long = hidden(6, 13), hidden(6, 19)
    np.testing.assert_array_equal(short[:, :12], long[:, :12])  # whole blocks of both
    np.testing.assert_array_equal(hidden(2, 9)[:, :8], long[:, 4:12])  # places count from the first block on
    assert np.any(hidden(3, 10)[:, 3:10] != hidden(2, 9)[:, 2:9])  # other tokens in a block: other masks
    assert np.any(long != hidden(6, 19, prompt_noise=8)) and np.any(long != hidden(6, 19, index=1))
    assert not long[:, :6].any() and not long[:, 19:].any()
    pairs = np.concatenate([hidden(0, 24, index=i)[::2] for i in range(6)])
    assert len(np.unique(pairs, axis=0)) == 12  # two in each of six draws, all of them independent
    np.testing.assert_array_equal(long[::2] | long[1::2], long.any(0, keepdims=True).repeat(2, 0))  # complements


@pytest.mark.parametrize("start", [3, 8, 15])
def test_in_one_block_a_row_every_shift_shares_the_masks(start):
    shifted = hidden(start, start + 7, size=24)[:, start:start + 7]
    np.testing.assert_array_equal(shifted, hidden(2, 9, size=24)[:, 2:9])


def test_levels_spread_over_blocks():
    """Masked tokens of a long continuation hardly vary: the standard deviation of independent counts would be 2.7."""
    totals = [hidden(0, 24, prompt_noise=i)[::2].sum(-1) for i in range(40)]
    assert np.std(totals) < 1.6 and abs(np.mean(totals) - 15) < 0.8


def test_choice_is_paired():
    """Options that differ in their last token: what the masks of the others cost cancels."""
    lm, (prompt, option) = make_lm(masked(4)), pair(6, 8)
    other = np.append(option[:-1], (option[-1] + 1) % MASK)
    options = {"estimator": "exact_count", "draws": 8, "seed": 0, "batch": 8}
    found = conditional.choose(lm, prompt, [option, other], normalise="none", **options)
    truth = enumerated(lm, prompt, other) - enumerated(lm, prompt, option)
    assert found.index == (truth < 0) and abs(found.margin - abs(truth)) < 5 * found.margin_se
    assert found.scores == score(lm, [(prompt, option), (prompt, other)], draws=8)
    assert found.margin == pytest.approx(abs(found.scores[0].nats - found.scores[1].nats), rel=1e-5)
    independent = math.hypot(*(x.mc_se for x in found.scores))
    assert found.margin_se < 0.7 * independent


@pytest.mark.ci_slow
def test_normalisation():
    lm, prompt = make_lm(masked(4), tokenizer=LETTERS), "abc"
    options = ["de", "fghij", "klabcd"]
    nats = np.array([x.nats for x in score(lm, [(prompt, x) for x in options], estimator="exact")])
    for normalise in ("none", "token", "byte"):  # a byte a token
        found = conditional.choose(lm, prompt, options, normalise=normalise, estimator="exact", draws=1, seed=0,
                                   batch=4)
        value = nats / (1 if normalise == "none" else [2, 5, 6])
        assert found.index == np.argmax(value)
        assert found.margin == pytest.approx(np.sort(value)[-1] - np.sort(value)[-2]) and found.margin_se == 0
    ids = [LETTERS.encode(x) for x in options]
    again = conditional.choose(lm, LETTERS.encode(prompt), ids, normalise="byte", estimator="exact", draws=1, seed=0,
                               batch=4)
    assert (again.index, again.margin) == (found.index, pytest.approx(found.margin))


# ---- texts


def test_white_space_moves_and_tokens_are_those_of_the_whole_text():
    tokenizer = train_bpe("bpe:270", ["the cat sat on the mat and the cat sat on the hat"] * 3)
    prompt, continuation = conditional.encode_pair(tokenizer, "the cat \n", "sat on")
    assert tokenizer.decode(prompt) == "the cat" and tokenizer.decode(continuation) == " \nsat on"
    np.testing.assert_array_equal(np.concatenate([prompt, continuation]), tokenizer.encode("the cat \nsat on"))
    assert [len(x) for x in conditional.encode_pair(tokenizer, "", "the")] == [0, len(tokenizer.encode("the"))]


def test_a_token_across_the_border_is_the_continuations():
    class Pairs:
        def encode(self, text):
            return np.array([len(text[i:i + 2]) for i in range(0, len(text), 2)])

    assert [len(x) for x in conditional.encode_pair(Pairs(), "abc", "d")] == [1, 1]
    assert [len(x) for x in conditional.encode_pair(Pairs(), "ab", "cd")] == [1, 1]


@pytest.mark.ci_slow
def test_texts_and_ids_score_alike():
    lm = make_lm(masked(4), tokenizer=LETTERS)
    texts, ids = (score(lm, [x], estimator="exact")[0] for x in [("abce", "fgh"), ([0, 1, 2, 4], [5, 6, 7])])
    assert texts == ids and len(conditional.encode_pair(ByteTokenizer(), "é", "é")[1]) == 2


@pytest.mark.parametrize(("prompt", "continuation", "message"), [
    ("abc", "", "a continuation is empty"),
    ([1, 2], [], "a continuation is empty"),
    ("abc" * 7, "abcd", "have 21 [+] 4 tokens, expected at most 24"),
    ([1, MASK], [3], "hold the mask token 12"),
    ([1], [3, MASK], "hold the mask token 12"),
    ([1], [13], "token id 13 is out of range, expected 0 to 12"),
    ([1], [0.5], "type float64, expected a list of integers"),
    ("abc", [1], "a text and a list of ids, expected two of the same kind"),
    ([1], "abc", "a text and a list of ids, expected two of the same kind"),
])
def test_bad_pairs(prompt, continuation, message):
    with pytest.raises(UserError, match=message):
        score(make_lm(masked(4), tokenizer=LETTERS), [(prompt, continuation)])


@pytest.mark.parametrize(("options", "message"), [
    ({"draws": 0}, "draws is 0"),
    ({"batch": 0}, "batch is 0"),
    ({"estimator": "bernoulli"}, "'bernoulli' does not score continuations"),
    ({"estimator": "nll"}, "'nll' is exact only for AR"),
])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        score(make_lm(masked(4)), [pair(2, 3)], **options)


def test_other_wrong_requests():
    options = {"estimator": "exact", "draws": 1, "seed": 0, "batch": 4}
    lm = make_lm(masked(4))
    with pytest.raises(UserError, match="no beginning token"):
        score(make_lm(AR(bos=False), tokenizer=LETTERS), [pair(0, 3)])
    with pytest.raises(UserError, match="an equally long list of continuations, got 2 of them and 1 of them"):
        conditional.score(lm, [[1], [2]], [[3]], **OPTIONS)
    with pytest.raises(UserError, match="no tokenizer: give prompts and continuations as lists"):
        score(lm, [("ab", "c")])
    with pytest.raises(UserError, match="expected a list of two or more"):
        conditional.choose(lm, [1], [[2]], normalise="none", **options)
    with pytest.raises(UserError, match="unknown normalisation 'bytes': did you mean 'byte'"):
        conditional.choose(lm, [1], [[2], [3]], normalise="bytes", **options)
    with pytest.raises(UserError, match="options have no bytes"):
        conditional.choose(lm, [1], [[2], [3]], normalise="byte", **options)
