"""A density that needs no annotation: the network's own running loss by token id (arXiv 2603.15803 leaves it open)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.diffusion.adaptive_noise import FixedNoise


@dataclasses.dataclass(frozen=True)
class RunningLoss(FixedNoise):
    """Dense are the ids whose running mean cross-entropy is above that of all tokens.

    Averages are over the masked tokens of the training steps
    with exponential forgetting, each id's drawn towards the common one as by one token. An id that was never masked is
    not dense, so training starts with uniform masks. Masks depend on earlier steps only: importance weights keep the
    loss unbiased.
    """

    learns: ClassVar[bool] = True
    vocab_size: int
    decay: float  # of the running sums, a step

    def init_state(self) -> dict[str, jax.Array]:
        return {"nats_V": jnp.zeros(self.vocab_size), "masked_V": jnp.zeros(self.vocab_size)}

    def corrupt_arguments(self, state: dict, tokens_BxL: jax.Array) -> dict[str, Any]:
        return {"density": self.density(state, tokens_BxL)}

    def density(self, state: dict, tokens_BxL: jax.Array) -> jax.Array:
        """Tags, float32 [B, L]: 1 for dense tokens."""
        return self._dense_ids(state).astype(jnp.float32)[tokens_BxL]

    def _dense_ids(self, state):
        mean = state["nats_V"].sum() / jnp.maximum(state["masked_V"].sum(), 1e-9)
        observed_V = state["masked_V"] > 0
        return observed_V & ((state["nats_V"] + mean) / (state["masked_V"] + 1) > mean)

    def batch_statistics(self, losses_BxMxL: jax.Array, masked_BxMxL: jax.Array,
                         tokens_BxL: jax.Array) -> dict[str, jax.Array]:
        """What some rows tell: by id, the summed cross-entropy of its masked tokens, and their number."""
        ids = jnp.broadcast_to(tokens_BxL[:, None], masked_BxMxL.shape)
        zero_V = jnp.zeros(self.vocab_size)
        return {"nats_V": zero_V.at[ids].add(jnp.where(masked_BxMxL, losses_BxMxL, 0)),
                "masked_V": zero_V.at[ids].add(masked_BxMxL.astype(jnp.float32))}

    def update_state(self, state: dict, batch_statistics: dict) -> dict[str, jax.Array]:
        """The state after a step."""
        return jax.tree.map(lambda old, new: self.decay * old + new, state, batch_statistics)

    def as_metrics(self, state: dict) -> dict[str, list[float]]:
        return {"dense_ids": [float(self._dense_ids(state).mean())]}
