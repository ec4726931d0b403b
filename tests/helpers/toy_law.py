"""A joint law of short texts that can be enumerated, with its exact conditionals as the network."""

import itertools

import numpy as np

VOCAB, LENGTH = 3, 4


class ToyLaw:
    """`probs`, float64 `[VOCAB] * LENGTH`: a random law whose tokens depend on each other."""

    def __init__(self, seed: int = 0):
        probs = np.random.default_rng(seed).gamma(0.3, size=[VOCAB] * LENGTH) + 1e-3
        self.probs = probs / probs.sum()

    @property
    def nats(self) -> np.ndarray:
        """-log p(x) of every text."""
        return -np.log(self.probs)

    def mean(self, values: np.ndarray) -> float:
        """Expectation over texts."""
        return float((self.probs * values).sum())

    def cross_entropy(self, i: int, observed: set[int]) -> np.ndarray:
        """-log p(x_i | x_j for j in observed) of every text."""
        return self._marginal_nats(observed | {i}) - self._marginal_nats(observed)

    def masked_nats(self, hidden: set[int], size: int) -> np.ndarray:
        """Summed cross-entropies of the hidden tokens of one block of `size`, given its others and earlier blocks."""
        start = min(hidden) // size * size
        observed = set(range(start + size)) - hidden
        return sum(self.cross_entropy(i, observed) for i in hidden)

    def _marginal_nats(self, kept: set[int]) -> np.ndarray:
        others = tuple(set(range(LENGTH)) - kept)
        return np.broadcast_to(-np.log(self.probs.sum(others, keepdims=True)), self.probs.shape)


def blocks(size: int) -> list[range]:
    return [range(start, start + size) for start in range(0, LENGTH, size)]


def subsets(places) -> list[set[int]]:
    """All but the empty one."""
    return [set(chosen) for k in range(1, len(places) + 1) for chosen in itertools.combinations(places, k)]
