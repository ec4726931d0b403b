"""In which order rows are read: position n of a training run (rows counted over all its steps) -> a row.

A pure function of the seed and the position, so that a run resumed at any step, on any number of machines, reads what
an undisturbed one would have read.
"""

import functools

import numpy as np

# Splits up to this size are sorted by random numbers, which needs 8 bytes a row and a fraction of a second an epoch.
# Larger ones are enciphered, which needs no memory and the same time wherever a run begins. The bound is part of the
# definition of the order: another one would change the order of runs in progress.
SORTED_ROWS = 1 << 22
ROUNDS = 8


def rows_at(num_rows: int, seed: int, position_N: np.ndarray) -> np.ndarray:
    """int64 [N]: rows at rising positions. Every epoch, `num_rows` positions, is a new permutation of all rows."""
    permutation = _sorted if num_rows <= SORTED_ROWS else feistel_permutation
    return _by_epoch(permutation, num_rows, seed, position_N)


def feistel_rows_at(num_rows: int, seed: int, position_N: np.ndarray) -> np.ndarray:
    """As `rows_at`, without memory at any size."""
    return _by_epoch(feistel_permutation, num_rows, seed, position_N)


def _by_epoch(permutation, num_rows: int, seed: int, position_N: np.ndarray) -> np.ndarray:
    epoch, index = np.divmod(position_N, num_rows)
    parts = [permutation(num_rows, seed, int(e), index[epoch == e]) for e in np.unique(epoch)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _sorted(num_rows: int, seed: int, epoch: int, index_N: np.ndarray) -> np.ndarray:
    return _permutation(num_rows, seed, epoch)[index_N]


@functools.lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Order of a stream of raw random bits, which, unlike Generator.permutation, no NumPy version may change."""
    return np.argsort(_random_bits(num_rows, seed, epoch), kind="stable")


def feistel_permutation(num_rows: int, seed: int, epoch: int, index_N: np.ndarray) -> np.ndarray:
    """int64 [N]: where a keyed bijection of 0 .. num_rows - 1 sends the indices, each by itself in O(1).

    A Feistel network permutes the numbers of as many bits as `num_rows` takes; what falls outside is sent on until it
    falls inside, twice on average at most (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """
    bits = max(2, (num_rows - 1).bit_length())
    keys = _random_bits(ROUNDS, seed, epoch)
    result_N = index_N.astype(np.uint64)
    outside = np.arange(len(result_N))
    while len(outside):
        mapped = _feistel(result_N[outside], bits, keys)
        result_N[outside] = mapped
        outside = outside[mapped >= np.uint64(num_rows)]
    return result_N.astype(np.int64)


def _feistel(number_N: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of the numbers of `bits` bits: by turns one half is changed by what the other half and a key say."""
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    high_N, low_N = number_N >> low, number_N & low_mask
    for high_turn, key in zip([True, False] * (ROUNDS // 2), keys):
        if high_turn:
            high_N = high_N ^ _splitmix64(low_N + key) & high_mask
        else:
            low_N = low_N ^ _splitmix64(high_N + key) & low_mask
    return high_N << low | low_N


def _splitmix64(number_N: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on uint64."""
    number_N = (number_N ^ number_N >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    number_N = (number_N ^ number_N >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return number_N ^ number_N >> np.uint64(31)


def _random_bits(number: int, seed: int, epoch: int) -> np.ndarray:
    key = np.array([seed % 2**64, epoch], np.uint64)  # a list of such numbers would become floating point
    return np.random.Philox(key=key).random_raw(number)
