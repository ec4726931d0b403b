"""Attention that opens by and by: causal weights become those of a block model (DiffuLLaMA, arXiv 2410.17891).

A token of the adapted network sees its whole block; the weights it starts from have never seen what is on the right.
Over `train.anneal_steps` updates it sees more and more of it: at progress p = step / anneal_steps a token of a block of
S sees floor(p S + u) tokens to its right, with u ~ U[0, 1) for each token, in noised blocks and in clean ones. The
first update is causal, and from the last one on attention is that of the objective, with which validation always
measures.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.network_inputs import NetworkInputs
from bd3lm_jax.scoring.transform import Transform

ANNEALING_FOLD = 0x73656573  # tells its random numbers from those of noise and dropout


def sample_max_visible_position(key: jax.Array, step: jax.Array, steps: int, position_BxL: jax.Array,
                                block_size: int) -> jax.Array:
    """The last position that every token sees in the update after `step` updates, int32 `[B, L]`.

    key: that of the step; rows have numbers of their own, whatever the batch. Beyond the end of its block a token sees
    nothing, whatever this says.
    """
    key, length = jax.random.fold_in(key, ANNEALING_FOLD), position_BxL.shape[1]
    rows = jnp.arange(position_BxL.shape[0])
    u_BxL = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (length,)))(rows)
    ahead_BxL = jnp.floor(jnp.minimum(step / steps, 1.0) * block_size + u_BxL)
    return position_BxL + ahead_BxL.astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Annealing(Transform):
    """What each token attends to grows with the steps of a run."""

    steps: int
    block_size: int

    def prepare_rows(self, rows: dict, key: jax.Array, step: jax.Array) -> dict:
        return {**rows, "max_visible_position": sample_max_visible_position(key, step, self.steps, rows["positions"],
                                                                            self.block_size)}

    def inputs(self, inputs: NetworkInputs, rows: dict) -> NetworkInputs:
        return inputs.replace(max_visible_position_BxL=rows["max_visible_position"])


def check(config: Any) -> None:
    """UserError for annealing that has nothing to open."""
    if config.train.anneal_steps and not config.diffusion.draws_noise:
        raise UserError(f"train.anneal_steps={config.train.anneal_steps} opens causal attention, and an autoregressive "
                        "model stays causal: use 0")
