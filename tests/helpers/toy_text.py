"""Texts and automata by enumeration: a vocabulary of short pieces, and what Python's `re` says of the joined text."""

import itertools
import re

from bd3lm_jax.generation.constraints.dfa import START

PIECES = [b"a", b"b", b"ab", b"ba", b""]  # the last one is the mask
MASK, END = 4, 5
VOCAB = 6


def accepts(dfa, text: str) -> bool:
    state = START
    for byte in text.encode():
        state = dfa.transitions[state, byte]
    return bool(dfa.accepting[state])


def is_accepted(pattern: str, tokens: tuple[int, ...], ends: bool = True) -> bool:
    """Whether the text before the first end token matches, only end tokens follow, and no mask is there."""
    stop = tokens.index(END) if ends and END in tokens else len(tokens)
    text, rest = tokens[:stop], tokens[stop:]
    if MASK in text or END in text or any(token != END for token in rest):
        return False
    return re.fullmatch(pattern, b"".join(PIECES[token] for token in text).decode()) is not None


def completable(pattern: str, tokens: tuple[int, ...], after: int) -> bool:
    """Whether some `after` tokens more make an accepted text."""
    return any(is_accepted(pattern, tokens + rest) for rest in itertools.product(range(VOCAB), repeat=after))
