"""The passes of a network over whole rows: two streams for training and bounds, one stream for everything else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.models import trunk
from bd3lm_jax.models.trunk import Backbone, Execution, ForwardOutput, Stream

DEFAULT_EXECUTION = Execution(backend="auto", layers="scan", remat="none", one_document=False)


class RowBlockSizes(NamedTuple):
    """Rows with blocks of several sizes: tokens a block of each row, int32 `[B]`, and the smallest size there is."""

    size_B: jax.Array
    min_block_size: int


def compute_dtype(name: str):
    """"auto": bfloat16 on accelerators, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def two_stream(*args, **kwargs) -> jax.Array:
    """Hidden states `[B, M, L, D]` of M noised copies: `two_stream_out` without the rest."""
    return two_stream_out(*args, **kwargs).noised


def one_stream(*args, **kwargs) -> jax.Array:
    """Hidden states `[B, L, D]` of a plain pass: `one_stream_out` without the rest."""
    return one_stream_out(*args, **kwargs).clean


def two_stream_out(model: Backbone, params: dict, xt_BxMxL, x0_BxL, position_BxL, segment_BxL, *, block_size: int,
                   sizes: RowBlockSizes | None = None, rule: str = "block_causal", clean_outputs: bool = False,
                   clean_places=None, sigma_BxMxn=None, clean_sigma_Bx1=None, execution: Execution,
                   dropout_keys=None, max_visible_position_BxL=None) -> ForwardOutput:
    """M noised copies, every block seeing the clean blocks before it (BD3-LM eq. 6).

    The last clean block is read by nobody and left out, unless `clean_outputs` are wanted; with one block a row (MDLM)
    there is no clean stream then. rule, clean_outputs: as in `trunk.two_streams`. clean_places: position and segment of
    the clean stream where they are not those of the row.
    xt: ids, or float `[B, M, L, V]` as in `trunk.Stream`. sizes: of each row's blocks where they differ; block_size is
    then the largest, and only the smallest is left out. sigma: noise level of each n-th part of the row, clean_sigma:
    one for the whole row (published checkpoints); None is the constant 0 (and all that networks without time
    conditioning take). max_visible_position: as in `attention.Tokens`.
    """
    length = x0_BxL.shape[1]
    block = position_BxL // (block_size if sizes is None else sizes.size_B[:, None])
    min_block_size = None if sizes is None else sizes.min_block_size
    noised = Stream(xt_BxMxL, position_BxL, block, segment_BxL, sigma_BxMxn, max_visible_position_BxL)
    clean, clean_length = None, length if clean_outputs else length - (min_block_size or block_size)
    if clean_length > 0:
        position_BxL, segment_BxL = clean_places or (position_BxL, segment_BxL)
        max_visible_position = None if max_visible_position_BxL is None else max_visible_position_BxL[:, :clean_length]
        clean = Stream(x0_BxL[:, :clean_length], position_BxL[:, :clean_length], block[:, :clean_length],
                       segment_BxL[:, :clean_length], clean_sigma_Bx1, max_visible_position)
    return trunk.two_streams(model, params, noised, clean, block_size=block_size, execution=execution,
                             rule=rule, clean_outputs=clean_outputs, dropout_keys=dropout_keys,
                             min_block_size=min_block_size)


def one_stream_out(model: Backbone, params: dict, ids_BxL, position_BxL, segment_BxL, *, rule: str, block_size: int,
                   sigma_Bxn=None, execution: Execution, dropout_keys=None) -> ForwardOutput:
    """A plain pass; rule "causal", "block_causal" or "bidirectional"."""
    clean = Stream(ids_BxL, position_BxL, position_BxL // block_size, segment_BxL, sigma_Bxn)
    return trunk.prefill(model, params, clean, rule=rule, block_size=block_size, execution=execution,
                         dropout_keys=dropout_keys)


def single_document_rows(ids_BxL) -> tuple[jax.Array, jax.Array]:
    """Positions 0 .. L-1 and segment 1 for rows that hold one document each: int32 `[B, L]` both."""
    position = jnp.broadcast_to(jnp.arange(ids_BxL.shape[1], dtype=jnp.int32), ids_BxL.shape)
    return position, jnp.ones_like(position)
