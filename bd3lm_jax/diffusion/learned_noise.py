"""Objectives whose noise has parameters that are trained with the network's."""

import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.state import OBJECTIVE_PARAMS
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Loss, Objective


class LearnedNoise(Objective):
    """Base of the objectives that learn their noise.

    `init_learned_params(key, vocab_size, width)` -> dict of float32 arrays, trained, saved and averaged with those of
    the network and not used after. `corrupt` takes them as `learned_params`, with the network's table "embedding"
    `[V', width]` added, and so does `token_loss`, without it. As the noise depends on them, their gradient is that of
    the loss and `noise_gradient(learned_params, noised, x0_BxL, segment_BxL, losses_BxMxL)`, a dict like theirs, summed
    over the rows given; losses as of `token_loss`, without a gradient.
    """

    learns: ClassVar[bool] = True

    def loss(self, learned_params: dict | None = None) -> Loss:
        if self.token_loss is None:
            return Loss()
        return Loss(functools.partial(self.token_loss, learned_params=learned_params))

    def noise_gradient(self, learned_params: dict, noised: Noised, x0_BxL: jax.Array, segment_BxL: jax.Array,
                       losses_BxMxL: jax.Array | None) -> dict:
        raise NotImplementedError

    def add_noise_gradient(self, grads: dict, params: dict, noised: Noised, rows: Mapping[str, jax.Array],
                           losses_BxMxL: jax.Array | None) -> dict:
        noise_grads = self.noise_gradient(corrupt_arguments(params)["learned_params"], noised, rows["tokens"],
                                          rows["segments"], losses_BxMxL)
        return {**grads, OBJECTIVE_PARAMS: jax.tree.map(jnp.add, grads[OBJECTIVE_PARAMS], noise_grads)}


def corrupt_arguments(params: dict) -> dict:
    """What `corrupt` takes of all parameters of a run: nothing unless the objective has parameters of its own."""
    if OBJECTIVE_PARAMS not in params:
        return {}
    return {"learned_params": {**params[OBJECTIVE_PARAMS], "embedding": params["embed"]["embedding"]}}
