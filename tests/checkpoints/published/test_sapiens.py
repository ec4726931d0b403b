"""A real masked language model (RoBERTa on human antibody heavy chains, 4 layers of 128; MIT licence beside it): its
masked-token accuracy on a published sequence, and the bound that it gives before any adaptation."""

import functools

import numpy as np
import pytest
from grids import some
from places import DATA
from scipy.special import log_softmax
from scipy.stats import t

import bd3lm_jax
from bd3lm_jax.data.tokenizers import tokenizer_of

DIRECTORY = DATA / "sapiens_vh"
TRASTUZUMAB = ("EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSR"
               "WGGDGFYAMDYWGQGTLVTVSS")
BEGIN, END, MASK, MASKINGS = 0, 2, 24, 20


@functools.cache
def model():
    return bd3lm_jax.load(str(DIRECTORY))


def row():
    return np.concatenate([[BEGIN], tokenizer_of(DIRECTORY).encode(TRASTUZUMAB), [END]])


def masked_scores(rate):
    """Accuracy and cross-entropy in nats at the masked places, of each of the maskings."""
    draw, x0 = np.random.default_rng(0), np.tile(row(), (MASKINGS, 1))
    masked = np.zeros(x0.shape, bool)
    for i in range(MASKINGS):
        masked[i, 1 + draw.permutation(len(TRASTUZUMAB))[:round(rate * len(TRASTUZUMAB))]] = True
    logits = np.asarray(model().logits(np.where(masked, MASK, x0)), np.float64)
    nats = -np.take_along_axis(log_softmax(logits, -1), x0[..., None], -1)[..., 0]
    hit = logits.argmax(-1) == x0
    return [np.array([values[i][masked[i]].mean() for i in range(MASKINGS)]) for values in (hit, nats)]


@pytest.mark.parametrize("rate, accuracy, nats", some([(0.15, 0.73, 1.14), (0.5, 0.76, 1.09)], 0))
def test_masked_tokens_as_measured_with_the_published_code(rate, accuracy, nats):
    """Both are means over 20 random maskings: the interval is that of their difference. Random weights: .05, 3.28."""
    for found, published in zip(masked_scores(rate), (accuracy, nats)):
        margin = t.ppf(0.975, 2 * (MASKINGS - 1)) * np.sqrt(2 / MASKINGS) * found.std(ddof=1)
        assert margin < 0.25 and abs(found.mean() - published) < margin


@pytest.mark.ci_slow
def test_the_bound_before_adaptation():
    """Above what a token costs at half masked, as it was trained with few masks; far below 20 equal letters."""
    x0 = row()[None]
    weights = np.ones(x0.shape)
    weights[0, [0, -1]] = 0
    found = model().nll(x0, weights=weights, draws=32)
    low, high = found.ci95
    assert 1.1 < low < found.mean < high < np.log(20)
