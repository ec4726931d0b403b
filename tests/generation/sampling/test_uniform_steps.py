"""The sampler of uniform-state diffusion: its law after every step against transitions written from Bayes' rule."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from scipy import stats
from toy_blocks import QUICK, make_request, row_keys, settings
from toy_lm import MASK as LM_MASK
from toy_lm import make_lm

from bd3lm_jax.diffusion import Uniform
from bd3lm_jax.generation.sampling import SAMPLERS, DenoiserContext, Filters, start
from bd3lm_jax.generation.sampling.generate import Frame, open_block, step_block
from bd3lm_jax.generation.sampling.steps import Plan

KINDS, SIZE, STEPS = 3, 2, 3  # ids 0, 1, 2 and the mask, 3
TABLE = np.random.default_rng(2).normal(size=(SIZE, KINDS, KINDS)) * 1.5


def probabilities(place, other, level):
    """What the network says of x0 at a place, given the other letter."""
    odds = np.exp(TABLE[place, other] * (1.5 - level))
    return odds / odds.sum()


def network(canvas_BxS, block, previous, positions_BxP, level_B, cache):
    other = jnp.take_along_axis(canvas_BxS, 1 - positions_BxP, axis=1)
    logits = jnp.asarray(TABLE, jnp.float32)[positions_BxP, other] * (1.5 - level_B)[:, None, None]
    return jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=9.0), cache


def one_step(z, p_K, alpha_t, alpha_s):
    """q(x_s | x_t = z, x0 ~ p): over all x0 and x_s, the joint chance of the path to z, normalised."""
    return_from = jump(alpha_t / alpha_s)[:, z]
    law = return_from * (p_K @ jump(alpha_s))
    return law / law.sum()


def laws():
    law, found = dict.fromkeys(itertools.product(range(KINDS), repeat=SIZE), KINDS ** (-SIZE)), []
    for index in range(STEPS):
        t, s = 1 - index / STEPS, 1 - (index + 1) / STEPS
        after = dict.fromkeys(law, 0.0)
        for z, chance in law.items():
            rows = [one_step(z[i], probabilities(i, z[1 - i], t), 1 - t, 1 - s) for i in range(SIZE)]
            for outcome in after:
                after[outcome] += chance * np.prod([rows[i][outcome[i]] for i in range(SIZE)])
        law = after
        found.append(np.array(list(law.values())))
    return found


def jump(alpha):
    """Chance of the letter of the column after noise, given that of the row."""
    return alpha * np.eye(KINDS) + (1 - alpha) / KINDS


TEXTS = np.random.default_rng(5).dirichlet(np.ones(KINDS**SIZE)).reshape(KINDS, KINDS)  # of two letters


def exact_scores(canvas_BxS, block, previous, positions_BxP, level_B, cache):
    """log p_t(letter, other) / p_t(own, other), and junk for the own letter and the mask."""
    jump_BxKxK = (1 - level_B)[:, None, None] * jnp.eye(KINDS) + level_B[:, None, None] / KINDS
    joint_Bx2 = jnp.log(jnp.einsum("bik,ij,bjl->bkl", jump_BxKxK, jnp.asarray(TEXTS, jnp.float32), jump_BxKxK))
    other = jnp.take_along_axis(canvas_BxS, 1 - positions_BxP, axis=1)
    own = jnp.take_along_axis(canvas_BxS, positions_BxP, axis=1)
    rows = jnp.arange(len(own))[:, None]
    log_p = jnp.where(positions_BxP[..., None] == 0, joint_Bx2.swapaxes(1, 2)[rows, other], joint_Bx2[rows, other])
    scores = log_p - jnp.take_along_axis(log_p, own[..., None], axis=-1)
    scores = jnp.where(jnp.arange(KINDS) == own[..., None], 5.0, scores)
    return jnp.pad(scores, ((0, 0), (0, 0), (0, 1)), constant_values=9.0), cache


def log_probs_from_scores():
    """Both letters redrawn at once, each by its exact posterior given both at the level before: by enumeration."""
    law, found = np.full((KINDS, KINDS), KINDS**-SIZE), []
    for index in range(STEPS):
        t, s = 0.999 * (1 - index / STEPS), 0.999 * (1 - (index + 1) / STEPS)
        to_s, s_to_t = jump(1 - s), jump((1 - t) / (1 - s))
        # chance of x_s = (i, j) and x_t = (a, b)
        joint = np.einsum("xy,xi,yj,ia,jb->ijab", TEXTS, to_s, to_s, s_to_t, s_to_t)
        joint = joint / joint.sum((0, 1))
        law = np.einsum("ab,iab,jab->ij", law, joint.sum(1), joint.sum(0))
        found.append(law.ravel())
    return found


PRIOR, OWN, HALF, QUARTER = np.array([0.7, 0.2, 0.1]), 2, 0.5, 0.25  # x_t is letter 2 at t = 1/2; next: s = 1/4


def next_letters(junk, count=20_000, **filters):
    """How often each letter is drawn next, from exact scores with `junk` in the place of the own one."""
    noised = PRIOR @ jump(1 - HALF)
    scores = np.where(np.arange(KINDS) == OWN, junk, np.log(noised / noised[OWN]))
    logits = jnp.asarray([*scores, 9.0], jnp.float32)

    def plan(key, row, steps, threshold):
        return Plan(row.masked, row.masked, jnp.float32(HALF), jnp.float32(QUARTER))

    context = DenoiserContext(lambda canvas, block, previous, positions, level, cache: (
        jnp.broadcast_to(logits, (count, 1, KINDS + 1)), cache),
        SAMPLERS["uniform_scores"]._replace(plan=plan), settings(2, size=1)._replace(filters=Filters(**filters)))
    request = make_request(row_keys(count), 1)
    progress = start(context, request, jnp.zeros((count, 1), int), 0, jnp.zeros(()))
    block = open_block(Frame(context, request, progress))[0]._replace(canvas=jnp.full((count, 1), OWN))
    drawn = step_block(Frame(context, request, progress), block, jnp.zeros(())).canvas
    return np.bincount(np.asarray(drawn)[:, 0], minlength=KINDS)


@pytest.mark.parametrize("junk", some([-4.0, 0.0, 4.0], 1))
@pytest.mark.parametrize("filters, stay", [({}, 3), ({"top_p": 0.9}, 3), ({"top_p": 0.6}, 2), ({"top_p": 0.5}, 1),
                                           ({"top_k": 2}, 2), ({"min_p": 0.5}, 2), ({"temperature": 0.0}, 1),
                                           ({"temperature": 0.5}, 3)])
def test_filters_of_scores_do_not_read_the_own_one(junk, filters, stay):
    """Which letters x0 may be goes by the exact law of x_t given the others, (.517, .267, .217); the letter is drawn
    from the posterior given that x0 is one of them. Without a filter, and with top_p = .9: (.312, .120, .568)."""
    prior = np.where(np.arange(KINDS) < stay, PRIOR, 0.0) ** (1 / (filters.get("temperature") or 1.0))
    law = one_step(OWN, prior / prior.sum(), 1 - HALF, 1 - QUARTER)
    if stay == 3 and "temperature" not in filters:
        np.testing.assert_allclose(law, [0.312, 0.120, 0.568], atol=5e-4)
    found = next_letters(junk, **filters)
    assert stats.chisquare(found, found.sum() * law).pvalue > 1e-3


def blocks(keys_B, ask=network, sampler="uniform"):
    """Canvases after every step `[B, STEPS, SIZE]`, and what is still open at the end."""
    request = make_request(keys_B, SIZE)
    context = DenoiserContext(ask, SAMPLERS[sampler], settings(STEPS, size=SIZE))
    progress = start(context, request, jnp.zeros((keys_B.shape[0], SIZE), int), 0, jnp.zeros(()))
    block, cache = open_block(Frame(context, request, progress))
    canvases = [block.canvas]
    for _ in range(1, STEPS):
        assert block.masked.shape == (keys_B.shape[0], SIZE)
        block = step_block(Frame(context, request, progress), block, cache)
        canvases.append(block.canvas)
    return jnp.stack(canvases, 1), block.masked


@pytest.mark.parametrize("ask, sampler, expected", [(network, "uniform", laws),
                                                    (exact_scores, "uniform_scores", log_probs_from_scores)])
def test_law_of_every_step(ask, sampler, expected):
    written = functools.partial(blocks, ask=ask, sampler=sampler)
    canvases, masked = jax.jit(written, compiler_options=QUICK)(row_keys(8000))
    assert not np.asarray(masked).any() and np.asarray(canvases).max() < KINDS
    for step, law in enumerate(expected()):
        seen = np.bincount(np.asarray(canvases)[:, step] @ [KINDS, 1], minlength=KINDS**SIZE)
        assert law.sum() > 1 - 1e-9 and stats.chisquare(seen, 8000 * law).pvalue > 1e-3


@pytest.mark.ci_slow
def test_texts_of_a_model():
    """A prompt stays, nothing is a mask, and a text does not depend on what is written beside it."""
    lm = make_lm(Uniform(4, LM_MASK + 1, 1e-3))
    options = dict(length=10, sampler="uniform", steps=4, seed=1)
    alone, pair = lm.generate([[1, 2]], **options), lm.generate([[1, 2], [5]], **options)
    assert alone[0] == pair[0] and len(alone[0].tokens) <= 8 and LM_MASK not in alone[0].tokens
    assert alone[0].nfe <= 12  # four steps a block
