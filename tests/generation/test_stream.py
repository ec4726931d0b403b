"""Streams of events against `LM.generate`, and what they promise about text that is final."""

import numpy as np
import pytest
from grids import some
from toy_lm import CONTEXT, END, LETTERS, MASK, Letters, make_ids, make_lm, masked

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.generation import stream
from bd3lm_jax.generation.options import make_options

RAGGED = [make_ids(n, seed=n).tolist() for n in (2, 9)]


def options(**changes):
    return make_options(**changes)


def events_of(lm, prompts, length, num=1, **changes):
    return list(stream.stream(lm, prompts, num, length, options(**changes)))


def replayed(events, number):
    """The row of a request from its first canvas and what each step says it changed."""
    own = [event for event in events if event.number == number]
    row = np.array(own[0].canvas)
    for event in own[1:]:
        for place in event.revealed:
            row[place] = event.canvas[place - event.start]
        row[event.remasked] = MASK
        assert row[event.start:event.start + len(event.canvas)].tolist() == event.canvas
    return row


@pytest.mark.ci_slow
@pytest.mark.parametrize("objective, sampler", some([
    (masked(4), {}), (masked(4), {"sampler": "threshold", "threshold": 0.15}),
    (masked(CONTEXT), {"sampler": "ancestral", "steps": 5}), (AR(bos=True), {})], 0))
def test_the_tokens_are_those_of_generate(objective, sampler):
    """Prompts that end in different blocks, a length that cuts the last one."""
    lm = make_lm(objective, tokenizer=LETTERS)
    expected = lm.generate(RAGGED, num=2, length=19, seed=3, **sampler)
    events = events_of(lm, RAGGED, 19, num=2, seed=3, **sampler)
    samples = {event.number: event.sample for event in events if event.sample}
    assert [samples[number] for number in range(4)] == expected
    assert {sample.stop for sample in expected} == {"end", "length"}
    for number, (sample, prompt) in enumerate(zip(expected, np.repeat([2, 9], 2))):
        row = replayed(events, number)
        assert row[prompt:prompt + len(sample.tokens)].tolist() == sample.tokens
        own = [event for event in events if event.number == number]
        assert own[0].step == 0 and own[0].nfe == 0 and own[-1].sample == sample
        assert own[-1].nfe == sample.nfe and own[-1].text == sample.text
        assert all(0 < c <= 1 for event in own for c in event.confidence)
        assert all(len(event.revealed) == len(event.confidence) for event in own)


@pytest.mark.ci_slow
def test_steps_that_mask_again_say_so():
    lm = make_lm(tokenizer=LETTERS)
    sampler = {"sampler": "remdm_cap", "steps": 6, "threshold": 0.6, "forbidden": [END]}
    events = events_of(lm, [[1, 2]], 18, **sampler)
    sample = lm.generate([[1, 2]], length=18, **sampler)[0]
    assert events[-1].sample == sample and replayed(events, 0)[2:].tolist() == sample.tokens
    assert any(event.remasked for event in events)


@pytest.mark.ci_slow
def test_one_token_a_call_is_one_event_a_call():
    """First hitting, and autoregression: each call reveals one token, of known confidence."""
    for objective in (masked(4), AR(bos=True)):
        events = events_of(make_lm(objective, tokenizer=LETTERS), [[1, 2]], 16, num=4, forbidden=[END])
        for number in range(4):
            own = [event for event in events if event.number == number]
            assert [len(event.revealed) for event in own] == [0] + [1] * 14
            assert [event.nfe for event in own] == list(range(15))
            assert [event.sample is None for event in own] == [True] * 14 + [False]


def test_confidence_is_the_probability_of_the_token():
    """The first token of an autoregressive text, against the raw logits."""
    lm = make_lm(AR(bos=True), tokenizer=LETTERS)
    events = events_of(lm, [[1, 2, 5]], 4, num=4)
    logits = np.array(lm.logits(np.array([[END, 1, 2, 5]]))[0, -1], np.float64)
    logits[MASK] = -np.inf
    p = np.exp(logits) / np.exp(logits).sum()
    for event in events[4:]:
        assert event.confidence == pytest.approx([p[event.canvas[0]]], rel=1e-4)


