"""Shifted targets: networks whose output at token i predicts token i + 1, as the heads of autoregressive models do.

`model.target_shift` says so, so that adapted weights keep what they know of the next token (Dream, arXiv 2508.15487).
    ""       output i is of token i
    "row"    one block a row, which the network reads as it is: token i is predicted by output i - 1, the first one by
             its own (Dream)
    "block"  blocks of any size: the network reads the end token and then the row without its last token, so that the
             output in the place of a token is that of the token before it. A block is read as the clean token before
             it and its own tokens but the last, which the others of its block do not see. With blocks of one token
             that is the autoregressive model itself.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.ar import starts
from bd3lm_jax.diffusion.network_inputs import NetworkInputs
from bd3lm_jax.scoring.transform import Transform

TARGET_SHIFTS = ("", "row", "block")
INHERIT = "source"  # in a config that takes the network of train.init_from: as far ahead as that was


def inherited_shift(source_model: Any, was_causal: bool, objective: Any, length: int) -> str:
    """The form in which a network whose outputs were one token ahead, by its form or as a causal one, stays so under an
    objective with rows of `length` tokens; "" for others."""
    form = source_model.target_shift
    if not (form or was_causal) or not objective.supports_target_shift:
        return ""
    return "row" if form == "row" and objective.block_size >= length else "block"


def for_model(model_config: Any, end_id: int) -> tuple[Transform, ...]:
    """The transform that such a network needs in every pass.

    end_id: the token before the first one.
    """
    form = model_config.target_shift
    return {"": (OwnPlace(end_id),), "row": (RowShift(),), "block": (BlockShift(end_id),)}[form]


@dataclasses.dataclass(frozen=True)
class OwnPlace(Transform):
    """In form "": tokens in their own places, also those of a clean stream whose outputs predict the tokens after them.

    What predicts the first token of a document is an end token that attends to itself alone. It stands in the place of
    the document's last token, which no other token reads and whose output predicts nothing.
    """

    end_id: int

    def inputs(self, inputs: NetworkInputs, rows: dict) -> NetworkInputs:
        if not inputs.clean_outputs:
            return inputs
        position_BxL, segment_BxL = inputs.position_BxL, inputs.segment_BxL
        last_BxL = _is_last(segment_BxL)
        places = (jnp.where(last_BxL, 0, position_BxL),
                  jnp.where(last_BxL, segment_BxL + segment_BxL.shape[1], segment_BxL))
        return inputs.replace(clean_BxL=jnp.where(last_BxL, self.end_id, inputs.clean_BxL), clean_places=places,
                              one_document=False)

    def clean_outputs(self, h_BxLxD: jax.Array, rows: dict) -> jax.Array:
        length, segment_BxL = h_BxLxD.shape[1], rows["segments"]
        place_L = jnp.arange(length)
        last_BxL = jax.lax.cummin(jnp.where(_is_last(segment_BxL), place_L, length - 1), axis=1, reverse=True)
        source_BxL = jnp.where(starts(segment_BxL), last_BxL, place_L - 1)
        return jnp.take_along_axis(h_BxLxD, source_BxL[..., None], axis=1)


def _is_last(segment_BxL):
    """Where the last token of a document stands."""
    return (segment_BxL != jnp.roll(segment_BxL, -1, axis=-1)).at[..., -1].set(True) & (segment_BxL != 0)


class RowShift(Transform):
    """In form "row": what predicts every token, from what stands in its place."""

    def outputs(self, h_BxMxLxD: jax.Array) -> jax.Array:
        return jnp.concatenate([h_BxMxLxD[:, :, :1], h_BxMxLxD[:, :, :-1]], axis=2)


@dataclasses.dataclass(frozen=True)
class BlockShift(Transform):
    """In form "block": both streams one token later, each block after the clean token before it."""

    end_id: int

    def inputs(self, inputs: NetworkInputs, rows: dict) -> NetworkInputs:
        position_BxL = inputs.position_BxL
        clean_BxL = jnp.where(position_BxL == 0, self.end_id, jnp.roll(inputs.clean_BxL, 1, axis=-1))
        first_BxL = position_BxL % inputs.block_size == 0
        noised = jnp.where(first_BxL[:, None], clean_BxL[:, None], jnp.roll(inputs.noised, 1, axis=-1))
        return inputs.replace(noised=noised, clean_BxL=clean_BxL)


def check(config: Any) -> None:
    """UserError for a form that does not go with the objective of a Config."""
    form, objective = config.model.target_shift, config.diffusion
    if form not in TARGET_SHIFTS:
        raise UserError(f"model.target_shift is {form!r}, expected one of {', '.join(map(repr, TARGET_SHIFTS))}")
    if form and not objective.supports_target_shift:
        raise UserError(f"model.target_shift='{form}' has no effect with diffusion.kind='{objective.kind}': use ''")
    if form == "row" and objective.block_size < config.data.seq_len:
        raise UserError("model.target_shift='row' is for one block a row, and "
                        f"diffusion.block_size={objective.block_size} "
                        f"with data.seq_len={config.data.seq_len}: use 'block'")
