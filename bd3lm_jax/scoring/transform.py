"""The hooks of what wraps any objective; the list of them is in transforms.py."""

from typing import Any

import jax

from bd3lm_jax.diffusion.network_inputs import NetworkInputs
from bd3lm_jax.diffusion.noised import Noised


class Transform:
    """Leaves everything as it is; what wraps an objective overrides what it changes.

    The first three are of a step: `prepare_rows` and the next two see the whole batch, `params` every microbatch.
    `inputs`, `outputs` and `clean_outputs` are of a pass.
    """

    def maskable_segments(self, segment_BxL: jax.Array, batch: dict) -> jax.Array:
        """The segments that noise is drawn for, 0 where a token stays clean."""
        del batch
        return segment_BxL

    def noised(self, noised: Noised, batch: dict) -> Noised:
        """The noised copies as their loss counts."""
        del batch
        return noised

    def prepare_rows(self, rows: dict, key: jax.Array, step: jax.Array) -> dict:
        """The arrays `[B, ...]` of the update after `step` updates with what a pass needs of them; key: the step's."""
        del key, step
        return rows

    def params(self, params: dict) -> dict:
        """The parameters as a pass reads them."""
        return params

    def inputs(self, inputs: NetworkInputs, rows: dict) -> NetworkInputs:
        """What the network reads."""
        del rows
        return inputs

    def outputs(self, h_BxMxLxD: jax.Array) -> jax.Array:
        """The hidden states that predict the tokens."""
        return h_BxMxLxD

    def clean_outputs(self, h_BxLxD: jax.Array, rows: dict) -> jax.Array:
        """The hidden states of a clean stream that predict the tokens, from what stands in their places."""
        del rows
        return h_BxLxD


def apply(transforms: tuple[Transform, ...], hook: str, value: Any, *arguments: Any) -> Any:
    """`value` after the hook of every transform, in order."""
    for transform in transforms:
        value = getattr(transform, hook)(value, *arguments)
    return value
