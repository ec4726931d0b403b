"""Holes in texts: what is written, what the model sees of the text around, and the choice of a length."""

import jax
import numpy as np
import pytest
from grids import some
from scipy import stats
from toy_lm import CONTEXT, END, LETTERS, MASK, Letters, make_ids, make_lm, masked

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.generation import infill
from bd3lm_jax.generation.options import make_options
from bd3lm_jax.lm import LM


def fill(lm, texts, draws=2, **options):
    return infill.infill(lm, texts, make_options(**options), draws=draws)


def fixed(length, seed=0):
    """Letters that are no end tokens."""
    ids = make_ids(length, seed=seed)
    return np.where(ids == END, 5, ids)


def with_holes(ids, *places):
    return [MASK if i in places else int(token) for i, token in enumerate(ids)]


def test_spans_have_their_earlier_name():
    filled, = fill(make_lm(tokenizer=LETTERS), ["a[MASK]"])
    assert filled.holes is filled.spans and len(filled.holes) == 1


@pytest.mark.parametrize("size", some([4, CONTEXT], 0))
def test_only_holes_are_written(size):
    lm = make_lm(masked(size), tokenizer=LETTERS)
    text = "abce[MASK:3]fghijk[MASK]la[MASK:2]"
    results = fill(lm, [text] * 40, forbidden=[9])
    for result in results:
        assert [(hole.start, len(hole.tokens)) for hole in result.spans[:2]] == [(4, 3), (13, 1)]
        assert result.text == LETTERS.decode(result.tokens)
        a, b, c = (hole.text for hole in result.spans)
        assert result.text == f"abce{a}fghijk{b}la{c}" and len(a) == 3 and len(b) == 1
        assert not {MASK, END, 9} & {token for hole in result.spans for token in hole.tokens}
        assert result.spans[2].start == 16 and result.score is None
    assert {1, 2} <= {len(result.spans[2].tokens) for result in results}, "an end token may end the last hole early"
    assert {result.nfe for result in results} == {6}, "one call a token of a hole, none for what may follow the text"
    ids = [0, 1, 2, 4, MASK, MASK, MASK, *LETTERS.encode("fghijk").tolist(), MASK, 11, 0, MASK, MASK]
    assert fill(lm, [ids] * 40, forbidden=[9]) == results


@pytest.mark.ci_slow
def test_the_law_of_two_tokens_between_others():
    """A bidirectional model: each order is equally probable; all 12 x 12 fills, enumerated from the raw logits."""
    lm, left, right = make_lm(masked(CONTEXT)), [1, 7], [4, 9, 2]
    rows = [[MASK, MASK]] + [[token, MASK] for token in range(MASK)] + [[MASK, token] for token in range(MASK)]
    canvas = np.full((len(rows), CONTEXT), MASK)
    canvas[:, :7] = [left + row + right for row in rows]
    logits = np.array(lm.logits(canvas), np.float64)[:, 2:4, :MASK]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    law = (p[0, 0][:, None] * p[1:1 + MASK, 1] + p[0, 1][None] * p[1 + MASK:, 0].T) / 2
    results = fill(lm, [left + [MASK, MASK] + right] * 3000)
    counts = np.zeros((MASK, MASK))
    for result in results:
        counts[tuple(result.tokens[2:4])] += 1
    counts, expected = counts.reshape(-1), 3000 * law.reshape(-1)
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    assert stats.chisquare(counts, np.full_like(expected, 3000 / len(expected))).pvalue < 1e-6, "the test has power"


@pytest.mark.ci_slow
def test_a_block_model_sees_left_text_and_its_own_block():
    lm, ids = make_lm(masked(4)), fixed(20)
    ids[6:] = np.where(ids[6:] == 0, 1, ids[6:])
    texts = {"as it is": ids, "left changed": ids.copy(), "block changed": ids.copy(), "later changed": ids.copy()}
    texts["left changed"][2], texts["block changed"][11], texts["later changed"][12:] = 0, 0, 0
    fills = {name: [result.spans[0].tokens for result in fill(lm, [with_holes(text, 8, 9)] * 40)]
             for name, text in texts.items()}
    assert fills["later changed"] == fills["as it is"]
    assert fills["left changed"] != fills["as it is"] and fills["block changed"] != fills["as it is"]


def test_a_bidirectional_model_sees_everything():
    lm, ids = make_lm(masked(CONTEXT)), fixed(20)
    other = ids.copy()
    other[15:] = 0
    fills = [[result.spans[0].tokens for result in fill(lm, [with_holes(text, 8, 9)] * 40)] for text in (ids, other)]
    assert fills[0] != fills[1]


