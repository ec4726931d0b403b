"""What every objective hands to the network: noised copies with loss weights."""

from typing import Any

import flax.struct
import jax


class Noised(flax.struct.PyTreeNode):
    """M noised copies of a batch: what the network reads and how its errors count.

    The mean over a row's copies of the sum over its tokens of weight * cross-entropy estimates the row's NELBO in nats.
    """

    xt_BxMxL: jax.Array  # int32 ids, masked tokens replaced by the mask token
    weight_BxMxL: jax.Array  # float32, 0 where not masked
    sigma_BxMxK: jax.Array  # float32 noise level -log(alpha) of each K-th part of the row (a block, a token), finite
    capacity: int = flax.struct.field(pytree_node=False)  # no copy of a row has more masked tokens than this
    size_B: jax.Array | None = None  # int32 tokens a block of each row, where these differ (Mixed)
    extra: Any = None  # tree of arrays [B, ...] that the objective wants back
    clean: "Noised | None" = None  # what the clean stream predicts too, one copy whose weights count beside the others
