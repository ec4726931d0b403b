"""The order of rows that no memory holds: a bijection, uniform, the same wherever a run begins, and for ever."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from bd3lm_jax.data import order
from bd3lm_jax.data.order import SORTED_ROWS, feistel_permutation, feistel_rows_at, rows_at

SIZES = (1, 2, 3, 5, 8, 9, 31, 32, 33, 63, 64, 65, 1000, 4097, 65_537, 100_003)


@pytest.mark.parametrize("size", SIZES)
def test_every_row_once(size):
    for seed, epoch in ((0, 0), (0, 1), (-5, 7), (2**63, 2)):
        found = feistel_permutation(size, seed, epoch, np.arange(size))
        assert found.dtype == np.int64
        np.testing.assert_array_equal(np.sort(found), np.arange(size))


def slow_bijection(size, keys, number):
    """The cipher on Python's own integers, from its definition."""
    bits, mask = max(2, (size - 1).bit_length()), 2**64 - 1
    low_bits, high_bits = bits // 2, bits - bits // 2

    def mixed(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    while True:
        high, low = number >> low_bits, number % 2**low_bits
        for turn, key in enumerate(keys):
            if turn % 2 == 0:
                high ^= mixed((low + key) & mask) % 2**high_bits
            else:
                low ^= mixed((high + key) & mask) % 2**low_bits
        number = high << low_bits | low
        if number < size:
            return number


@pytest.mark.parametrize("size", [1, 2, 3, 33, 1000, SORTED_ROWS + 1, 10**12 + 39])
def test_against_whole_numbers(size):
    keys = [int(key) for key in np.random.Philox(key=[3, 4]).random_raw(order.ROUNDS)]
    index = np.unique(np.random.default_rng(0).integers(0, size, 40))
    assert feistel_permutation(size, 3, 4, index).tolist() == [slow_bijection(size, keys, int(i)) for i in index]


def test_order_never_changes():
    """A change here breaks exact resume of runs in progress."""
    assert feistel_permutation(10, 0, 0, np.arange(10)).tolist() == [1, 3, 7, 6, 2, 0, 4, 5, 8, 9]
    assert rows_at(SORTED_ROWS + 1, 0, np.arange(4)).tolist() == [2163783, 242728, 1640126, 1253528]
    assert order.SORTED_ROWS == 2**22 and order.ROUNDS == 8


def test_small_splits_are_sorted_as_ever_and_large_ones_enciphered():
    """Random numbers, sorted: the order of every run before there were large splits."""
    position = np.arange(300)
    bits = [np.random.Philox(key=[5, epoch]).random_raw(100) for epoch in range(3)]
    assert rows_at(100, 5, position).tolist() == [i for row in bits for i in sorted(range(100), key=row.__getitem__)]
    size = SORTED_ROWS + 1
    np.testing.assert_array_equal(rows_at(size, 5, position), feistel_rows_at(size, 5, position))
    np.testing.assert_array_equal(rows_at(size, 5, position + size), feistel_permutation(size, 5, 1, position))


@pytest.mark.filterwarnings("error")
def test_large_and_negative_seeds_differ():
    seeds = (2**63, 2**63 + 1, 2**64 - 1, -2, -3)
    assert len({tuple(rows_at(100, seed, np.arange(100))) for seed in seeds}) == len(seeds)
    assert len({tuple(feistel_permutation(100, seed, 0, np.arange(100))) for seed in seeds}) == len(seeds)


def test_seeds_and_epochs_differ():
    orders = [tuple(feistel_permutation(200, seed, epoch, np.arange(200))) for seed in range(4) for epoch in range(4)]
    assert len({*orders, tuple(range(200))}) == 17


@pytest.mark.parametrize("size, places", [(5, 1), (5, 2), (11, 1), (4, 3)])
def test_what_comes_first_is_uniform(size, places):
    """Over seeds, the rows at the first `places` positions are any ordered choice with the same probability."""
    draws = 2000
    found = [tuple(feistel_permutation(size, seed, 0, np.arange(places)).tolist()) for seed in range(draws)]
    cells = list(itertools.permutations(range(size), places))
    counts = np.array([found.count(cell) for cell in cells])
    assert counts.sum() == draws
    assert stats.chisquare(counts).pvalue > 1e-3


def test_where_a_row_lands_is_uniform_at_large_sizes():
    """Positions of an epoch, in 64 equal parts, against the rows found there, in 64 equal parts."""
    size, draws = 10**9 + 7, 100_000
    index = np.random.default_rng(1).integers(0, size, draws)
    found = feistel_permutation(size, 8, 2, index)
    table = np.histogram2d(index, found, bins=64, range=[[0, size], [0, size]])[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-3
    assert abs(np.corrcoef(index, found)[0, 1]) < 4 / np.sqrt(draws)
    steps = np.diff(feistel_permutation(size, 8, 2, np.arange(draws)).astype(float)) % size  # neighbours: no stride
    assert stats.kstest(steps / size, "uniform").pvalue > 1e-3


def test_seek_is_replay():
    size, batch = SORTED_ROWS + 3, 100
    start = size - 250  # across the end of an epoch
    replayed = rows_at(size, 1, np.arange(start, start + 5 * batch))
    for step in (4, 0, 3, 1, 2):
        position = np.arange(start + step * batch, start + (step + 1) * batch)
        np.testing.assert_array_equal(rows_at(size, 1, position), replayed[step * batch:(step + 1) * batch])


def test_no_memory_and_no_wait_far_into_a_huge_split():
    tracemalloc.start()
    began = time.perf_counter()
    found = rows_at(10**13, 0, np.arange(7 * 10**14, 7 * 10**14 + 512))
    took, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 512 and found.max() < 10**13
    assert peak < 1 << 20 and took < 1.0