@pytest.mark.ci_slow
def test_a_text_with_its_hole_at_the_end_is_a_prompt():
    """The autoregressive case, which needs no new machinery: as `generate`."""
    lm, prompt = make_lm(AR(bos=True), tokenizer=LETTERS), [1, 2, 5]
    for seed in range(3):
        result, sample = fill(lm, [prompt + [MASK] * 8], seed=seed)[0], lm.generate([prompt], length=11, seed=seed)[0]
        assert (result.spans[0].tokens, result.nfe) == (sample.tokens, sample.nfe)
        assert result.tokens == prompt + sample.tokens


@pytest.mark.ci_slow
def test_texts_do_not_depend_on_their_companions():
    lm = make_lm(masked(4), tokenizer=LETTERS)
    texts = ["ab[MASK:3]e", "abcefgh[MASK]ijk[MASK:2-4]a", "[MASK:5]a", "b" * 20 + "[MASK:4]"]
    together = fill(lm, texts, seed=4)
    assert fill(lm, texts[:1], seed=4)[0] == together[0]
    assert fill(lm, [texts[3], texts[1]], seed=4)[1].tokens == together[1].tokens
    assert fill(lm, texts[:1], seed=5)[0] != together[0]


# ---- a length that the model chooses


@pytest.mark.ci_slow
def test_lengths_are_compared_under_common_masks():
    """A network that says the same whatever it sees has no reason to prefer one: a draw of masks for each length would
    give it one, as other texts do."""
    lm = make_lm(masked(CONTEXT), tokenizer=LETTERS)
    head = jax.tree_util.tree_map_with_path(lambda path, x: x * (path[-1].key == "bias"), lm.params["head"]["linear"])
    params = {**lm.params, "head": {**lm.params["head"], "linear": head}}
    deaf = LM(lm.config, params, lm.tokenizer, lm.model, lm.context)
    texts = [f"{letter}[MASK:1-4]ikjicaba" for letter in "abcefghi"]
    results = fill(deaf, texts, draws=1)
    assert {len(result.spans[0].tokens) for result in results} == {1}, "the shortest of equals"
    assert len({result.score for result in results}) == 1
    assert len({len(result.spans[0].tokens) for result in fill(lm, texts, draws=1)}) > 1


@pytest.mark.ci_slow
def test_every_length_is_filled_as_if_it_were_the_only_one():
    """The winner of a range is one of the fills of fixed lengths, and nfe counts them all."""
    lm = make_lm(masked(4), tokenizer=LETTERS)
    alone = [fill(lm, [f"abcek[MASK:{n}]fgh"])[0] for n in (1, 2, 3)]
    result = fill(lm, ["abcek[MASK:1-3]fgh"])[0]
    assert result.text in [one.text for one in alone] and result.nfe == sum(one.nfe for one in alone)
    assert fill(lm, ["abcek[MASK:0-3]fgh"])[0].text in [one.text for one in alone] + ["abcekfgh"]


@pytest.mark.ci_slow
def test_the_length_that_makes_the_text_after_it_likeliest_wins():
    """Block size 1: the criterion is the likelihood of fixed tokens by the chain rule, from the raw logits."""
    lm = make_lm(masked(1), tokenizer=LETTERS)
    texts = [f"abc[MASK:{a}]fgh[MASK:{b}]kk" for a in (1, 2, 3) for b in (1, 2)]
    alone = [fill(lm, [text], seed=7)[0] for text in texts]
    by_hand = []
    for one in alone:
        free = {hole.start + i for hole in one.spans for i in range(len(hole.tokens))}
        by_hand.append(sum(chain_nats(lm, one.tokens, i) for i in range(3, len(one.tokens)) if i not in free))
    result = fill(lm, ["abc[MASK:1-3]fgh[MASK:1-2]kk"], seed=7)[0]
    assert result.tokens == alone[int(np.argmax(by_hand))].tokens
    assert result.score == pytest.approx(max(by_hand), rel=1e-4)


def chain_nats(lm, tokens, place):
    clean = np.zeros((1, CONTEXT), int)
    clean[0, :len(tokens)] = tokens
    logits = np.array(lm.logits(np.full_like(clean, MASK), clean)[0, place], np.float64)
    logits[MASK] = -np.inf
    return logits[tokens[place]] - np.log(np.exp(logits).sum())


