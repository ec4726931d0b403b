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

from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError

TARGET_SHIFTS = ("", "row", "block")
INHERIT = "source"  # in a config that takes the network of train.init_from: as far ahead as that was


def target_shift_of(model_config: Any) -> str:
    """One of FORMS."""
    return model_config.target_shift


def inherited_shift(source_model: Any, was_causal: bool, objective: Any, length: int) -> str:
    """The form in which a network whose outputs were one token ahead, by its form or as a causal one, stays so under an
    objective with rows of `length` tokens; "" for others."""
    form = target_shift_of(source_model)
    if not (form or was_causal) or not _supports_target_shift(objective):
        return ""
    return "row" if form == "row" and objective.block_size >= length else "block"


def _supports_target_shift(objective: Any) -> bool:
    return not objective.causal and objective.soft_inputs is None and not hasattr(objective, "sizes")


def inputs(xt_BxMxL, x0_BxL, position_BxL, block_size: int, end_id: int) -> tuple[jax.Array, jax.Array]:
    """What the network reads in form "block": noised `[B, M, L]` and clean `[B, L]`, from the tokens of both."""
    clean_BxL = jnp.where(position_BxL == 0, end_id, jnp.roll(x0_BxL, 1, axis=-1))
    first_BxL = position_BxL % block_size == 0
    return jnp.where(first_BxL[:, None], clean_BxL[:, None], jnp.roll(xt_BxMxL, 1, axis=-1)), clean_BxL


def outputs(h_BxMxLxD) -> jax.Array:
    """In form "row": what predicts every token, from what stands in its place."""
    return jnp.concatenate([h_BxMxLxD[:, :, :1], h_BxMxLxD[:, :, :-1]], axis=2)


def check(config: Any) -> None:
    """UserError for a form that does not go with the objective of a Config."""
    form, objective = target_shift_of(config.model), config.diffusion
    if form not in TARGET_SHIFTS:
        raise UserError(f"model.target_shift is {form!r}, expected one of {', '.join(map(repr, TARGET_SHIFTS))}")
    if form and not _supports_target_shift(objective):
        raise UserError(f"model.target_shift='{form}' has no effect with diffusion.kind='{objective.kind}': use ''")
    if form == "row" and objective.block_size < config.data.seq_len:
        raise UserError(f"model.target_shift='row' is for one block a row, and diffusion.block_size={objective.block_size} "
                        f"with data.seq_len={config.data.seq_len}: use 'block'")
