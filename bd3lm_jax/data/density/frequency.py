"""f_v = log(1 + count_v) / its largest value: how frequent a token is (DiffusionBERT, arXiv 2211.15029).

Mind the direction: 1 is the most frequent token. Counts are those of the training split.
"""

import numpy as np

from bd3lm_jax.data.density.source import Context, Table

ARGUMENT, CONTINUOUS = "", True


def build(argument: str, context: Context) -> Table:
    del argument
    return Table(lambda: log_frequency(context.counts()), context.corpus())


def log_frequency(counts_V: np.ndarray) -> np.ndarray:
    """float [V], 0 for tokens that do not occur."""
    logs_V = np.log1p(counts_V)
    return logs_V / max(logs_V.max(), 1e-9)