# ---- texts and markers


class Words(Letters):
    """Words with the space before them as tokens: " a" is 0, and a letter without a space 6 more."""

    def encode(self, text):
        ids = []
        for i, letter in enumerate(text):
            if letter != " ":
                ids.append(ord(letter) - ord("a") + 6 * (i == 0 or text[i - 1] != " "))
        return np.array(ids + [11] * text.endswith(" "), np.int32)

    def decode(self, ids):
        return "".join(" " + chr(ord("a") + i) if i < 6 else chr(ord("a") + i - 6) for i in ids)


def test_a_space_before_a_hole_is_the_holes_where_tokens_carry_it():
    lm = make_lm(masked(4))
    words, letters = (type(lm)(lm.config, lm.params, tokenizer, lm.model, lm.context) for tokenizer in (
        Words(), Spaced()))
    assert [part if isinstance(part, infill.Span) else part.tolist() for part in infill.parse(words, "a b [MASK] c")] \
        == [[6, 1], infill.Span(1, 1), [2]]
    parts = infill.parse(letters, "a [MASK:2]b")
    assert [part if isinstance(part, infill.Span) else part.tolist() for part in parts] \
        == [[0, 11], infill.Span(2, 2), [1]]


class Spaced(Letters):
    """The twelfth letter is the space."""

    def encode(self, text):
        return super().encode(text.replace(" ", "l"))

    def decode(self, ids):
        return super().decode(ids).replace("l", " ")


def test_markers():
    lm = make_lm(masked(4), tokenizer=LETTERS)
    parts = infill.parse(lm, "[MASK]a[MASK:4][MASK:0-2]bc[MASK:3-3]")
    assert [part if isinstance(part, infill.Span) else part.tolist() for part in parts] == [
        infill.Span(1, 1), [0], infill.Span(4, 4), infill.Span(0, 2), [1, 2], infill.Span(3, 3)]
    assert infill.parse(lm, [MASK, MASK, 1, MASK])[0::2] == [infill.Span(2, 2), infill.Span(1, 1)]


@pytest.mark.parametrize("text, message", [
    ("abc", "the text 'abc' has no hole, expected"), ([1, 2], "the ids hold no mask token 12: nothing to fill"),
    ("", "a text is empty"), ([], "a text is empty"), ("a[MASK:x]b", r"unknown marker '\[MASK:x\]', expected"),
    ("a[mask:3][MASK]", r"unknown marker '\[mask:3\]'"), ("a[MASK:2b[MASK]", r"unknown marker '\[MASK:2b'"),
    ("a[MASK:0]b", r"marker '\[MASK:0\]' has no length"), ("a[MASK:5-2]b", r"marker '\[MASK:5-2\]' has no length"),
    ("a[MASK:0-0]b", "has no length"), ("a[MASK:24]", "a text has up to 25 tokens with its holes, expected at most 24"),
    ([1] * 24 + [MASK], "up to 25 tokens"), ("m[MASK]", "the text 'm' encodes to the mask token outside its markers"),
    ("a[MASK:1-9]b[MASK:1-8]c", "72 combinations of lengths, expected at most 64"),
    ("a[MASK:2-3]", r"ends in a hole of 2 to 3 tokens.*write \[MASK:3\]"), ([1, 99], "token ids from 1 to 99"),
    (7, "expected a text or a list of token ids"),
])
def test_bad_texts(text, message):
    with pytest.raises(UserError, match=message) as error:
        fill(make_lm(masked(4), tokenizer=LETTERS), ["a[MASK]b", text])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("objective, texts, options, message", [
    (masked(4), "a[MASK]", {}, r"texts are 'a\[MASK\]', expected a list"), (masked(4), [], {}, "expected a list"),
    (masked(4), [[MASK]], {"stop": ["b"]}, "option 'stop' is for texts that are written on"),
    (masked(4), [[MASK]], {"window": True}, "option 'window'"), (masked(4), [[MASK]], {"top_p": 0}, "top_p is 0"),
    (AR(bos=True), [[1, MASK, 2]], {}, "does not see what follows a hole: put the one hole at the end"),
    (AR(bos=True), [[MASK, 2, MASK]], {}, "does not see what follows a hole"),
    (AR(bos=False), [[MASK]], {}, "no beginning token: begin the text with at least one token"),
])
def test_bad_requests(objective, texts, options, message):
    with pytest.raises(UserError, match=message):
        fill(make_lm(objective, tokenizer=LETTERS), texts, **options)
