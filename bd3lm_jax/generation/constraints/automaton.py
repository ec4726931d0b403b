"""A constraint on the text that is written, as a finite automaton over tokens (used by sampling/constraint.py).

A regular expression (syntax: regex.py) or a JSON schema (json_schema.py) becomes an automaton over bytes (dfa.py), and
that one over tokens. The text must be accepted as a whole when the end token comes or when the length is full; after
the end token only end tokens follow. NumPy and Python only.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.generation.constraints.dfa import DEAD, START, Dfa, compile_node
from bd3lm_jax.generation.constraints.json_schema import schema_node
from bd3lm_jax.generation.constraints.regex import Node, parse

MAX_STATES = 4096
MAX_CELLS = 1 << 22  # states times token classes: 16 MiB, read once for every position of a block


class Automaton(NamedTuple):
    """State DEAD (0) leads nowhere, a text begins in START (1). Q, C and N are padded to powers of two.

    token_class int32 `[V]`: tokens of one class lead to the same states. transitions int32 `[Q, C]`: the state after a
    token of a class. reachable bool `[N, Q]`: whether exactly n more tokens can complete an accepted text.
    """

    token_class: np.ndarray
    transitions: np.ndarray
    reachable: np.ndarray


def build(constraint: str | dict, tokenizer: Tokenizer, vocab_size: int, available: Sequence[int],
          forbidden: Collection[int]) -> Automaton:
    """The automaton of a regular expression (text) or a JSON schema (dict) for the tokens of a tokenizer.

    vocab_size: V of the network. available: how many new tokens each request has. forbidden: ids that are never drawn.
    Raises UserError if the constraint is wrong, too large, or cannot be satisfied with the available tokens.
    """
    try:
        dfa = compile_node(constraint_node(constraint))
    except RecursionError:
        raise UserError("the constraint is nested too deep, with groups or schemas in hundreds of others: make it "
                        "simpler") from None
    return lift(dfa, *tokenizer.token_bytes(), tokenizer.end_id, vocab_size, available,
                {*forbidden, tokenizer.mask_id})


def constraint_node(constraint: str | dict) -> Node:
    """The syntax tree of a regular expression (text) or a JSON schema (dict)."""
    if isinstance(constraint, str):
        return parse(constraint)
    if isinstance(constraint, dict):
        return schema_node(constraint)
    raise UserError(f"constraint is {constraint!r}, expected a regular expression (text) or a JSON schema (dict)")


def lift(dfa: Dfa, first: list[bytes], later: list[bytes], end_id: int, vocab_size: int, available: Sequence[int],
         forbidden: Collection[int]) -> Automaton:
    """The automaton over tokens of one over bytes.

    first, later: bytes of each id as the first token and behind others (`Tokenizer.token_bytes`). end_id: -1 if there
    is none; then a text must fill its length exactly. Other arguments and errors: see `build`.
    """
    first, later = ([b"" if i in forbidden or i == end_id or i >= len(pieces) else pieces[i] for i in range(vocab_size)]
                    for pieces in (first, later))
    states, class_V, members = _explore(dfa, _Pieces(first), _Pieces(later))
    transitions = _table(dfa, states, [first[i] for i in members], [later[i] for i in members])
    accepting = dfa.accepting[states]
    if end_id >= 0 and end_id not in forbidden:
        class_V[end_id] = transitions.shape[1]
        transitions, accepting = _add_end(transitions, accepting)
    transitions, accepting, adjacency, distance = _trim(transitions, accepting)
    transitions, merged = np.unique(transitions, axis=1, return_inverse=True)
    if transitions.size > MAX_CELLS:
        raise UserError(f"the constraint needs {len(transitions)} states and tells {transitions.shape[1]} kinds of "
                        f"tokens apart, {transitions.size} cells, more than {MAX_CELLS}: make it simpler")
    reachable = _reachable(adjacency, accepting, max(available))
    _check_available(reachable[:, START], int(distance[START]), available)
    return Automaton(merged.reshape(-1)[class_V].astype(np.int32), _pad(transitions.astype(np.int32)), _pad(reachable))


class _Pieces:
    """The bytes of many tokens, to walk them all at once; tokens without bytes lead to DEAD."""

    def __init__(self, pieces: list[bytes]):
        self.order = np.array(sorted(range(len(pieces)), key=lambda i: -len(pieces[i])), np.int64)
        ordered = [pieces[i] for i in self.order]
        self.columns, start = [], len(ordered)
        for at in range(len(ordered[0])):
            while len(ordered[start - 1]) <= at:
                start -= 1
            self.columns.append(np.array([piece[at] for piece in ordered[:start]]))

    def after(self, dfa: Dfa, state: int) -> np.ndarray:
        """The state of `dfa` after each token, int `[V]`."""
        reached = np.full(len(self.order), state)
        for column in self.columns:
            reached[:len(column)] = dfa.transitions[reached[:len(column)], column]
        reached[len(self.columns[0]) if self.columns else 0:] = DEAD
        result = np.empty_like(reached)
        result[self.order] = reached
        return result


def _explore(dfa: Dfa, first: _Pieces, later: _Pieces) -> tuple[list[int], np.ndarray, np.ndarray]:
    """States between tokens (DEAD, the start, then those behind tokens), class of each token, a token of each class."""
    states, visited = [DEAD, START], {DEAD}
    class_V, members = np.zeros(len(first.order), np.int64), np.zeros(1, np.int64)
    done = 1
    while done < len(states):
        row_V = (first if done == 1 else later).after(dfa, states[done])
        new = [state for state in np.unique(row_V).tolist() if state not in visited]
        visited.update(new)
        states.extend(new)
        if len(states) > MAX_STATES:
            raise UserError(f"the constraint needs more than {MAX_STATES} states: make it simpler")
        if (row_V[members][class_V] != row_V).any():
            _, members, class_V = np.unique(class_V * len(dfa.accepting) + row_V, return_index=True,
                                            return_inverse=True)
        done += 1
    return states, class_V, members


def _table(dfa: Dfa, states: list[int], first: list[bytes], later: list[bytes]) -> np.ndarray:
    """Transitions `[Q, C]` between indices of `states`, for one token of each class."""
    index = np.zeros(len(dfa.accepting), np.int64)
    index[states[2:]] = np.arange(2, len(states))
    later_pieces = _Pieces(later)
    rows = [_Pieces(first).after(dfa, START), *(later_pieces.after(dfa, state) for state in states[2:])]
    return np.concatenate([np.full((1, len(first)), DEAD), index[np.stack(rows)]])


def _add_end(transitions_QxC: np.ndarray, accepting_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One class more, the end token, and one state more, behind it."""
    states, classes = transitions_QxC.shape
    transitions = np.pad(transitions_QxC, ((0, 1), (0, 1)), constant_values=DEAD)
    accepting = np.append(accepting_Q, True)
    transitions[accepting, classes] = states
    return transitions, accepting


