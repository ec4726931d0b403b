"""Automata over bytes: as small as can be, and refused when too large or empty."""

import itertools

import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation.constraints.dfa import DEAD, START, compile_node
from bd3lm_jax.generation.constraints.regex import parse


@pytest.mark.parametrize("pattern, states", [
    ("abc", 5),  # before a, b, c, the end, and DEAD
    ("(a|b)*", 2), ("(a|b)*abb", 5), ("a{2,4}", 6), ("(aa|bb|ab|ba)*", 3),
    ("é|è", 4),  # both begin with the same byte
])
def test_smallest_number_of_states(pattern, states):
    assert len(compile_node(parse(pattern)).accepting) == states


def test_no_two_states_accept_the_same_rests():
    dfa = compile_node(parse("(a|b)*a(a|b){3}|b{5}"))
    rests = [bytes(rest) for n in range(8) for rest in itertools.product(b"ab", repeat=n)]

    def accepted(state):
        found = []
        for rest in rests:
            at = state
            for byte in rest:
                at = dfa.transitions[at, byte]
            found.append(bool(dfa.accepting[at]))
        return tuple(found)

    signatures = [accepted(state) for state in range(len(dfa.accepting))]
    assert len(set(signatures)) == len(signatures)
    assert not any(signatures[DEAD]) and any(signatures[START]) and (dfa.transitions[DEAD] == DEAD).all()


@pytest.mark.parametrize("pattern, message", [
    (r"[^\d\D]", "matches no text"), ("(a|b)*a(a|b){18}", "more than 10000 states"),
    ("(.{100}){100}", "more than 100000 parts"), ("(){999999999}", "more than 100000 parts"),
])
def test_too_large_or_empty(pattern, message):
    with pytest.raises(UserError, match=message):
        compile_node(parse(pattern))
