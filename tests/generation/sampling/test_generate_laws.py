"""Distributions of texts on a toy whose every conditional is known: those of the joint, or a law of the sampler."""

import functools
import itertools

import numpy as np
import pytest
from grids import some
from scipy import stats
from toy_blocks import (
    JOINT,
    KINDS,
    LENGTH,
    MASK,
    PVALUE,
    SIZE,
    conditional,
    many,
    pvalue,
    settings,
    texts_and_blocks,
)

RUNS = 2000


def law_of_orders(orders):
    """Probability of every text if each block is revealed in a random one of `orders` (a time for each position).

    Tokens revealed at the same time are drawn independently given all that is known before.
    """
    result = np.ones_like(JOINT)
    for outcome, befores in texts_and_blocks():
        for first, before in zip(range(0, LENGTH, SIZE), befores):
            chance = 0.0
            for times in orders:
                parts = []
                for i, time in enumerate(times):
                    known = [outcome[first + j] if times[j] < time else MASK for j in range(SIZE)]
                    known = (*before[:first], *known, *before[first + SIZE:])
                    parts.append(conditional(known, first + i)[outcome[first + i]])
                chance += np.prod(parts) / len(orders)
            result[outcome] *= chance
    return result


CANVASES = list(itertools.product(range(KINDS + 1), repeat=SIZE))


def law_of_steps(moves):
    """Probability of every text if the canvas of a block takes these steps: each a function that gives, for a canvas,
    pairs (probability, what each position does: "draw", "mask" or "keep")."""
    @functools.cache
    def block_law(before, first):
        chances = {(MASK,) * SIZE: 1.0}
        for move in moves:
            after = dict.fromkeys(CANVASES, 0.0)
            for canvas, chance in chances.items():
                known = (*before[:first], *canvas, *before[first + SIZE:])
                drawn = [conditional(known, first + i) for i in range(SIZE)]
                for part, acts in move(canvas):
                    options = [{"draw": enumerate(drawn[i]), "mask": [(MASK, 1.0)], "keep": [(canvas[i], 1.0)]}[act]
                               for i, act in enumerate(acts)]
                    for tokens in itertools.product(*options):
                        after[tuple(k for k, _ in tokens)] += chance * part * np.prod([p for _, p in tokens])
            chances = {canvas: chance for canvas, chance in after.items() if chance}
        return chances

    result = np.ones_like(JOINT)
    for outcome, befores in texts_and_blocks():
        for first, before in zip(range(0, LENGTH, SIZE), befores):
            result[outcome] *= block_law(before, first).get(outcome[first:first + SIZE], 0.0)
    return result


def bernoulli_move(t, s, again):
    """From mask probability t to s, written tokens masked again with probability `again` (ReMDM eq. 5-7)."""
    def move(canvas):
        chances = [{"draw": (t - s + (1 - t) * again) / t} if k == MASK else {"mask": again} for k in canvas]
        for acts in itertools.product((True, False), repeat=SIZE):
            names, part = [], 1.0
            for act, chance in zip(acts, chances):
                (name, p), = chance.items()
                names.append(name if act else "keep")
                part *= p if act else 1 - p
            if part:
                yield part, names
    return move


def redraw_move(masks):
    """Everything is drawn anew, then `masks` positions, any with equal probability, become masks."""
    chosen = list(itertools.combinations(range(SIZE), masks))

    def move(canvas):
        if MASK not in canvas:
            return [(1.0, ["keep"] * SIZE)]
        return [(1 / len(chosen), ["mask" if i in places else "draw" for i in range(SIZE)]) for places in chosen]
    return move


def moves(levels, again=lambda t, s: 0.0):
    return [bernoulli_move(t, s, again(t, s)) for t, s in itertools.pairwise(levels)]


def most(t, s):
    return 1.0 if t == 1 else min(1.0, s / (1 - t))


