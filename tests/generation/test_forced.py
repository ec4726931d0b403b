"""Tokens that stand at places of a text from the beginning: the law of the others, and what is refused."""

import itertools

import numpy as np
import pytest
from grids import some
from scipy import stats
from toy_lm import CONTEXT, END, LETTERS, MASK, make_ids, make_lm, masked

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.generation import stream
from bd3lm_jax.generation.options import make_options

LETTER = [i for i in range(MASK) if i != END]  # no text ends before its last forced token
TEXTS = 3000


def law_of(logits, allowed):
    """p `[..., V]` over allowed tokens, from raw logits."""
    p = np.where(np.isin(np.arange(MASK), allowed), np.exp(np.asarray(logits, np.float64)[..., :MASK]), 0.0)
    return p / p.sum(-1, keepdims=True)


def pvalue(counts, law):
    expected = TEXTS * law.reshape(-1)
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts.reshape(-1), expected))
    if expected[-1] == 0:
        counts, expected = counts[:-1], expected[:-1]
    return stats.chisquare(counts, expected).pvalue


def count(samples, *places):
    counts = np.zeros((MASK,) * len(places))
    for sample in samples:
        counts[tuple(sample.tokens[place] for place in places)] += 1
    return counts


@pytest.mark.parametrize("size", some([4, CONTEXT], 0))
def test_the_law_beside_a_forced_token(size):
    """Two tokens between a prompt and a forced token, in either order with equal probability: all 11 x 11 outcomes,
    from the raw logits. A block of 4 holds a token of the prompt, the two and the forced one; of a bidirectional model
    the rest of the canvas is forced as well."""
    lm, prompt = make_lm(masked(size), tokenizer=LETTERS), [1, 7, 2, 4, 9]
    forced = [6] if size == 4 else [6, *LETTERS.encode("abcefghijklabcef").tolist()]
    rows = [[MASK, MASK], *([token, MASK] for token in range(MASK)), *([MASK, token] for token in range(MASK))]
    canvas = np.array([prompt + row + forced for row in rows])
    seen = np.where(np.arange(canvas.shape[1]) < 4, canvas, 0)  # the clean stream: the block before
    p = law_of((lm.logits(canvas, seen) if size == 4 else lm.logits(canvas))[:, 5:7], LETTER)
    law = (p[0, 0][:, None] * p[1:1 + MASK, 1] + p[0, 1][None] * p[1 + MASK:, 0].T) / 2
    samples = lm.generate([prompt], num=TEXTS, length=canvas.shape[1], forced=dict(enumerate(forced, 7)))
    assert all(sample.tokens[2:] == forced for sample in samples)
    counts = count(samples, 0, 1)
    assert pvalue(counts, law) > 1e-3
    canvas[:, 7:] = MASK  # as if they were not seen
    p = law_of((lm.logits(canvas, seen) if size == 4 else lm.logits(canvas))[:, 5:7], LETTER)
    unseen = (p[0, 0][:, None] * p[1:1 + MASK, 1] + p[0, 1][None] * p[1 + MASK:, 0].T) / 2
    assert pvalue(counts, unseen) < 1e-6, "the test has power"


@pytest.mark.ci_slow
def test_the_law_around_a_forced_token_of_an_autoregressive_model():
    """Written as it is: the token before it does not know, the one after it does."""
    lm, forced = make_lm(AR(bos=True), tokenizer=LETTERS), 6
    rows = np.array([[END, 1, x, forced] for x in range(MASK)])
    logits = lm.logits(rows)
    law = law_of(logits[0, 1], LETTER)[:, None] * law_of(logits[:, 3], range(MASK))
    samples = lm.generate([[1]], num=TEXTS, length=4, forced={2: forced})
    counts = np.zeros((MASK, MASK))
    for sample in samples:  # an end token may come last
        assert sample.tokens[1] == forced
        counts[sample.tokens[0], (*sample.tokens, END)[2]] += 1
    assert pvalue(counts, law) > 1e-3


def test_blocks_before_a_forced_token_do_not_see_it():
    lm = make_lm(masked(4), tokenizer=LETTERS)
    options = {"num": 40, "length": 12, "forbidden": [END]}
    plain, forced = lm.generate(**options), lm.generate(**options, forced={9: "bc"})
    assert [sample.tokens[:8] for sample in plain] == [sample.tokens[:8] for sample in forced]
    assert all(sample.tokens[9:11] == [1, 2] and sample.nfe == 10 for sample in forced)


