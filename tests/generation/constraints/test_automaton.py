"""Automata over tokens against enumerated texts and Python's `re`."""

import itertools
import re

import numpy as np
import pytest
from toy_text import END, MASK, PIECES, VOCAB, completable, is_accepted

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.tokenizers import ByteTokenizer, get_tokenizer
from bd3lm_jax.generation.constraints import automaton
from bd3lm_jax.generation.constraints.automaton import build, lift
from bd3lm_jax.generation.constraints.dfa import DEAD, START, compile_node
from bd3lm_jax.generation.constraints.regex import parse

PATTERNS = ["(ab)*", "a{2,5}b?", "(a|bb)*ba", ".{3}", "b(a|b){0,6}"]


def toy(pattern: str, available=(4,), first=PIECES, end_id=END, forbidden=()):
    return lift(compile_node(parse(pattern)), first, PIECES, end_id, VOCAB, available, {*forbidden, MASK})


def state_after(found, tokens) -> int:
    state = START
    for token in tokens:
        state = found.transitions[state, found.token_class[token]]
    return int(state)


def sequences(most: int):
    return itertools.chain.from_iterable(itertools.product(range(VOCAB), repeat=n) for n in range(most + 1))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reachable_is_what_enumeration_finds(pattern):
    found = toy(pattern)
    for tokens in sequences(3):
        for after in range(5 - len(tokens)):
            assert found.reachable[after, state_after(found, tokens)] == completable(pattern, tokens, after), tokens


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_end_token_the_length_is_filled_exactly(pattern):
    found = toy(pattern, available=[3], end_id=-1)
    for tokens in sequences(4):
        assert found.reachable[0, state_after(found, tokens)] == is_accepted(pattern, tokens, ends=False), tokens


def test_forbidden_tokens_and_the_first_token():
    found = toy("(ab)*", forbidden=[2])
    assert [state_after(found, tokens) == DEAD for tokens in [(2,), (0, 1, 2), (0, 1)]] == [True, True, False]
    first = [b"ab", b"", b"", b"", b""]
    found = toy("(ab)*", first=first)
    for tokens in sequences(3):
        text = b"".join(PIECES[t] if i else first[t] for i, t in enumerate(tokens) if t < MASK).decode()
        plain = not {MASK, END} & set(tokens) and tokens[:1] not in ((1,), (2,), (3,))
        if plain:
            assert found.reachable[0, state_after(found, tokens)] == (re.fullmatch("(ab)*", text) is not None)
        elif END not in tokens:
            assert state_after(found, tokens) == DEAD


def test_sizes_are_powers_of_two_and_small():
    found = build(r"\d{4}-\d\d", get_tokenizer("gpt2", list), 50258, [20], ())
    assert found.token_class.shape == (50258,) and found.reachable.shape == (32, 16)
    assert found.transitions.shape[0] == 16  # dead, 7 places between characters, behind the end
    assert set(np.unique(found.transitions).tolist()) == {DEAD, *range(START + 1, 10)}


def test_byte_tokenizer_walks_through_the_text():
    tokenizer = ByteTokenizer()
    found = build({"enum": ["é", 12]}, tokenizer, 258, [6], ())
    for text, accepted in (('"é"', True), ("12", True), ('"e"', False), ("1", False)):
        assert found.reachable[0, state_after(found, tokenizer.encode(text))] == accepted
        assert found.reachable[0, state_after(found, [*tokenizer.encode(text), 256, 256])] == accepted
        assert state_after(found, [*tokenizer.encode(text), 257]) == DEAD


@pytest.mark.parametrize("pattern, options, message", [
    ("(ab){5}", {"available": [9, 4]}, "at least 5 tokens, and request 1 has 4"),
    ("c+", {}, "no text made of the tokens"),
    ("(aa)*b", {"available": [4], "end_id": -1, "forbidden": [2, 3]}, "exactly the 4 tokens .*shortest has 1"),
])
def test_what_cannot_be_satisfied_is_said_before(pattern, options, message):
    with pytest.raises(UserError, match=message):
        toy(pattern, **options)


def test_limits(monkeypatch):
    monkeypatch.setattr(automaton, "MAX_CELLS", 20)
    with pytest.raises(UserError, match=r"needs \d+ states and tells \d+ kinds of tokens apart, \d+ cells"):
        toy("(ab){1,4}")
    monkeypatch.setattr(automaton, "MAX_STATES", 4)
    with pytest.raises(UserError, match="more than 4 states"):
        toy("(ab){1,4}")


def test_other_constraints_are_refused():
    with pytest.raises(UserError, match="constraint is 3, expected a regular expression"):
        build(3, ByteTokenizer(), 258, [4], ())
