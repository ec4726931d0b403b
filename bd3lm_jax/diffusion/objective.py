"""What every objective says of itself, and what it may leave out."""

from collections.abc import Callable
from typing import ClassVar

import jax

from bd3lm_jax.errors import UserError


class Objective:
    """Base of the objectives, which are frozen dataclasses of their hyperparameters.

    An objective has a `kind` (its name in configs), a `block_size`, and
    `corrupt(key, x0_BxL, segment_BxL, views, mask_id, end_id, ...) -> Noised`. What it does not say is as for masked
    diffusion:

    causal: the network reads one stream, the tokens before; else noised blocks and the clean text before them.
    masks: the network predicts the tokens under the mask token from those that are left. So the bound of
    `estimators.py` and the masked samplers apply, however it was trained. Else it has an estimator of its own
    ("native") or none.
    needs: names of further arrays `[B, L]` of a batch, which `corrupt` takes as keywords.
    token_loss: None for the cross-entropy of the clean token where the mask token has probability 0, else a method
    `(logits_NxV, target_N, xt_N, sigma_N, mask_id) -> float32 [N]` in nats, what the weights of `Noised` multiply.
    Logits are float32 as the network gives them, V without padding; sigma is that of `Noised`.
    is_bound: whether the weighted loss estimates a bound on the NLL of every token without bias.
    """

    kind: ClassVar[str]
    causal: ClassVar[bool] = False
    masks: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()
    token_loss: ClassVar[Callable[..., jax.Array] | None] = None
    is_bound: ClassVar[bool] = False
    block_size: int

    def prepared(self, key: jax.Array, batch: dict, end_id: int) -> dict:
        """The batch as training reads it, before noise: `tokens`, `segments`, `positions` and what it `needs`, `[B, L]`
        each. A function of the key, which is that of the step, and of the whole batch."""
        del key, end_id
        return batch


def check_rows(views: int, length: int, block_size: int) -> None:
    """UserError for rows that `corrupt` cannot noise."""
    if views < 1:
        raise UserError(f"views is {views}, expected at least 1 noised view of each row")
    if length % block_size:
        raise UserError(f"length {length} is not a multiple of diffusion.block_size={block_size}: pad the rows to "
                        f"{-(-length // block_size) * block_size} tokens")
