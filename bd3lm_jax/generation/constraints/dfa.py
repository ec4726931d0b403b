"""The smallest finite automaton over the UTF-8 bytes of the texts that an expression accepts.

Thompson's construction, subset construction, Hopcroft's partition (Hopcroft, Motwani, Ullman, Introduction to Automata
Theory, sections 2.3, 3.2 and 4.4).
"""

import collections
import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation.constraints.regex import LAST_CHARACTER, Either, Node, Repeat, Sequence

DEAD, START = 0, 1  # the first two states: nothing leads out of DEAD
MAX_PARTS = 100_000  # states before determinisation, which repetitions multiply
MAX_STATES = 10_000
ENCODED_LENGTHS = (0x7F, 0x7FF, 0xFFFF, LAST_CHARACTER)  # last characters of 1, 2, 3 and 4 bytes


class Dfa(NamedTuple):
    """transitions int32 `[Q, 256]`: the state after a byte; accepting bool `[Q]`. Every state but DEAD can accept."""

    transitions: np.ndarray
    accepting: np.ndarray


def compile_node(node: Node) -> Dfa:
    """The automaton of a syntax tree. UserError if it is too large or if no text matches."""
    nfa = _Nfa()
    end = nfa.add(node, nfa.new())
    return _minimise(*_determinise(nfa, end))


class _Nfa:
    """Edges of each state: ranges of bytes with targets, and targets that need no byte. State 0 is the start."""

    def __init__(self):
        self.edges: list[list[tuple[int, int, int]]] = []
        self.empty: list[list[int]] = []

    def new(self) -> int:
        if len(self.edges) >= MAX_PARTS:
            raise UserError(f"the expression needs more than {MAX_PARTS} parts: make its repetitions {{m,n}} smaller")
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1

    def add(self, node: Node, start: int) -> int:
        """Adds the node behind state `start`; the state behind the node."""
        if isinstance(node, Sequence):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Repeat):
            return self.add_repeat(node, start)
        end = self.new()
        if isinstance(node, Either):
            for option in node.options:
                self.empty[self.add(option, self.split(start))].append(end)
            return end
        for low, high in node.ranges:
            for path in _utf8_ranges(low, high):
                state = start
                for first, last in path[:-1]:
                    state, previous = self.new(), state
                    self.edges[previous].append((first, last, state))
                self.edges[state].append((*path[-1], end))
        return end

    def add_repeat(self, node: Repeat, start: int) -> int:
        start = self.split(start)
        for _ in range(node.low):
            start = self.add(node.part, self.split(start))
        if node.high is None:
            loop = self.split(start)
            self.empty[self.add(node.part, loop)].append(loop)
            return self.split(loop)
        end = self.new()
        for _ in range(node.high - node.low):
            self.empty[start].append(end)
            start = self.add(node.part, self.split(start))
        self.empty[start].append(end)
        return end

    def split(self, start: int) -> int:
        """A new state that `start` leads to without a byte."""
        state = self.new()
        self.empty[start].append(state)
        return state

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """The states and all that they lead to without a byte."""
        reachable, waiting = set(states), list(states)
        while waiting:
            for target in self.empty[waiting.pop()]:
                if target not in reachable:
                    reachable.add(target)
                    waiting.append(target)
        return frozenset(reachable)


def _utf8_ranges(low: int, high: int) -> list[list[tuple[int, int]]]:
    """Sequences of byte ranges whose products are the UTF-8 forms of code points low..high."""
    for last in ENCODED_LENGTHS:
        if low <= last < high:
            return _utf8_ranges(low, last) + _utf8_ranges(last + 1, high)
    if high > ENCODED_LENGTHS[0]:
        for bits in (6, 12, 18):  # both ends must agree above a continuation byte, or the rest must be complete
            rest = (1 << bits) - 1
            if low >> bits != high >> bits:
                cut = low | rest if low & rest else (high & ~rest) - 1 if high & rest != rest else None
                if cut is not None:
                    return _utf8_ranges(low, cut) + _utf8_ranges(cut + 1, high)
    return [list(zip(chr(low).encode(), chr(high).encode(), strict=True))]


def _determinise(nfa: _Nfa, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Complete table `[Q, 256]` over sets of NFA states, and which of them accept."""
    cuts = sorted({0, 256} | {cut for edges in nfa.edges for low, high, _ in edges for cut in (low, high + 1)})
    group_of = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))  # bytes that no edge tells apart
    closure_of = functools.cache(nfa.closure)
    start = closure_of(frozenset([0]))
    index, waiting, rows = {frozenset(): DEAD, start: START}, [start], [[DEAD] * (len(cuts) - 1)]
    while len(rows) <= len(waiting):
        targets: list[set[int]] = [set() for _ in cuts[1:]]
        for state in waiting[len(rows) - 1]:
            for low, high, target in nfa.edges[state]:
                for group in range(group_of[low], group_of[high] + 1):
                    targets[group].add(target)
        row = []
        for reached in targets:
            states = closure_of(frozenset(reached))
            if states not in index:
                index[states] = len(index)
                waiting.append(states)
                if len(index) > MAX_STATES:
                    raise UserError(f"the expression needs more than {MAX_STATES} states: make it simpler")
            row.append(index[states])
        rows.append(row)
    accepting = np.array([False, *(end in states for states in waiting)])
    return np.array(rows, np.int32)[:, group_of], accepting


def _minimise(table_Qx256: np.ndarray, accepting_Q: np.ndarray) -> Dfa:
    """Merges states that accept the same rest; DEAD stays 0 and START 1."""
    part = _equivalent(np.unique(table_Qx256, axis=1), accepting_Q)
    if part[START] == part[DEAD]:
        raise UserError("the expression matches no text")
    order = list(dict.fromkeys(part.tolist()))  # parts by their first state
    rank = np.argsort(order)
    first = np.unique(part, return_index=True)[1][order]
    return Dfa(rank[part[table_Qx256[first]]].astype(np.int32), accepting_Q[first])


def _equivalent(columns_QxG: np.ndarray, accepting_Q: np.ndarray) -> np.ndarray:
    """The part of each state in Hopcroft's coarsest partition: one part, one accepted rest."""
    part = accepting_Q.astype(np.int64)
    parts = [set(np.flatnonzero(~accepting_Q).tolist()), set(np.flatnonzero(accepting_Q).tolist())]
    sources = [[[] for _ in part] for _ in columns_QxG.T]
    for state, targets in enumerate(columns_QxG.tolist()):
        for group, target in enumerate(targets):
            sources[group][target].append(state)
    waiting = {0, 1}
    while waiting:
        splitter = list(parts[waiting.pop()])
        for before in sources:
            reached = collections.defaultdict(set)
            for state in itertools.chain.from_iterable(before[target] for target in splitter):
                reached[part[state]].add(state)
            for old, inside in reached.items():
                if len(inside) == len(parts[old]):
                    continue
                if 2 * len(inside) > len(parts[old]):
                    inside, parts[old] = parts[old] - inside, inside
                else:
                    parts[old] -= inside
                part[list(inside)] = len(parts)
                waiting.add(len(parts))
                parts.append(inside)
    return part
