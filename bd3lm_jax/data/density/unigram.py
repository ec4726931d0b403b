"""Rare tokens: dense are those whose surprisal -log2 p, p their frequency in the training split, is above a quantile.

`unigram:0.5` tags the rarer half of the running text: the most frequent ids that make up the given part of all tokens
are not dense.
"""

import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.density.source import Context, Table

ARGUMENT, CONTINUOUS = "QUANTILE", False


def check(argument: str) -> None:
    try:
        quantile = float(argument)
    except ValueError:
        quantile = -1.0
    if not 0 < quantile < 1:
        raise UserError(f"data.density='unigram:{argument}': expected a part of the tokens between 0 and 1, e.g. "
                        "unigram:0.5")


def build(argument: str, context: Context) -> Table:
    return Table(lambda: tags(context.counts(), float(argument)), context.corpus())


def tags(counts_V: np.ndarray, quantile: float) -> np.ndarray:
    """bool [V]: ids rarer than those that make up `quantile` of all tokens; ids of equal counts are alike."""
    order = np.argsort(-counts_V, kind="stable")
    below = np.cumsum(counts_V[order]) - counts_V[order]  # tokens of more frequent ids
    limit = counts_V[order][below < quantile * counts_V.sum()].min()
    return counts_V < limit
