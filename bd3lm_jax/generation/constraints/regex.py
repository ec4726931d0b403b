r"""Regular expressions over text, read into a syntax tree (compiled by dfa.py).

Syntax, as in Python's `re` with the ASCII flag; the whole text must match (`^` at the start and `$` at the end of the
pattern may be written and change nothing):
    a \. \n \t \r \f \v \xHH \uHHHH    characters
    .                                  any character but the newline
    [a-z_] [^"]                        classes
    \d \D \w \W \s \S                  ASCII digits, word characters, spaces, and all others
    x|y (...) (?:...)                  either, groups
    * + ? {m} {m,} {,n} {m,n}          repetition
Look-around, back-references, flags, boundaries, lazy and possessive repetition are refused.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from bd3lm_jax.core.errors import UserError

LAST_CHARACTER, SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
REPETITION = re.compile(r"\*|\+|\?|\{(?!\})(?P<low>\d*)(?P<comma>,(?P<high>\d*))?\}")


class Characters(NamedTuple):
    """One character out of inclusive ranges of code points, sorted and disjoint."""

    ranges: tuple[tuple[int, int], ...]


class Sequence(NamedTuple):
    """One part after the other; none: the empty text."""

    parts: tuple


class Either(NamedTuple):
    options: tuple


class Repeat(NamedTuple):
    """`part` at least `low` and at most `high` times (None: no limit)."""

    part: "Node"
    low: int
    high: int | None


Node = Characters | Sequence | Either | Repeat


def characters(ranges: Iterable[tuple[int, int]]) -> Characters:
    """The union of inclusive ranges of code points; surrogates, which no text holds, are left out."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    first, last = SURROGATES
    parts = [part for low, high in merged for part in ((low, min(high, first - 1)), (max(low, last + 1), high))]
    return Characters(tuple((low, high) for low, high in parts if low <= high))


def without(chosen: Characters, removed: Characters) -> Characters:
    """The characters of `chosen` that are not in `removed`."""
    ranges = chosen.ranges
    for first, last in removed.ranges:
        ranges = tuple(part for low, high in ranges
                       for part in ((low, min(high, first - 1)), (max(low, last + 1), high)) if part[0] <= part[1])
    return Characters(ranges)


def one_of(text: str) -> Characters:
    return characters((ord(c), ord(c)) for c in text)


def literal(text: str) -> Sequence:
    return Sequence(tuple(one_of(c) for c in text))


ANY = characters([(0, LAST_CHARACTER)])
DIGITS = characters([(ord("0"), ord("9"))])
WORD = characters([*DIGITS.ranges, (ord("A"), ord("Z")), (ord("a"), ord("z")), (ord("_"), ord("_"))])
CLASSES = {"d": DIGITS, "w": WORD, "s": one_of(" \t\n\r\f\v")}
CLASSES |= {name.upper(): without(ANY, chosen) for name, chosen in CLASSES.items()}


def parse(pattern: str) -> Node:
    """The syntax tree of a pattern. UserError, with the position, for a wrong or unsupported one."""
    return _Parser(pattern).parse()


class _Parser:
    """Recursive descent; `at` is the position that is read next."""

    def __init__(self, pattern: str):
        self.pattern, self.at = pattern, 0

    def parse(self) -> Node:
        node = self.either()
        if self.at < len(self.pattern):
            self.fail("this ) closes no group")
        return node

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        raise UserError(f"regular expression '{self.pattern}', position {self.at if at is None else at}: {problem}")

    def peek(self) -> str:
        return self.pattern[self.at:self.at + 1]

    def take(self, text: str) -> bool:
        matched = self.pattern.startswith(text, self.at)
        self.at += len(text) * matched
        return matched

    def either(self) -> Node:
        options = [self.sequence()]
        while self.take("|"):
            options.append(self.sequence())
        return options[0] if len(options) == 1 else Either(tuple(options))

    def sequence(self) -> Node:
        parts = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated())
        return Sequence(tuple(parts))

    def repeated(self) -> Node:
        if REPETITION.match(self.pattern, self.at):
            self.fail(f"'{self.peek()}' has nothing to repeat (a literal one: \\{self.peek()})")
        part = self.atom()
        matched = REPETITION.match(self.pattern, self.at)
        if not matched:
            return part
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(matched[0]) or self.counts(matched)
        self.at = matched.end()
        if REPETITION.match(self.pattern, self.at):
            self.fail(f"'{self.peek()}' after a repetition: lazy, possessive and repeated repetitions are not "
                      "supported, write (?:x*)* for the last")
        return Repeat(part, low, high)

    def counts(self, matched: re.Match) -> tuple[int, int | None]:
        low = int(matched["low"] or 0)
        high = low if matched["comma"] is None else int(matched["high"]) if matched["high"] else None
        if high is not None and high < low:
            self.fail(f"{matched[0]} repeats at least {low} and at most {high} times")
        return low, high

    def atom(self) -> Node:
        start, character = self.at, self.peek()
        self.at += 1
        if character == "(":
            return self.group(start)
        if character == "[":
            return self.bracket(start)
        if character == ".":
            return without(ANY, one_of("\n"))
        if character == "\\":
            return self.escape()
        if character == "^" and start == 0 or character == "$" and self.at == len(self.pattern):
            return Sequence(())
        if character in ("^", "$"):
            self.fail(f"'{character}' inside a pattern is not supported (a literal one: \\{character})", start)
        return one_of(character)

    def group(self, start: int) -> Node:
        if not self.take("?:") and self.peek() == "?":
            self.fail("of the groups that start with (? only (?:...) is supported", start)
        node = self.either()
        if not self.take(")"):
            self.fail("this group is not closed by )", start)
        return node

    def escape(self) -> Characters:
        """What follows a backslash."""
        start, character = self.at - 1, self.peek()
        self.at += 1
        if character in CLASSES:
            return CLASSES[character]
        if character in CONTROLS:
            return one_of(CONTROLS[character])
        if character in ("x", "u"):
            size = 2 if character == "x" else 4
            digits = self.pattern[self.at:self.at + size]
            if not re.fullmatch(f"[0-9a-fA-F]{{{size}}}", digits):
                self.fail(f"\\{character} needs {size} hexadecimal digits", start)
            self.at += size
            code = int(digits, 16)
            return characters([(code, code)])
        if not character:
            self.fail("a backslash at the end escapes nothing", start)
        if character.isascii() and character.isalnum():
            self.fail(f"\\{character} is not supported", start)
        return one_of(character)

    def bracket(self, start: int) -> Characters:
        negated, ranges = self.take("^"), []
        first_member = self.at
        while self.at == first_member or not self.take("]"):  # a first ] is a literal one
            first = self.member(start)
            if self.peek() == "-" and self.pattern[self.at + 1:self.at + 2] not in ("", "]"):
                self.at += 1
                ranges.append(self.span(first, self.member(start), start))
            else:
                ranges.extend(first.ranges)
        chosen = characters(ranges)
        return without(ANY, chosen) if negated else chosen

    def member(self, start: int) -> Characters:
        if self.at >= len(self.pattern):
            self.fail("this class is not closed by ]", start)
        character = self.peek()
        self.at += 1
        return self.escape() if character == "\\" else one_of(character)

    def span(self, first: Characters, last: Characters, start: int) -> tuple[int, int]:
        ends = [end.ranges[0][0] for end in (first, last) if len(end.ranges) == 1 and len({*end.ranges[0]}) == 1]
        if len(ends) < 2 or ends[0] > ends[1]:
            self.fail("a range in this class does not go from a character to a later one", start)
        return ends[0], ends[1]
