"""The surprisal -log2 p of a token, p its frequency in the training split, over that of a token that occurs once."""

import numpy as np

from bd3lm_jax.data.density.source import Context, Table

ARGUMENT, CONTINUOUS = "", True


def build(argument: str, context: Context) -> Table:
    del argument
    return Table(lambda: surprisal(context.counts()), context.corpus())


def surprisal(counts_V: np.ndarray) -> np.ndarray:
    """float [V]: log(N / count) / log(N), N tokens in all; tokens that do not occur count as if once."""
    total = max(int(counts_V.sum()), 2)
    return np.log(total / np.maximum(counts_V, 1)) / np.log(total)