def _trim(transitions_QxC: np.ndarray, accepting_Q: np.ndarray) -> tuple[np.ndarray, ...]:
    """Without the states that cannot accept any more: transitions, accepting, which state leads to which `[Q, Q]`, and
    the fewest tokens from each state to acceptance (-1: none)."""
    adjacency = np.zeros((len(accepting_Q),) * 2, bool)
    adjacency[np.arange(len(accepting_Q))[:, None], transitions_QxC] = True
    distance, frontier, steps = np.where(accepting_Q, 0, -1), accepting_Q, 0
    while frontier.any():
        steps += 1
        frontier = adjacency[:, frontier].any(axis=1) & (distance < 0)
        distance[frontier] = steps
    alive = distance >= 0
    alive[[DEAD, START]] = True
    index = np.where(alive, np.cumsum(alive) - 1, DEAD)
    return index[transitions_QxC[alive]], accepting_Q[alive], adjacency[np.ix_(alive, alive)], distance[alive]


def _reachable(adjacency_QxQ: np.ndarray, accepting_Q: np.ndarray, tokens: int) -> np.ndarray:
    """bool `[tokens + 1, Q]`: whether exactly n more tokens can lead to acceptance."""
    leads = adjacency_QxQ.astype(np.float32)
    rows = np.zeros((tokens + 1, len(accepting_Q)), bool)
    rows[0] = accepting_Q
    for n in range(tokens):
        rows[n + 1] = leads @ rows[n].astype(np.float32) > 0
        if (rows[n + 1] == rows[n]).all():
            rows[n + 1:] = rows[n]
            break
    return rows


def _check_available(reachable_N: np.ndarray, shortest: int, available: Sequence[int]) -> None:
    for request, tokens in enumerate(available):
        if reachable_N[tokens]:
            continue
        if shortest < 0:
            raise UserError("no text made of the tokens of this vocabulary satisfies the constraint")
        if tokens < shortest:
            raise UserError(f"the constraint needs at least {shortest} tokens, and request {request} has {tokens} to "
                            "write: raise the length or shorten the prompt")
        raise UserError(f"no text of exactly the {tokens} tokens of request {request} satisfies the constraint (the "
                        f"shortest has {shortest}), and there is no end token to stop before")


def _pad(table: np.ndarray) -> np.ndarray:
    """With zeros (DEAD, False) up to powers of two, so that few shapes compile."""
    return np.pad(table, [(0, (1 << (size - 1).bit_length()) - size) for size in table.shape])
