"""LLaDA: its loss against the likelihood of an enumerated law, cut rows, pairs, and answers by hand."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import stats
from toy_law import LENGTH, ToyLaw

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.llada import LLaDA

LAW, MASK, END = ToyLaw(), 99, 77
PLAIN = LLaDA(block_size=LENGTH, complement=False, random_length=0.0, sft=False, normalise="tokens")
ANSWERS = dataclasses.replace(PLAIN, block_size=4, sft=True)
corrupt = jax.jit(LLaDA.corrupt, static_argnums=(0, 4, 5, 6))


def draw(objective, segment_BxL, noise_samples, seed=0, **more):
    tokens_BxL = np.broadcast_to(np.arange(segment_BxL.shape[1]), segment_BxL.shape)
    noised = corrupt(objective, jax.random.key(seed), tokens_BxL, segment_BxL, noise_samples, MASK, END, **more)
    masked_BxMxL = np.asarray(noised.xt_BxMxL) == MASK
    t_BxMx1 = 1 - np.exp(-np.asarray(noised.sigma_BxMxK, np.float64))
    return masked_BxMxL, np.asarray(noised.weight_BxMxL, np.float64), t_BxMx1


def nats_of_masks(size):
    """Expected loss of every text and mask pattern `[16]` under exact conditionals: summed cross-entropies, meaned."""
    table = np.zeros(2**LENGTH)
    for pattern in range(1, 2**LENGTH):
        hidden = {i for i in range(LENGTH) if pattern >> i & 1}
        for start in range(0, LENGTH, size):
            inside = hidden & set(range(start, start + size))
            if inside:
                table[pattern] += LAW.mean(LAW.masked_nats(inside, size))
    return table


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("complement", [False, True])
def test_its_mean_is_the_likelihood_at_every_block_size(size, complement):
    """Losses of all masks of the toy are enumerated; the draws say how often each comes and with which weight."""
    rows, noise_samples = 2**15, 2
    objective = dataclasses.replace(PLAIN, block_size=size, complement=complement)
    masked, weight, t = draw(objective, np.ones((rows, LENGTH), np.int32), noise_samples)
    np.testing.assert_allclose(weight, np.where(masked, 1 / t, 0), rtol=1e-2)  # t comes from a float32 level
    pattern = (masked * 2**np.arange(LENGTH)).sum(-1)
    loss = (weight.max(-1) * nats_of_masks(size)[pattern]).mean(1)
    assert abs(loss.mean() - LAW.mean(LAW.nats)) < 4 * loss.std() / np.sqrt(rows)
    assert objective.is_bound


def test_masks_are_independent_given_the_level_of_the_row():
    """Chi-square of the number of masked tokens: t ~ U(0, 1) makes every number of n equally likely."""
    masked, _, t = draw(PLAIN, np.ones((4096, LENGTH), np.int32), 1)
    counts = np.bincount(masked[:, 0].sum(-1), minlength=LENGTH + 1)
    assert stats.chisquare(counts).pvalue > 1e-4
    strata = np.sort(np.floor(t[:, 0, 0] * 4096 + 1e-3))
    assert np.abs(strata - np.arange(4096)).max() <= 1  # one level in each stratum, over all rows


def test_pairs_cover_each_token_once():
    segment = (np.arange(12) < np.array([12, 5, 1])[:, None]).astype(np.int32)
    masked, weight, t = draw(dataclasses.replace(PLAIN, block_size=12, complement=True), segment, 4)
    for first in (0, 2):
        np.testing.assert_array_equal(masked[:, first].astype(int) + masked[:, first + 1], segment)
    np.testing.assert_allclose(t[:, 1], 1 - t[:, 0], atol=1e-6)
    assert np.all((weight > 0) == masked)
    with pytest.raises(UserError, match="noise_samples is 3, diffusion.complement needs an even number"):
        draw(dataclasses.replace(PLAIN, block_size=12, complement=True), segment, 3)


def prepare_batch(objective, seed, batch):
    return {name: np.asarray(x) for name, x in objective.prepare_batch(jax.random.key(seed), batch, END).items()}


def rows_of(segment_BxL, **more):
    place = np.broadcast_to(np.arange(segment_BxL.shape[1]), segment_BxL.shape)
    return {"tokens": place + 10, "positions": place, "segments": segment_BxL, **more}


def test_random_lengths_cut_whole_batches():
    """One length a batch, uniform, in the stated part of the batches; a function of the key alone."""
    objective, length = dataclasses.replace(PLAIN, random_length=0.25), 8
    batch = rows_of(np.ones((3, length), np.int32))
    cut = jax.jit(jax.vmap(lambda key: objective.prepare_batch(key, batch, END)["segments"]))
    segments = np.asarray(cut(jax.random.split(jax.random.key(0), 4096)))
    kept = segments.sum(-1)
    assert np.all(kept == kept[:, :1]) and np.all(np.diff(segments, axis=-1) <= 0)
    expected = 4096 * (np.full(length, 0.25 / length) + 0.75 * (np.arange(length) == length - 1))
    assert stats.chisquare(np.bincount(kept[:, 0], minlength=length + 1)[1:], expected).pvalue > 1e-4
    assert prepare_batch(PLAIN, 0, batch)["segments"].all()


PROMPT = np.array([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]])
SEGMENT = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)


def test_padding_becomes_end_tokens_of_the_answer():
    batch = rows_of(SEGMENT, prompt=PROMPT)
    batch["positions"] = np.where(SEGMENT, batch["positions"], 0)  # whatever padding holds
    done = prepare_batch(ANSWERS, 0, batch)
    np.testing.assert_array_equal(done["tokens"][0], [10, 11, 12, 13, 14, END, END, END])
    np.testing.assert_array_equal(done["positions"], np.tile(np.arange(8), (3, 1)))
    assert np.all(done["segments"] == 1)
    np.testing.assert_array_equal(done["prompt"], PROMPT != 0)
    np.testing.assert_array_equal(done["tokens"][1:], batch["tokens"][1:])


@pytest.mark.parametrize("normalise", ["tokens", "answer"])
def test_normalisations(normalise):
    """The loss of the step, sum of weight * nats / (copies * tokens), against LLaDA's formulas by hand."""
    noise_samples, nats = 3, np.random.default_rng(0).exponential(size=(3, 3, 8))
    objective = dataclasses.replace(ANSWERS, normalise=normalise)
    segment = np.ones_like(SEGMENT)
    masked, weight, t = draw(objective, segment, noise_samples, prompt=PROMPT)
    assert not masked[np.broadcast_to(PROMPT[:, None] == 1, masked.shape)].any() and masked[2, :, 7].any()
    step = (weight * nats).sum() / (noise_samples * segment.sum())
    of_rows = (masked * nats / t).sum((1, 2)) / noise_samples
    lengths = np.array([5, 7, 1])
    by_hand = of_rows.sum() / lengths.sum() if normalise == "tokens" else (of_rows / lengths).mean()
    assert step == pytest.approx(by_hand, rel=1e-4)
    assert not objective.is_bound and objective.extra_batch_keys == ("prompt",) and PLAIN.extra_batch_keys == ()


@pytest.mark.parametrize(("changes", "message"), [
    ({"random_length": 1.5}, "random_length is 1.5, expected 0 to 1"),
    ({"normalise": "rows"}, "normalise is 'rows', expected 'tokens' or 'answer'"),
    ({"normalise": "answer"}, "needs answers: use 'tokens'"),
    ({"sft": True, "random_length": 0.01}, "would cut answers: use 0"),
    ({"block_size": 0}, "block_size is 0"),
])
def test_bad_input(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **changes)
