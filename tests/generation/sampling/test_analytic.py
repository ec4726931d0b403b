"""SEDD's analytic sampler: published primitives, and its law against transition matrices written from the paper."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from places import GOLDEN
from scipy import stats
from toy_blocks import (
    KINDS,
    LENGTH,
    MASK,
    PVALUE,
    QUICK,
    SIZE,
    begin,
    conditional,
    denoise,
    make_request,
    row_keys,
    settings,
)
from toy_lm import make_lm

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import SEDD
from bd3lm_jax.generation.sampling import SAMPLERS, DenoiserContext
from bd3lm_jax.generation.sampling.generate import Frame, open_block, step_block
from bd3lm_jax.generation.sampling.steps import Row, TokenStats

STEPS = 3


def total(place, level, untied):
    """Z of the toy's scores: of its own at every place and level; 1 if they are tied to probabilities."""
    return 1 + untied * (0.3 * (place + 1) - 0.5 * level)


@functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
def first_blocks(keys_RxB, untied):
    """First blocks of texts as the loop leaves them after every step `[R, B, STEPS, SIZE]`, a network of scores."""
    def network(canvas, block, previous, positions, level_B, stored):
        logits, stored = denoise(canvas, block, previous, positions, level_B, stored)
        tied = jax.nn.log_softmax(logits[..., :KINDS]) + math.log(KINDS)
        tied = tied + jnp.log(total(positions, level_B[:, None], untied))[..., None]
        return jnp.pad(tied, ((0, 0), (0, 0), (0, 1)), constant_values=9.0), stored

    def write(keys_B):
        request = make_request(keys_B, LENGTH)
        context = DenoiserContext(network, SAMPLERS["analytic"], settings(STEPS))
        progress = begin(context, request, jnp.zeros((keys_B.shape[0], LENGTH), int))
        block, cache = open_block(Frame(context, request, progress))
        canvases = [block.canvas]
        for _ in range(1, STEPS):
            block = step_block(Frame(context, request, progress), block, cache)
            canvases.append(block.canvas)
        return jnp.stack(canvases, 1)

    return jax.vmap(write)(keys_RxB)


def transition(score_Y, x, step):
    """Law of a token after a step of the level: staggered score times transition (SEDD, section 4.2), absorbing graph.

    score_Y: s_y for every value y, 1 for x itself, which is the mask (the last value) or never changes.
    """
    if x != MASK:
        return np.eye(KINDS + 1)[x]
    staggered = math.exp(step) * score_Y
    staggered[MASK] += (1 - math.exp(step)) * score_Y.sum()
    stays = np.where(np.arange(KINDS + 1) == MASK, 1.0, 1 - math.exp(-step))  # from y to the mask
    law = np.maximum(staggered * stays, 0)
    return law / law.sum() if law[:MASK].sum() > 1 else law


def laws_of_blocks(untied):
    """Probability of every block after each of STEPS - 1 analytic steps and the step that denoises."""
    law, laws = {(MASK,) * SIZE: 1.0}, []
    for index in range(STEPS):
        level, s = 1 - index / STEPS, 1 - (index + 1) / STEPS
        t = min(level, 1 - 1e-7)  # the limit of an infinite sigma
        after = {}
        for state, chance in law.items():
            marginals = []
            for place, x in enumerate(state):
                p = conditional((*state, *[MASK] * (LENGTH - SIZE)), place)
                score = np.append(p * total(place, level, untied) * (1 - t) / t, 1.0)
                row = transition(score, x, math.log((1 - s) / (1 - t)))
                if index == STEPS - 1 and x == MASK:
                    row = np.append(p, 0.0)
                marginals.append(row)
            for outcome in itertools.product(range(KINDS + 1), repeat=SIZE):
                part = chance * np.prod([row[y] for row, y in zip(marginals, outcome)])
                after[outcome] = after.get(outcome, 0.0) + part
        law = after
        states = [law.get(state, 0.0) for state in itertools.product(range(KINDS + 1), repeat=SIZE)]
        laws.append(np.array(states).reshape((KINDS + 1,) * SIZE))
    return laws


def pvalues(untied, supposed):
    """Of the blocks after every step of scores with one Z against the law with another."""
    blocks = np.asarray(first_blocks(row_keys(8000).reshape(1600, 5), untied)).reshape(-1, STEPS, SIZE)
    found = []
    for step, law in enumerate(laws_of_blocks(supposed)):
        assert law.sum() == pytest.approx(1)
        seen = np.bincount(np.ravel_multi_index(blocks[:, step].T, law.shape), minlength=law.size)
        possible = law.ravel() > 0
        assert not seen[~possible].any()
        found.append(stats.chisquare(seen[possible], len(blocks) * law.ravel()[possible]).pvalue)
    return found


@pytest.mark.parametrize("untied", some([1.0, 0.0], 0))
def test_law_of_every_step(untied):
    assert min(pvalues(untied, untied)) > PVALUE


def test_the_scores_total_matters():
    assert max(pvalues(1.0, 0.0)[:-1]) < 1e-6


@pytest.mark.parametrize("index", range(1, 4))
def test_scores_tied_to_probabilities_are_ancestral(index):
    """A masked token stays masked with probability s / t."""
    row = Row(jnp.ones(20_000, bool), jnp.zeros(20_000, bool), jnp.ones(20_000), jnp.ones(()), index)
    uniform = (jnp.arange(20_000) + 0.5) / 20_000
    token_stats = TokenStats(uniform, uniform, uniform, jnp.zeros(20_000), uniform)
    shown = SAMPLERS["analytic"].choose(row, row.masked, token_stats, 5, 0.0)
    assert np.mean(shown) == pytest.approx(1 / (5 - index) if index < 4 else 1.0, abs=1e-4)


def test_published_step():
    """Of the published staggered score and transition at a masked position: the chance to stay, and what is drawn."""
    golden = np.load(GOLDEN / "primitives.npz")
    mask_id = int(golden["mask_id"])
    masked = golden["xt"] == mask_id
    sigma, step = (np.broadcast_to(golden[key].reshape(-1, 1), masked.shape)[masked].astype(np.float64)
                   for key in ("sigma", "sedd/dsigma"))
    law = (golden["sedd/staggered_score"] * golden["sedd/transp_transition"])[masked]
    net = np.delete(golden["logits"][masked], mask_id, axis=1).astype(np.float64)
    log_total = np.log(np.exp(net).sum(1)) - np.log(net.shape[1])
    t, s = -np.expm1(-sigma), -np.expm1(-(sigma - step))
    np.testing.assert_allclose((t - s) / t * np.exp(log_total), np.delete(law, mask_id, axis=1).sum(1), rtol=1e-4)
    drawn = np.delete(law, mask_id, axis=1)
    np.testing.assert_allclose(drawn / drawn.sum(1, keepdims=True), np.exp(net) / np.exp(net).sum(1, keepdims=True),
                               rtol=1e-4)


@pytest.mark.ci_slow
def test_only_networks_of_scores():
    with pytest.raises(UserError, match="sampler 'analytic' needs the log scores of an SEDD model, .* 'masked'"):
        make_lm().generate(length=8, sampler="analytic")
    lm = make_lm(SEDD(block_size=4, corruption="bernoulli", eps=1e-3), time_conditioning=True)
    sample, again = (lm.generate(length=8, sampler="analytic", steps=5, seed=3)[0] for _ in range(2))
    assert sample == again and len(sample.tokens) <= 8
    assert lm.generate(length=8)[0].nfe == 8  # the masked samplers apply as well
