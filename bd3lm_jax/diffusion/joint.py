"""Block diffusion and next-token prediction in one network and one pass (as in TiDAR, arXiv 2511.08923).

The noised blocks read the clean stream as in BD3-LM. The clean stream is causal, and its own outputs predict the next
tokens, so that the states which the noised blocks read are those of an autoregressive model.

    loss = NELBO a token + ar_weight * mean over tokens of -log p(x_i | x_<i)
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.ar import AR, starts
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.network_inputs import NetworkInputs
from bd3lm_jax.diffusion.noised import Noised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(Masked):
    """As `Masked` with a causal clean stream that predicts too; see `autoregressive` for its other mode.

    Raises:
        UserError: as `Masked`, or the weight is negative.
    """

    kind: ClassVar[str] = "joint"
    title: ClassVar[str] = "joint"
    attention_rule: ClassVar[str] = "causal"
    needs_clean_stream: ClassVar[bool] = True
    corruption: str = "exact_count"
    ar_weight: float = 1.0  # of the autoregressive cross-entropy, beside 1 of the bound

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.ar_weight < math.inf:
            raise UserError(f"diffusion.ar_weight is {self.ar_weight}, expected at least 0, e.g. 1.0")

    @property
    def is_bound(self) -> bool:
        return False

    def stream_lengths(self, length: int, noise_samples: int) -> tuple[int, int]:
        return noise_samples, length

    def corrupt(self, key, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int, end_id: int,
                distribution=None) -> Noised:
        """As `Masked.corrupt`, and the weights of the clean stream, which count once for all copies."""
        noised = super().corrupt(key, x0_BxL, segment_BxL, noise_samples, mask_id, end_id, distribution)
        weight_BxL = self.ar_weight * noise_samples * (segment_BxL != 0).astype(jnp.float32)
        clean = Noised(xt_BxMxL=x0_BxL[:, None], weight_BxMxL=weight_BxL[:, None],
                       sigma_BxMxK=jnp.zeros((len(x0_BxL), 1, 1)), capacity=x0_BxL.shape[1])
        return noised.replace(clean=clean)

    def autoregressive(self, bos_in_context: bool) -> AR:
        return AR(bos=True) if bos_in_context else BosApart(bos=True)


@dataclasses.dataclass(frozen=True)
class BosApart(AR):
    """`AR` whose end token before a segment predicts the first token and is seen by no other: what a clean stream is
    that has every token in its own place."""

    @property
    def bos_in_context(self) -> bool:
        return False

    def inputs(self, noised: Noised, rows: Mapping[str, jax.Array], vocab_size: int) -> NetworkInputs:
        """One causal stream of the tokens before at their own places, the end tokens in segments of their own."""
        segment_BxL = rows["segments"]
        own = starts(segment_BxL) & (segment_BxL != 0)
        return super().inputs(noised, rows, vocab_size).replace(
            position_BxL=jnp.maximum(rows["positions"] - 1, 0), one_document=False,
            segment_BxL=jnp.where(own, segment_BxL + segment_BxL.shape[1], segment_BxL))
