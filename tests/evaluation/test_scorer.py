import types

import numpy as np
import pytest
from grids import some
from toy_lm import CONTEXT, END, LETTERS, make_ids, make_lm, masked

import bd3lm_jax
from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.evaluation.scorer import Scorer, Words, windows


def scorer(objective=AR(bos=True), stride=0):
    return Scorer(make_lm(objective, tokenizer=LETTERS), "toy", stride)


@pytest.mark.ci_slow
@pytest.mark.parametrize("objective", some([AR(bos=True), AR(bos=False), masked(1)], 0), ids=repr)
def test_short_texts_have_the_likelihood_of_the_model(objective):
    """One at a time and unpadded."""
    made = scorer(objective)
    texts = [make_ids(1, n, seed=n)[0] for n in (3, CONTEXT)] * 9
    found = made.nats(texts)
    for ids, nats in [*zip(texts, found)][-4:]:  # of the second pass, which is not full
        alone = made.lm.nll(ids[None], estimator="nll")
        np.testing.assert_allclose(nats, alone.per_token[0], atol=1e-5)
        assert np.count_nonzero(nats) == len(ids) - made.first


@pytest.mark.parametrize("size", [1, 10, 11, 12, 13, 30, 31])
@pytest.mark.parametrize("window, stride", [(10, 10), (10, 5), (10, 1), (1, 1)])
def test_windows_score_every_token_once(size, window, stride):
    cuts = windows(size, window, stride)
    assert [i for _, scored, stop in cuts for i in range(scored, stop)] == list(range(size))
    for start, scored, stop in cuts:
        assert start <= scored < stop <= start + window
        assert start == 0 or scored - start == window - stride  # what they are given


@pytest.mark.parametrize("objective, stride", some([(AR(bos=True), 8), (AR(bos=True), CONTEXT), (AR(bos=False), 5)], 0))
def test_long_texts_slide(objective, stride):
    """Token i from a window of its own, cut where the rule says."""
    made = scorer(objective, stride)
    ids = make_ids(1, 3 * CONTEXT + 2 * (stride == 8))[0]
    nats = made.nats([ids])[0]
    assert np.count_nonzero(nats) == len(ids) - made.first
    for i in (made.first, CONTEXT - 1, CONTEXT, CONTEXT + stride, len(ids) - 1):
        start = max(0, -(-(i + 1 - CONTEXT) // stride)) * stride
        piece = ids[start:start + CONTEXT]
        expected = made.lm.nll(piece[None], estimator="nll").per_token[0, i - start]
        assert nats[i] == pytest.approx(expected, abs=1e-5), i


def test_a_newline_is_an_end_where_documents_are_lines():
    lm = make_lm(AR(bos=True), tokenizer=LETTERS)
    assert scorer().encode("abc").tolist() == [0, 1, 2]
    data = types.SimpleNamespace(source="text")
    config = Config(lm.config.model, lm.config.diffusion, data=data)
    lines = Scorer(bd3lm_jax.LM(config, lm.params, LETTERS, lm.model, CONTEXT), "toy", 0)
    assert lines.encode("ab\nc").tolist() == [0, 1, END, 2]
    assert lines.encode("").tolist() == []


def test_words_are_numbered_across_texts():
    words = Words()
    assert [words.encode(text).tolist() for text in ("a b  a", "b c", "")] == [[0, 1, 0], [1, 2], []]


@pytest.mark.parametrize("objective, time, said", [(masked(4), False, "only a bound .*block size 4"),
                                                   (masked(1), True, "only a bound")])
def test_a_bound_is_no_score(objective, time, said):
    with pytest.raises(UserError, match=said):
        Scorer(make_lm(objective, time, tokenizer=LETTERS), "toy", 0)


def test_bad_scorers():
    with pytest.raises(UserError, match="toy has no tokenizer"):
        Scorer(make_lm(AR(bos=True)), "toy", 0)
    with pytest.raises(UserError, match=f"stride of {CONTEXT + 1} .* expected 1 to {CONTEXT}"):
        scorer(stride=CONTEXT + 1)
    with pytest.raises(UserError, match=f"expected 1 to {CONTEXT - 1}"):  # the first token of a window is not scored
        scorer(AR(bos=False), CONTEXT)
