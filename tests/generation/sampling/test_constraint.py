"""Constrained canvases against the law by enumeration, Viterbi against brute force, JSON written by a toy sampler."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from scipy import special, stats
from toy_text import END, MASK, PIECES, VOCAB, completable

from bd3lm_jax.data.tokenizers import ByteTokenizer
from bd3lm_jax.generation.constraints.automaton import Automaton, build, lift
from bd3lm_jax.generation.constraints.dfa import START, compile_node
from bd3lm_jax.generation.constraints.regex import parse
from bd3lm_jax.generation.sampling.constraint import (
    BlockState,
    Constraint,
    advance,
    constrained_marginals,
    draw_constrained,
    make_block_state,
)
from bd3lm_jax.generation.sampling.filters import sample_categorical

SIZE = 3
CANVASES = list(itertools.product(range(VOCAB), repeat=SIZE))
drawn_jit = jax.jit(draw_constrained, static_argnames="greedy")
marginals_jit = jax.jit(constrained_marginals)


def toy(pattern: str, available: int = 8) -> Automaton:
    return lift(compile_node(parse(pattern)), PIECES, PIECES, END, VOCAB, [available], {MASK})


def keys(batch: int, size: int = SIZE, seed: int = 0):
    return jax.random.split(jax.random.key(seed), (batch, size))


def logits(seed: int, scale: float = 1.5, batch: int = 1):
    values = np.random.default_rng(seed).normal(size=(batch, SIZE, VOCAB)).astype(np.float32) * scale
    values[..., MASK] = -np.inf
    return values


def row(canvas=(0,) * SIZE, fixed=(), outside=(), state=START, after=0, batch=1) -> BlockState:
    """The same row `batch` times; fixed and outside are positions."""
    places = np.arange(SIZE)
    masks = np.isin(places, fixed), np.isin(places, outside)
    parts = np.array(canvas, np.int32), *masks, np.int32(state), np.int32(after)
    return BlockState(*(jnp.asarray(np.broadcast_to(part, (batch, *part.shape))) for part in parts))


def allowed(pattern, before=(), canvas=(), fixed=(), outside=(), after=0) -> np.ndarray:
    """Of each of CANVASES: whether it keeps what it must and the text behind `before` can be completed."""
    kept = [i for i in range(SIZE) if i in fixed or i in outside]
    return np.array([all(x[i] == canvas[i] for i in kept) and completable(
        pattern, (*before, *(x[i] for i in range(SIZE) if i not in outside)), after) for x in CANVASES])


CASES = [
    ("(ab)*", {}), ("(ab)*", {"after": 1}), ("a{2,5}b?", {"after": 2}),
    ("(a|bb)*ba", {"canvas": (0, 1, 0), "fixed": (1,), "after": 1}),
    ("b(a|b){0,6}", {"canvas": (0, 0, 5), "fixed": (2,)}),
    ("(ab)*", {"canvas": (1, 0, 0), "outside": (0,), "before": ()}),
    ("(a|bb)*ba", {"canvas": (0, 0, 1), "outside": (2,), "fixed": (1,), "before": (0,)}),
    ("a{2,5}b?", {"before": (0, 0), "after": 1}),
]


def prepare(pattern, case, batch=1):
    """The automaton, what `draw_constrained` is told, and which of CANVASES it may draw."""
    found, options = toy(pattern), dict(case)
    before = options.pop("before", ())
    state = START
    if before:
        state = advance(found, jnp.array([START]), jnp.array([before]), jnp.zeros((1, len(before)), bool))[0]
    block_state = row(**options, state=int(state), batch=batch)
    return found, block_state, allowed(pattern, before, **options)


def law(logits_SxV, ok_N, case) -> np.ndarray:
    """Log of the unnormalised probability of each of CANVASES; what is given weighs nothing."""
    free = [i for i in range(SIZE) if i not in (*case.get("fixed", ()), *case.get("outside", ()))]
    weights = np.array([sum(float(logits_SxV[i, x[i]]) for i in free) for x in CANVASES])
    return np.where(ok_N, weights, -np.inf)


@pytest.mark.parametrize("pattern, case", CASES)
def test_joint_law(pattern, case):
    draws = 20000
    found, block_state, ok_N = prepare(pattern, case, draws)
    values = logits(1)
    logp = jnp.broadcast_to(values, (draws, SIZE, VOCAB))
    tokens, total = drawn_jit(keys(draws), logp, logp, block_state, found, greedy=False)
    expected = law(values[0], ok_N, case)
    np.testing.assert_allclose(total, special.logsumexp(expected), rtol=1e-5)
    counts = np.bincount(np.asarray(tokens) @ [VOCAB ** 2, VOCAB, 1], minlength=len(CANVASES))
    assert ok_N.sum() > 1 and counts[~ok_N].sum() == 0
    probs = np.exp(expected - special.logsumexp(expected))
    rare = probs * draws < 5
    counts, probs = (np.append(x[~rare], x[rare].sum()) for x in (counts, probs))
    kept = probs > 0
    assert stats.chisquare(counts[kept], probs[kept] * draws).pvalue > 1e-3


@pytest.mark.parametrize("pattern, case", CASES)
def test_marginals(pattern, case):
    found, block_state, ok_N = prepare(pattern, case)
    values = logits(2)
    log_marginals = np.asarray(marginals_jit(values, block_state, found), np.float64)[0]
    weights = law(values[0], ok_N, case)
    probs = np.exp(weights - special.logsumexp(weights))
    kept = {*case.get("fixed", ()), *case.get("outside", ())}
    np.testing.assert_array_equal(log_marginals[list(kept)], values[0][list(kept)])
    for i in set(range(SIZE)) - kept:
        expected = np.bincount([x[i] for x in CANVASES], probs, VOCAB)
        np.testing.assert_allclose(np.exp(log_marginals[i]), expected, atol=1e-5)


@pytest.mark.parametrize("pattern, case", CASES)
def test_greedy_is_the_most_probable_canvas(pattern, case):
    found, block_state, ok_N = prepare(pattern, case, 20)
    values = logits(3, batch=20)
    tokens, total = drawn_jit(keys(20), jnp.full_like(values, -jnp.inf), values, block_state, found, greedy=True)
    for logits_SxV, found_S, found_total in zip(values, np.asarray(tokens), total):
        weights = law(logits_SxV, ok_N, case)
        assert tuple(found_S.tolist()) == CANVASES[weights.argmax()]
        assert found_total == pytest.approx(weights.max(), rel=1e-5)


def test_filters_that_leave_nothing_accepted_are_dropped_for_their_row_alone():
    found, values = toy("(ab)*"), logits(4, batch=2)
    filtered = values.copy()
    filtered[0, 1] = np.where(np.arange(VOCAB) == 3, 0.0, -np.inf)  # "ba" in the middle: needs "a" before
    filtered[1, 0] = np.where(np.arange(VOCAB) == 1, 0.0, -np.inf)  # no text begins with "b"
    block_state = row(batch=2)
    tokens, _ = drawn_jit(keys(2), filtered, values, block_state, found, greedy=False)
    expected, _ = drawn_jit(keys(2), np.stack([filtered[0], values[1]]), values, block_state, found, greedy=False)
    np.testing.assert_array_equal(tokens, expected)
    assert tokens[0, 1] == 3 and allowed("(ab)*")[CANVASES.index(tuple(tokens[1].tolist()))]


def test_a_row_does_not_depend_on_the_others():
    found, values = toy("(a|bb)*ba"), logits(5, batch=8)
    block_state = row(after=2, batch=8)._replace(after=jnp.arange(8) % 4)
    together, _ = drawn_jit(keys(8), values, values, block_state, found, greedy=False)
    for i in range(8):
        one_key, one_value, one_known = jax.tree.map(lambda x: x[i:i + 1], (keys(8), values, block_state))
        alone, _ = drawn_jit(one_key, one_value, one_value, one_known, found, greedy=False)
        np.testing.assert_array_equal(alone[0], together[i])


def test_a_constraint_that_allows_everything_changes_no_draw():
    """Not even the token: the noise of a position is that of an unconstrained draw."""
    everything = Automaton(np.zeros(VOCAB, np.int32), np.array([[0], [1]], np.int32), np.array([[False, True]] * 4))
    values = logits(6, batch=50)
    tokens, _ = drawn_jit(keys(50), values, values, row(batch=50), everything, greedy=False)
    plain = sample_categorical(keys(50).reshape(-1), values.reshape(-1, VOCAB)).reshape(50, SIZE)
    np.testing.assert_array_equal(tokens, plain)


def test_tokens_that_are_almost_impossible_are_drawn_when_they_must_be():
    found, values = toy("(ab)+b"), logits(7)
    values[..., [1, 2]] -= 500.0
    tokens, total = drawn_jit(keys(1), values, values, row(canvas=(0, 0, 5), fixed=(2,)), found, greedy=False)
    assert tokens[0].tolist() == [2, 1, 5]
    assert total[0] == pytest.approx(values[0, 0, 2] + values[0, 1, 1], rel=1e-6)


def test_another_constraint_of_the_same_size_is_no_other_program():
    traces = []

    @jax.jit
    def sample(*arguments):
        traces.append(1)
        return draw_constrained(*arguments, greedy=False)

    for pattern in ("(ab)*", "(ba)*"):
        sample(keys(1), logits(8), logits(8), row(), toy(pattern))
    assert len(traces) == 1


@pytest.mark.parametrize("greedy", some([False, True], 0))
def test_json_from_a_sampler_of_random_logits_in_any_order(greedy):
    """Blocks of 16 of which a random part is revealed at a time, the first and the last one only partly asked for."""
    schema = {"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["é", "b\n"]}, "maxItems": 2}}}
    tokenizer, batch, size, prompt, length = ByteTokenizer(), 4, 16, 5, 75
    found, rng = build(schema, tokenizer, tokenizer.vocab_size, [length - prompt], ()), np.random.default_rng(0)
    constraint, write = Constraint(found), jax.jit(Constraint.best if greedy else Constraint.sample)
    state, texts = constraint.start(batch), []
    for start in range(0, length, size):
        places = np.arange(start, start + size)
        given = jnp.broadcast_to(places < prompt, (batch, size))
        canvas, masked = jnp.full((batch, size), tokenizer.mask_id), ~given
        for step in range(3):
            values = rng.normal(size=(batch, size, tokenizer.vocab_size)).astype(np.float32) * 3
            values[..., tokenizer.mask_id] = -np.inf
            filtered = np.where(values < np.sort(values)[..., -9:-8], -np.inf, values)
            block_state = make_block_state(state, canvas, masked, given, jnp.full(batch, length - start - size))
            drawn = write(constraint, keys(batch, size, start + step), filtered, values, block_state)
            reveal = masked & ((rng.random((batch, size)) < 0.4) | (step == 2))
            canvas, masked = jnp.where(reveal, drawn, canvas), masked & ~reveal
        state = constraint.advance(state, canvas, ~given)
        texts.append(np.asarray(canvas)[:, (places >= prompt) & (places < length)])
    for tokens in np.concatenate(texts, axis=1):
        text = tokens[:np.append(np.flatnonzero(tokens == tokenizer.end_id), len(tokens))[0]]
        value = json.loads(tokenizer.decode(text))
        assert list(value) == ["name", "age", "tags"] and len(value["name"]) <= 12 and isinstance(value["age"], int)
        assert len(value["tags"]) <= 2 and set(value["tags"]) <= {"é", "b\n"}
