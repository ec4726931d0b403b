"""Scored and given tokens: what the evaluator makes of the rows of windows.py, against scores by hand."""

import itertools
import math

import numpy as np
import pytest
from grids import some
from toy_lm import END, MASK, make_ids, make_lm, masked
from toy_runs import toy_config

from bd3lm_jax.data.windows import ConditionedRows, Windows
from bd3lm_jax.diffusion import AR
from bd3lm_jax.likelihood.evaluate import Evaluator
from bd3lm_jax.likelihood.options import EstimatorOptions
from bd3lm_jax.parallel import sharding
from bd3lm_jax.scoring.score import SpecialIds

LENGTH = 24


class Lines:
    """Wrapped rows of one document of 60 letters, which ends with the end token."""

    length, tokens_N = LENGTH, np.append(make_ids(59), END)
    tokens_N[:-1][tokens_N[:-1] == END] = 5
    meta = {"bytes": 60, "tokens": 60, "documents": 1, "layout": "wrap", "rows": 3, "hash": ""}

    def __len__(self):
        return 3

    def tokens(self, ids):
        return np.append(self.tokens_N, np.full(12, END)).reshape(3, LENGTH)[ids].astype(np.int32)

    def documents(self, ids):
        return np.repeat([0, -1], [60, 12]).reshape(3, LENGTH)[ids]

    def sizes(self, ids):
        return (self.documents(ids) >= 0).astype(np.float64)


def evaluator(tmp_path, objective):
    lm = make_lm(objective)
    config = toy_config(tmp_path, {"eval.batch_size": 4})
    object.__setattr__(config, "diffusion", objective)
    object.__setattr__(config, "model", lm.config.model)
    return lm, Evaluator(config, lm.model, SpecialIds(MASK, END), sharding.make_mesh(config.mesh), 4, config.execution)


def by_hand(lm, stride, first):
    """Nats of the scored tokens, window after window, from the raw logits of an autoregressive model."""
    text, nats, done = Lines.tokens_N, [], 0
    while done < len(text):
        start = max(0, done + stride - LENGTH) if done else 0
        window = text[start:start + LENGTH]
        inputs = np.concatenate([[END], window[:-1]])[None]
        log_p = np.asarray(lm.logits(inputs)[0], np.float64)
        log_p[:, MASK] = -np.inf
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        scores = -log_p[np.arange(len(window)), window]
        nats.extend(scores[done - start + (first and done == start):])
        done = start + len(window)
    return np.array(nats)


@pytest.mark.parametrize("stride", some([6, 24], 0))
@pytest.mark.parametrize("first", [False, True])
def test_sliding_windows_of_an_autoregressive_model(tmp_path, stride, first):
    lm, measure = evaluator(tmp_path, AR(bos=True))
    rows = ConditionedRows(Windows(Lines(), stride, True, END), first=first, end=False, end_id=END)
    result = measure.run(lm.params, rows, estimator="nll", draws=1, seed=0)
    nats = by_hand(lm, stride, first)
    opened = 3 if stride == LENGTH else 1  # windows without context
    assert result["nll"] == pytest.approx(nats.mean(), rel=1e-5)
    assert result["tokens"] == len(nats) == 60 - first * opened


def test_an_end_that_is_given_counts_neither_nats_nor_bytes(tmp_path):
    lm, measure = evaluator(tmp_path, AR(bos=True))
    rows = ConditionedRows(Windows(Lines(), LENGTH, True, END), first=False, end=True, end_id=END)
    nats = by_hand(lm, LENGTH, False)
    result = measure.run(lm.params, rows, estimator="nll", draws=1, seed=0)
    assert result["nll"] == pytest.approx(nats[:-1].mean(), rel=1e-5) and result["tokens"] == 59
    assert result["bits_per_byte"] == pytest.approx(nats[:-1].sum() / np.log(2) / 59, rel=1e-5)


def test_sliding_windows_of_a_block_model_score_their_last_blocks(tmp_path):
    """The bound of a window is the sum over its blocks: those of the last stride are what the window is scored for."""
    lm, measure = evaluator(tmp_path, masked(4))
    windows = Windows(Lines(), 8, True, END)
    result = measure.run(lm.params, windows, estimator="exact", draws=1, seed=0)
    total = 0.0
    for row in range(len(windows)):
        ids = np.array([row])
        size = int(windows.segments(ids).sum())
        found = lm.nll(windows.tokens(ids)[:, :size], estimator="exact")
        total += found.per_token[0][windows.scored(ids)[0, :size]].sum()
    assert result["tokens"] == 60 and result["nll"] == pytest.approx(total / 60, rel=1e-5)


def test_the_first_token_of_a_block_model_is_seen_and_never_masked(tmp_path):
    """The bound of the first block given its first token: over the masks of the other three, enumerated by hand."""
    lm, measure = evaluator(tmp_path, masked(4))
    rows = ConditionedRows(Windows(Lines(), LENGTH, True, END), first=True, end=False, end_id=END)
    plain = Windows(Lines(), LENGTH, True, END)
    results = [measure.measure(lm.params, x, EstimatorOptions("exact")).rows_UxR.mean(0)
               for x in (rows, plain)]
    for row in range(2):
        x0 = plain.tokens(np.array([row]))
        first_block = [enumerate_block(lm, x0, maskable) for maskable in ((1, 2, 3), (0, 1, 2, 3))]
        assert results[0][row] - results[1][row] == pytest.approx(first_block[0] - first_block[1], abs=1e-4)


def enumerate_block(lm, x0, maskable):
    """sum over non-empty subsets M of the maskable tokens of (1/|M|) CE(M) / C(n, |M|)."""
    total = 0.0
    for k in range(1, len(maskable) + 1):
        for subset in itertools.combinations(maskable, k):
            xt = x0.copy()
            xt[0, list(subset)] = MASK
            log_p = np.asarray(lm.logits(xt, x0)[0], np.float64)
            log_p[:, MASK] = -np.inf
            log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
            total -= sum(log_p[i, x0[0, i]] for i in subset) / k / math.comb(len(maskable), k)
    return total


@pytest.mark.ci_slow
def test_estimators_agree_on_given_tokens(tmp_path):
    lm, measure = evaluator(tmp_path, masked(4))
    rows = ConditionedRows(Windows(Lines(), 8, True, END), first=True, end=True, end_id=END)
    exact = measure.run(lm.params, rows, estimator="exact", draws=1, seed=0)
    for estimator in ("exact_count", "bernoulli"):
        found = measure.run(lm.params, rows, estimator=estimator, draws=64, seed=0)
        assert abs(found["nll"] - exact["nll"]) < 4 * found["nll_mc_se"] + 1e-3 * exact["nll"]  # bernoulli omits eps
        assert found["tokens"] == exact["tokens"] == 58