GRID_4 = [1, 0.75, 0.5, 0.25, 0]
LOOP_4 = [1, 0.5, 0.1, 0.1, 0]  # down over the first 0.45, held at 0.1 up to 0.95
OWN_LAWS = {
    "ancestral": (2, 0.0, moves([1, 0.5, 0])),
    "ancestral_cosine": (3, 0.0, moves([1, np.cos(np.pi / 6), np.cos(np.pi / 3), 0])),
    "remdm_cap": (4, 0.6, moves(GRID_4, lambda t, s: min(0.6, most(t, s)))),
    "remdm_rescale": (4, 0.7, moves(GRID_4, lambda t, s: 0.7 * most(t, s))),
    "remdm_loop": (4, 0.08, moves(LOOP_4, lambda t, s: 0.08 if t == s else 0.0)),
    "iterative": (3, 0.0, [redraw_move(2), redraw_move(1), redraw_move(0)]),
}


@pytest.mark.parametrize("sampler", some(OWN_LAWS, 0, 1))
def test_few_steps_follow_their_own_law(sampler):
    """The law by enumeration; that of the joint they miss."""
    steps, threshold, steps_taken = OWN_LAWS[sampler]
    expected = law_of_steps(steps_taken)
    assert expected.sum() == pytest.approx(1)
    tokens, nfe = many(sampler, settings(steps=steps), RUNS, threshold=threshold)
    assert tokens.max() < MASK
    assert pvalue(tokens.reshape(-1, LENGTH), expected) > PVALUE > pvalue(tokens.reshape(-1, LENGTH), JOINT)
    if sampler == "ancestral":  # a block costs one call if all three times agree (1/4), else two
        np.testing.assert_allclose(expected, law_of_orders(list(itertools.product(range(2), repeat=SIZE))))
        assert stats.chisquare(np.bincount(nfe.reshape(-1), minlength=5)[2:],
                               nfe.size * np.array([1, 6, 9]) / 16).pvalue > PVALUE


def test_first_hitting_is_exact():
    assert np.allclose(law_of_orders(list(itertools.permutations(range(SIZE)))), JOINT)  # one by one, in any order
    tokens, nfe = many("first_hitting", settings(), RUNS)
    assert pvalue(tokens.reshape(-1, LENGTH), JOINT) > PVALUE
    for row in range(5):
        first_block = JOINT.sum((3, 4, 5))
        assert pvalue(tokens[:, row, :SIZE], first_block) > PVALUE
    # Rows of one batch are independent: the first blocks of rows 0 and 1 against the product.
    pairs = np.concatenate([tokens[:, 0, :2], tokens[:, 1, :2]], axis=1)
    two = JOINT.sum((2, 3, 4, 5))
    assert pvalue(pairs, np.multiply.outer(two, two)) > PVALUE
    np.testing.assert_array_equal(nfe, LENGTH)


@pytest.mark.parametrize("steps, times", some([(1, (0, 0, 0)), (2, (0, 0, 1)), (3, (0, 1, 2)), (4, (0, 1, 2))], 2))
def test_random_order_follows_its_own_law(steps, times):
    """Equal parts in every order alike, drawn independently inside a part; the joint with a step a position."""
    expected = law_of_orders(sorted(set(itertools.permutations(times))))
    assert expected.sum() == pytest.approx(1)
    tokens, nfe = many("random_order", settings(steps=steps), RUNS)
    assert pvalue(tokens.reshape(-1, LENGTH), expected) > PVALUE
    exact = steps >= SIZE
    assert np.allclose(expected, JOINT) == exact == (pvalue(tokens.reshape(-1, LENGTH), JOINT) > PVALUE)
    np.testing.assert_array_equal(nfe, 2 * (max(times) + 1))


@pytest.mark.ci_slow
@pytest.mark.parametrize("sampler, threshold", some([("ancestral", 0.0), ("remdm_rescale", 0.3)], 0))
def test_many_steps_follow_the_joint(sampler, threshold):
    tokens, _ = many(sampler, settings(steps=32), RUNS, threshold=threshold)
    assert pvalue(tokens.reshape(-1, LENGTH), JOINT) > PVALUE