@pytest.mark.ci_slow
@pytest.mark.parametrize("objective", [masked(4), AR(bos=True), masked(CONTEXT)])
def test_forced_tokens_do_not_depend_on_the_batch(objective):
    """One dict a request, or one for all; texts end after their last forced token."""
    lm = make_lm(objective, tokenizer=LETTERS)
    prompts, forced = ["ab", "", "abcabcabc"], [{5: "kk", 20: 2}, {}, {9: 1, 11: "hijk"}]
    together = lm.generate(prompts, length=22, seed=3, forced=forced)
    assert together[0].tokens[3:5] == [10, 10] and together[0].tokens[18] == 2
    assert together[2].tokens[0] == 1 and together[2].tokens[2:6] == [7, 8, 9, 10]
    assert together[1:2] == lm.generate(prompts, length=22, seed=3)[1:2]
    assert together[:1] == lm.generate(prompts[:1], length=22, seed=3, forced=forced[0])
    many = lm.generate(num=30, length=12, forced={"8": "a"})
    assert all(len(sample.tokens) > 8 and sample.tokens[8] == 0 for sample in many)
    assert {sample.stop for sample in many} == {"end", "length"}


@pytest.mark.ci_slow
def test_a_forced_end_ends_a_text():
    lm = make_lm(masked(4), tokenizer=LETTERS)
    assert {(len(s.tokens), s.stop) for s in lm.generate(num=9, length=16, forced={7: END})} == {(7, "end")}


@pytest.mark.ci_slow
def test_a_stop_string_counts_once_it_is_reached():
    """One that is forced far behind does not stop the text before it."""
    lm = make_lm(masked(4), tokenizer=LETTERS)
    options = {"length": CONTEXT, "forbidden": [END, 0], "seed": 1}
    whole, = lm.generate(["bb"], **options, forced={20: "aaa"})
    cut, = lm.generate(["bb"], **options, forced={20: "aaa"}, stop=["aaa"])
    assert cut.tokens == whole.tokens[:18] and cut.stop == "string"


@pytest.mark.ci_slow
def test_watched_texts_with_forced_tokens():
    """Also where a whole block is forced, the last one among them."""
    lm = make_lm(masked(4), tokenizer=LETTERS)
    options = {"seed": 2, "forced": [{4: "bcef", 12: "fghi"}, {6: 0}]}
    events = list(stream.stream(lm, ["a", "ab"], 1, 16, make_options(**options)))
    watched = sorted((event for event in events if event.sample), key=lambda event: event.number)
    assert [event.sample for event in watched] == lm.generate(["a", "ab"], length=16, **options)
    assert watched[0].sample.text[3:7] == "bcef" and watched[0].sample.text[11:] == "fghi"
    written = list(itertools.chain(*(event.revealed for event in events if event.number == 0)))
    assert sorted(written) == [1, 2, 3, 8, 9, 10, 11]


@pytest.mark.ci_slow
def test_a_sliding_canvas_keeps_forced_tokens():
    lm = make_lm(masked(CONTEXT), tokenizer=LETTERS)
    sample, = lm.generate([make_ids(3).tolist()], length=50, window=True, sampler="ancestral", steps=3,
                          forced={30: "abcef", 49: 5})
    assert sample.tokens[27:32] == [0, 1, 2, 4, 5] and sample.tokens[46] == 5 and len(sample.tokens) == 47


@pytest.mark.parametrize("forced, message", [
    ({1: 5}, "a token is forced at place 1, expected 2 to 9: after the prompt and within length 10"),
    ({10: 5}, "forced at place 10"), ({8: "abc"}, "forced at place 10"), ({-1: 5}, "forced at place -1"),
    ({4: 13}, "13 is forced at place 4, expected a text or a token id 0 to 12"), ({4: 1.5}, "1.5 is forced"),
    ({4: MASK}, "the mask token 12 is forced at place 4"), ({4: ""}, "the text forced at place 4 is empty"),
    ({4: "ab", 5: "c"}, "tokens 1 and 2 are both forced at place 5"), ({"x": 3}, "forced place 'x' is no number"),
    ([{4: 1}, {4: 1}], "or a list of 1 such dicts"), ("ab", "forced is 'ab', expected"),
    ({4: 1, "constraint": 0}, "forced tokens do not go with a constraint")])
def test_what_cannot_be_forced(forced, message):
    more = {"constraint": "a+"} if "constraint" in forced else {}
    with pytest.raises(UserError, match=message) as error:
        make_lm(masked(4), tokenizer=LETTERS).generate(["ab"], length=10, forced=forced, **more)
    assert "\n" not in str(error.value)
