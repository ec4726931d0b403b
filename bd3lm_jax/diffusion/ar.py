"""The autoregressive objective: next-token cross-entropy, with inputs aligned to targets."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.diffusion.network_inputs import NetworkInputs
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective


@dataclasses.dataclass(frozen=True)
class AR(Objective):
    """Output i predicts token i from the tokens before it in its segment.

    With `bos` the end token is fed before the first token of every segment, so that every token is predicted. Without
    it that token is not predicted, and no token attends to the end token, which such a network was trained without.
    """

    kind: ClassVar[str] = "ar"
    title: ClassVar[str] = "AR"
    causal: ClassVar[bool] = True
    attention_rule: ClassVar[str] = "causal"
    exact_likelihood: ClassVar[bool] = True
    draws_noise: ClassVar[bool] = False
    supports_target_shift: ClassVar[bool] = False
    uses_mask_token: ClassVar[bool] = False
    block_size: ClassVar[int] = 1
    bos: bool = True

    @property
    def is_bound(self) -> bool:
        """Whether the weighted loss is the NLL of every token (without `bos` the first ones are missing)."""
        return self.bos

    @property
    def predicts_first_token(self) -> bool:
        return self.bos

    @property
    def begins_with_end_token(self) -> bool:
        return self.bos

    def corrupt(self, key, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int) -> Noised:
        """The input of the network and the weights, in the form of every objective; nothing is random here."""
        inputs_BxL = self.previous_tokens(x0_BxL, segment_BxL, end_id)
        weight_BxL = self.predicted_tokens(segment_BxL).astype(jnp.float32)
        return Noised(xt_BxMxL=inputs_BxL[:, None].astype(jnp.int32), weight_BxMxL=weight_BxL[:, None],
                      sigma_BxMxK=jnp.zeros((*x0_BxL.shape[:1], 1, 1)), capacity=x0_BxL.shape[1])

    @property
    def weights_decide_inputs(self) -> bool:
        return not self.bos

    def stream_lengths(self, length: int, noise_samples: int) -> tuple[int, int]:
        return 0, length

    def counted_tokens(self, noised: Noised, maskable_BxL: jax.Array) -> jax.Array:
        return noised.weight_BxMxL > 0

    def inputs(self, noised: Noised, rows: Mapping[str, jax.Array], vocab_size: int) -> NetworkInputs:
        """One causal stream of the tokens before; without `bos` the end tokens are padding, which nothing attends to,
        and the others stand at their own places."""
        position_BxL, segment_BxL = rows["positions"], rows["segments"]
        if not self.bos:
            segment_BxL = jnp.where(noised.weight_BxMxL[:, 0] > 0, segment_BxL, 0)
            position_BxL = jnp.maximum(position_BxL - 1, 0)
        return NetworkInputs(noised.xt_BxMxL[:, 0], position_BxL, segment_BxL, block_size=1, rule=self.attention_rule,
                             one_document=None if self.bos else False)

    def outputs(self, noised_BxMxLxD: Any, clean_BxLxD: Any) -> jax.Array:
        return clean_BxLxD[:, None]

    def previous_tokens(self, x0_BxL: jax.Array, segment_BxL: jax.Array, end_id: int) -> jax.Array:
        """The previous token of the segment at every position, `end_id` at its first. Returns ids [B, L]."""
        return jnp.where(starts(segment_BxL), end_id, jnp.roll(x0_BxL, 1, axis=-1))

    def predicted_tokens(self, segment_BxL: jax.Array) -> jax.Array:
        predicted_BxL = super().predicted_tokens(segment_BxL)
        return predicted_BxL if self.bos else predicted_BxL & ~starts(segment_BxL)


def starts(segment_BxL):
    """Where a segment begins: position 0, and wherever the segment id changes."""
    return (segment_BxL != jnp.roll(segment_BxL, 1, axis=-1)).at[..., 0].set(True)