@pytest.mark.parametrize("stop", [pytest.param((), marks=pytest.mark.ci_slow), ("ab", "bba", "k")])
def test_committed_text_never_changes(stop):
    """Stop strings cross the borders of blocks; a text is committed as far as no stop string may take it back."""
    lm = make_lm(tokenizer=LETTERS)
    request = {"num": 4, "length": CONTEXT, "stop": stop, "seed": 1, "forbidden": [END]}
    events, expected = events_of(lm, ["abcd"], **request), lm.generate(["abcd"], **request)
    for number, sample in enumerate(expected):
        own = [event for event in events if event.number == number]
        assert own[-1].sample._replace(nfe=0) == sample._replace(nfe=0) and own[-1].nfe <= sample.nfe
        pieces = list(stream.pieces(own))
        committed = "".join(piece.text for piece in pieces if isinstance(piece, stream.Committed))
        assert committed == sample.text
        assert all(sample.text.startswith(event.text) for event in own)
        assert [piece for piece in pieces if isinstance(piece, stream.Revision)][-1].text == ""
        for event in own[:-1]:  # committed and tentative text together show the row
            assert (event.text + event.tentative).replace(stream.MASK_SIGN, "m") == shown(own, event)
    if stop:
        assert {sample.stop for sample in expected} == {"string"}
        assert any(len(event.text) % 4 for event in events if event.sample is None), "nothing was held back"


def shown(own, event):
    """Letters from the end of the prompt to the end of the event's block, m for a mask."""
    until = 8 if event.step == 0 else event.start + len(event.canvas)
    row = replayed(own[:own.index(event) + 1], event.number)[4:until]
    return LETTERS.decode(row)


class Halves(Letters):
    """Letters that are parts of characters: 0xC3 0xA9 is one."""

    def decode(self, ids):
        return bytes([b"\xc3\xa9xyz\xc3\xc3\xa9\xa9\xc3\xa9\xc3"[i] for i in ids]).decode(errors="replace")


def test_characters_are_committed_whole(monkeypatch):
    lm = make_lm(tokenizer=LETTERS)
    monkeypatch.setattr(lm, "tokenizer", Halves())
    events = events_of(lm, [[0, 1]], CONTEXT, num=4, forbidden=[END])
    for number in range(4):
        own = [event for event in events if event.number == number]
        pieces = [piece.text for piece in stream.pieces(own) if isinstance(piece, stream.Committed)]
        assert "".join(pieces) == own[-1].sample.text and "é" in own[-1].sample.text


def test_watching_one_text():
    lm = make_lm(tokenizer=LETTERS)
    pieces = list(stream.watch(lm, "abc", 12, options(seed=2)))
    text = "".join(piece.text for piece in pieces if isinstance(piece, stream.Committed))
    assert text == lm.generate(["abc"], num=4, length=12, seed=2)[0].text
    assert list(stream.watch(lm, None, 12, options())) == list(stream.pieces(events_of(lm, None, 12)))


@pytest.mark.ci_slow
def test_without_a_tokenizer_events_have_ids_alone():
    lm = make_lm()
    events = events_of(lm, [[1]], 6)
    assert events[-1].sample.text is None and len(events[-1].sample.tokens) == 5
    assert {event.text for event in events} == {event.tentative for event in events} == {None}
    with pytest.raises(UserError, match="no tokenizer, so there is no text to stream"):
        stream.watch(lm, [1], 6, options())


@pytest.mark.parametrize("prompts, num, length, changes, message", [
    (None, 65, 8, {}, "65 texts are asked for, expected at most 64"),
    (None, 0, 8, {}, "num is 0, expected at least 1"),
    (None, 1, 8, {"sampler": "first_hiting"}, "did you mean 'first_hitting'"),
    ([[1] * 8], 1, 8, {}, "which leaves none of length 8 to write"),
    (None, 1, CONTEXT + 1, {}, "length is 25, expected 1 to 24"),
    (None, 1, CONTEXT + 1, {"window": True}, "a bidirectional model is watched up to 24 tokens"),
])
def test_bad_requests_are_refused_before_the_first_event(prompts, num, length, changes, message):
    with pytest.raises(UserError, match=message):
        stream.stream(make_lm(masked(CONTEXT)), prompts, num, length, options(**changes))
