"""docs/one_page.py: its bound and its texts against laws by enumeration, and that it learns."""

import importlib.util
import itertools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from places import ROOT

PATH = ROOT / "docs/one_page.py"
LENGTH, KINDS = 4, 3


@pytest.fixture(scope="module")
def page():
    """A copy of the module of its own, with a tiny network."""
    spec = importlib.util.spec_from_file_location("one_page", PATH)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    module.L, module.D, module.HEADS, module.LAYERS, module.BATCH, module.STEPS = 8, 32, 2, 1, 16, 60
    return module


def fixed_logits(table, x_BxL):
    """An answer of its own [L, KINDS] for every row that can be asked; KINDS in the index stands for the mask."""
    return table[tuple(jnp.minimum(x_BxL, KINDS).T)]


@pytest.fixture(scope="module")
def law():
    """A law of texts, and the logits of its exact conditionals, where masked places are given the others."""
    p = np.random.default_rng(0).dirichlet(np.full(KINDS**LENGTH, 0.3)).reshape((KINDS,) * LENGTH)
    logits = np.zeros((KINDS + 1,) * LENGTH + (LENGTH, KINDS), np.float32)
    for xt in itertools.product(range(KINDS + 1), repeat=LENGTH):
        fits = p[tuple(slice(None) if x == KINDS else slice(x, x + 1) for x in xt)]
        for i in range(LENGTH):
            if xt[i] == KINDS:
                one = fits.sum(axis=tuple(j for j in range(LENGTH) if j != i))
                logits[xt][i] = np.log(np.maximum(one / one.sum(), 1e-30))
    return p, logits


def integrated_bound(logits, x0):
    """The bound of a row in nats: over all masks, and over their probability t by quadrature that is exact here."""
    node, weight = np.polynomial.legendre.leggauss(LENGTH)
    t, weight, total = (node + 1) / 2, weight / 2, 0.0
    for masked in itertools.product([False, True], repeat=LENGTH):
        k = sum(masked)
        answers = np.asarray(logits, np.float64)[tuple(np.where(masked, KINDS, x0))]
        nats = np.log(np.exp(answers).sum(-1)) - answers[np.arange(LENGTH), x0]
        if k:
            total += (weight * t ** (k - 1) * (1 - t) ** (LENGTH - k)).sum() * nats[list(masked)].sum()
    return total


def assert_estimates(page, logits, x0, nats):
    """The page's estimates of a row's bound have this mean, within four standard errors, which are small."""
    rows, predict = jnp.tile(jnp.array(x0), (40_000, 1)), Partial(fixed_logits, jnp.asarray(logits))
    draws = np.asarray(page.bound(predict, jax.random.key(2), rows)) * LENGTH
    assert abs(draws.mean() - nats) < 4 * draws.std() / len(draws) ** 0.5 < 0.05 * nats


def test_needs_one_page_three_packages_and_names_files_of_the_library():
    text = PATH.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    named = re.findall(r"bd3lm_jax/[\w/]+\.py", text)
    assert len(named) >= 10 and [name for name in named if not (ROOT / name).is_file()] == []
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, flags=re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"jax", "numpy", "optax"}


def test_masks_are_uniform_among_those_of_a_uniform_count(page):
    rows = 24_000
    masked = np.asarray(page.corrupt(jax.random.key(0), jnp.zeros((rows, LENGTH), int)) == page.MASK)
    np.testing.assert_array_equal(np.bincount(masked.sum(1), minlength=LENGTH + 1), [0] + [rows // LENGTH] * LENGTH)
    for k in range(1, LENGTH):
        code = masked[masked.sum(1) == k] @ (1 << np.arange(LENGTH))
        seen = np.unique(code, return_counts=True)[1]
        expected = rows / LENGTH / math.comb(LENGTH, k)
        assert ((seen - expected) ** 2 / expected).sum() < 20.5  # chi-square, at most 5 degrees of freedom: p = 0.001


@pytest.mark.parametrize("x0", [(0, 1, 2, 0), (2, 2, 1, 0)])
def test_mean_is_the_integral_over_the_noise_level(page, x0):
    logits = np.random.default_rng(1).normal(size=(KINDS + 1,) * LENGTH + (LENGTH, KINDS)) * 2
    assert_estimates(page, logits, x0, integrated_bound(logits, np.array(x0)))


def test_bound_is_tight_for_exact_conditionals(page, law):
    p, logits = law
    x0 = np.unravel_index(p.argsort(axis=None)[-2], p.shape)
    assert_estimates(page, logits, x0, -np.log(p[x0]))


@pytest.mark.parametrize("given", [None, 1])
def test_texts_follow_the_law(page, law, given):
    p, logits = law
    canvas = np.full((20_000, LENGTH), page.MASK)
    canvas[:, 2] = page.MASK if given is None else given
    texts = np.asarray(page.write(Partial(fixed_logits, jnp.asarray(logits)), jax.random.key(4), canvas))
    expected = p if given is None else p * (np.arange(KINDS) == given)[:, None] / p[:, :, given].sum()
    seen, expected = np.zeros(p.shape), len(texts) * expected
    np.add.at(seen, tuple(texts.T), 1)  # a mask that was left would be out of range
    often = expected > 5
    chi2, freedom = ((seen - expected)[often] ** 2 / expected[often]).sum(), often.sum()
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5 and seen[expected == 0].sum() == 0


def test_learns_what_single_characters_do_not_tell(page):
    text = np.tile(list(b"the sea and the ship "), 200)
    share = np.bincount(text)[np.unique(text)] / len(text)
    predict = Partial(page.network, page.train(jax.random.key(5), text))
    bits = page.bound(predict, jax.random.key(6), jnp.asarray(text[:4096].reshape(-1, page.L))).mean() / np.log(2)
    assert bits < 0.9 * -(share * np.log2(share)).sum()
