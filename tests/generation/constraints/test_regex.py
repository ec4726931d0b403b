"""Regular expressions against Python's own on random patterns and texts; errors with their positions."""

import random
import re

import pytest
from toy_text import accepts

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation.constraints.dfa import START, compile_node
from bd3lm_jax.generation.constraints.regex import parse

ATOMS = ["a", "b", "é", "日", "1", r"\.", ".", "[ab]", "[^a]", "[a-é]", "[]a]", "[^]]", "[a-]", r"[\d_]", r"\d", r"\W",
         r"\s", r"\S", "{", r"\xe9", r"\u65e5", r"\n"]
ALPHABET = "aabbé日1_ \n.]{🦙-"


def random_pattern(rng: random.Random, depth: int) -> str:
    kind = rng.random() if depth else 0
    if kind < 0.3:
        return rng.choice(ATOMS)
    if kind < 0.55:
        return random_pattern(rng, depth - 1) + random_pattern(rng, depth - 1)
    if kind < 0.75:
        return f"({random_pattern(rng, depth - 1)}|{rng.choice(['', random_pattern(rng, depth - 1)])})"
    return f"(?:{random_pattern(rng, depth - 1)}){rng.choice(['*', '+', '?', '{2}', '{1,3}', '{,2}', '{2,}'])}"


def test_random_patterns_accept_what_pythons_do():
    rng, matched = random.Random(0), 0
    for _ in range(400):
        pattern = random_pattern(rng, 4)
        dfa = compile_node(parse(pattern))
        for _ in range(25):
            text = "".join(rng.choices(ALPHABET, k=rng.randrange(6)))
            expected = re.fullmatch(pattern, text, re.ASCII) is not None
            assert accepts(dfa, text) == expected, (pattern, text)
            matched += expected
    assert matched > 500


@pytest.mark.parametrize("pattern, texts, others", [
    (r"\d{4}-\d\d-\d\d", ["2024-02-30"], ["2024-2-3", "2024-02-300", ""]),
    (r"^(yes|no)$", ["yes", "no"], ["yes\n", "^yes$", "yesno"]),
    (r'"([^"\\]|\\.)*"', ['"a \\" b"', '""'], ['"', '"\\"']),
    (r"a{x}{}", ["a{x}{}"], ["ax"]),
    ("", [""], ["a"]),
])
def test_patterns_by_hand(pattern, texts, others):
    dfa = compile_node(parse(pattern))
    assert all(accepts(dfa, text) for text in texts) and not any(accepts(dfa, text) for text in others)


def test_every_character_is_some_character_and_only_valid_utf8_is():
    dfa = compile_node(parse(r".|\n"))
    assert all(accepts(dfa, chr(c)) for c in [*range(0xD800), *range(0xE000, 0x110000, 7), 0x10FFFF])
    for invalid in (b"\x80", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3"):
        state = START
        for byte in invalid:
            state = dfa.transitions[state, byte]
        assert not dfa.accepting[state]


@pytest.mark.parametrize("pattern, position, problem", [
    ("ab(c", 2, "not closed"), ("ab)", 2, "closes no group"), ("x[a", 1, "not closed"), ("a|*", 2, "nothing to repeat"),
    ("a*?", 2, "lazy"), ("a**", 2, "lazy"), ("b(?=a)", 1, "only"), (r"(a)\1", 3, "not supported"),
    (r"\bfoo", 0, "not supported"), ("a{3,2}", 1, "at least 3 and at most 2"), ("[b-a]", 0, "range"),
    (r"[\d-z]", 0, "range"), (r"a\x1", 1, "2 hexadecimal"), ("a^b", 1, "inside"), ("a$b", 1, "inside"),
    ("ab\\", 2, "backslash"),
])
def test_errors_say_where(pattern, position, problem):
    with pytest.raises(UserError, match=f"position {position}: .*{problem}"):
        parse(pattern)
