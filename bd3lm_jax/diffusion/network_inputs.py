"""What an objective has a network read, as plain arrays: the door from the mathematics to the passes of a network."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class NetworkInputs:
    """Rows as a network reads them: M noised copies beside the clean text before them, or one stream alone.

    clean: ids `[B, L]`, of the one stream where there is one. position, segment: int32 `[B, L]`, of both streams.
    block_size: tokens a block, the largest where rows differ. noised: ids `[B, M, L]`, or float `[B, M, L, V]`, a
    distribution over the vocabulary at every place; None: one stream. rule: which tokens a clean token attends to,
    "block_causal", "causal" or "bidirectional". sigma: noise level of each K-th
    part of the row, for networks that take it: `[B, M, K]`, of one stream `[B, K]`. size: tokens a block of each row,
    where these differ, multiples of min_block_size. max_visible_position: the last position that each token attends
    to; None: to the end of its block. one_document: whether every row holds one document; None: as the data says.
    clean_outputs: whether the hidden states of the clean stream beside a noised one are wanted too, each of which
    predicts the token after it. clean_places: (position, segment) of that clean stream where they are not those of the
    row; None: they are.
    """

    clean_BxL: jax.Array
    position_BxL: jax.Array
    segment_BxL: jax.Array
    block_size: int
    noised: Any = None
    rule: str = "block_causal"
    sigma: jax.Array | None = None
    size_B: jax.Array | None = None
    min_block_size: int | None = None
    max_visible_position_BxL: jax.Array | None = None
    one_document: bool | None = None
    clean_outputs: bool = False
    clean_places: tuple[jax.Array, jax.Array] | None = None

    def replace(self, **changes) -> "NetworkInputs":
        return dataclasses.replace(self, **changes)
