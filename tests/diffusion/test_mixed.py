"""Blocks of several sizes in a batch: the sizes of the rows, and the masks and weights of each row at its size."""

import jax
import numpy as np
import pytest
from scipy import stats

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.mixed import Mixed

MASK, END, LENGTH, SIZES = 99, 0, 16, (2, 4, 8)
PLAIN = {"block_size": 4, "sizes": SIZES, "schedule": "loglinear", "corruption": "exact_count", "complement": False,
         "eps": 1e-3}
OBJECTIVE = Mixed(**PLAIN)
corrupt = jax.jit(Mixed.corrupt, static_argnums=(0, 4, 5, 6))


def draw(rows, key=jax.random.key(3)):
    ids = np.broadcast_to(np.arange(LENGTH), (rows, LENGTH))
    noised = corrupt(OBJECTIVE, key, ids, np.ones((rows, LENGTH), np.int32), 2, MASK, END)
    return np.asarray(noised.size_B), np.asarray(noised.xt_BxMxL) == MASK, np.asarray(noised.weight_BxMxL), noised


@pytest.fixture(scope="module")
def drawn():
    return draw(3000)


def test_all_sizes_are_equally_likely_and_belong_to_the_row(drawn):
    sizes = drawn[0]
    assert stats.chisquare([(sizes == size).sum() for size in SIZES]).pvalue > 1e-4
    np.testing.assert_array_equal(draw(7)[0], sizes[:7])  # whatever else is in the batch


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_masked_in_blocks_of_their_size(drawn, size):
    """Counts 1 .. S equally likely in every block, any token of it, with weight S / k."""
    sizes, masked, weight, _ = drawn
    blocks = masked[sizes == size].reshape(-1, size)
    counts = blocks.sum(-1)
    assert stats.chisquare(np.bincount(counts, minlength=size + 1)[1:]).pvalue > 1e-4 and counts.min() == 1
    assert stats.chisquare(blocks[counts == 1].sum(0)).pvalue > 1e-4
    expected = np.where(blocks, (size / counts)[:, None], 0)
    np.testing.assert_allclose(weight[sizes == size].reshape(-1, size), expected, rtol=1e-6)


def test_levels_and_capacity_hold_for_all_sizes(drawn):
    sizes, masked, _, noised = drawn
    assert noised.sigma_BxMxK.shape == (3000, 2, LENGTH // 2) and masked.sum(-1).max() <= noised.capacity
    for size in SIZES:
        levels = np.asarray(noised.sigma_BxMxK)[sizes == size].reshape(-1, size // 2)
        assert np.all(levels == levels[:, :1])


def test_it_is_no_bound_of_one_model():
    assert not OBJECTIVE.is_bound and OBJECTIVE.uses_mask_token
    assert OBJECTIVE.at(8).block_size == 8 and OBJECTIVE.at(8).is_bound


@pytest.mark.parametrize(("changes", "words"), [
    ({"sizes": ()}, "expected different block sizes"),
    ({"sizes": (4, 2)}, "the smallest first"),
    ({"sizes": (0, 4)}, "at least 1"),
    ({"sizes": (4, 6, 12)}, "multiples of the smallest that divide the largest"),
    ({"block_size": 3}, r"expected one of diffusion.sizes=\(2, 4, 8\)"),
    ({"corruption": "some"}, "diffusion.corruption is 'some'"),
])
def test_bad_input(changes, words):
    with pytest.raises(UserError, match=words):
        Mixed(**{**PLAIN, **changes})
