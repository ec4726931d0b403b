"""From a network and an objective to losses: the pass over noised rows, and the output layer where tokens count."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.models import Backbone, forward, trunk
from bd3lm_jax.models.forward import Execution
from bd3lm_jax.parallel.sharding import BATCH_AXES, batch_devices, constrain
from bd3lm_jax.scoring import target_shift
from bd3lm_jax.scoring.loss import OutputLayer, TokenLoss, custom_token_losses, token_losses, weighted_total


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids that the objective needs; mask is -1 for a vocabulary without a mask token."""

    mask: int
    end: int


class LossInputs(NamedTuple):
    """What the output layer and the loss need: C = capacity positions of each copy, which hold all that count.

    features_BxMxCxD go into the output layer; weight_BxMxC is 0 where a position does not count; index_BxMxC says where
    in the row it stands; xt_BxMxC and sigma_BxMxC: the noised token there and its level (for an objective's own loss).
    tokens_B: tokens of the row. aux: the network's own loss, a sum over tokens as the others.
    """

    features_BxMxCxD: jax.Array
    target_BxMxC: jax.Array
    weight_BxMxC: jax.Array
    index_BxMxC: jax.Array
    xt_BxMxC: jax.Array | None = None
    sigma_BxMxC: jax.Array | None = None
    tokens_B: jax.Array | None = None
    aux: jax.Array | float = 0.0


def score(model: Backbone, params: dict, objective: Any, noised: Noised, tokens_BxL, position_BxL, segment_BxL,
          execution: Execution, dropout_keys=None, max_visible_position_BxL=None, end_id: int = -1) -> LossInputs:
    """The network on noised rows, up to its output layer. A row that masks more than its capacity has weight NaN.

    sees_BxL: as for `forward.two_stream`. end_id: read by networks with outputs one token ahead (shifted.py).
    """
    is_time_conditioned, tokens_B = trunk.is_time_conditioned(model.config), (segment_BxL != 0).sum(1)
    noised = noised.replace(sigma_BxMxK=jnp.minimum(noised.sigma_BxMxK, objective.sigma_max))
    sigma = noised.sigma_BxMxK if is_time_conditioned else None
    if objective.causal:
        if not objective.bos:  # nobody reads the end token
            segment_BxL = jnp.where(noised.weight_BxMxL[:, 0] > 0, segment_BxL, 0)
            position_BxL = jnp.maximum(position_BxL - 1, 0)  # the input is the token before, at its own place
            execution = dataclasses.replace(execution, one_document=False)
        out = forward.one_stream_out(model, params, noised.xt_BxMxL[:, 0], position_BxL, segment_BxL, rule="causal",
                                     block_size=1, execution=execution, dropout_keys=dropout_keys)
        h = out.clean[:, None]
    else:
        largest, sizes = objective.block_size, None
        if noised.size_B is not None:
            largest, sizes = objective.sizes[-1], forward.RowBlockSizes(noised.size_B, objective.sizes[0])
        inputs, clean, form = noised.xt_BxMxL, tokens_BxL, target_shift.target_shift_of(model.config)
        if objective.soft_inputs is not None:
            inputs = objective.soft_inputs(noised, tokens_BxL, model.config.vocab_size)
        if form == "block":
            inputs, clean = target_shift.inputs(inputs, clean, position_BxL, largest, end_id)
        out = forward.two_stream_out(model, params, inputs, clean, position_BxL, segment_BxL,
                                     block_size=largest, sizes=sizes, sigma_BxMxn=sigma, execution=execution,
                                     dropout_keys=dropout_keys, max_visible_position_BxL=max_visible_position_BxL)
        h = target_shift.outputs(out.noised) if form == "row" else out.noised
    weight, xt, length = noised.weight_BxMxL, noised.xt_BxMxL, tokens_BxL.shape[1]
    target = jnp.broadcast_to(tokens_BxL[:, None], xt.shape)
    index = jnp.broadcast_to(jnp.arange(length), target.shape)
    if noised.capacity < length:
        index = loss_positions(weight > 0, noised.capacity)
        h = jnp.take_along_axis(h, index[..., None], axis=2)
        target, weight, xt = (jnp.take_along_axis(x, index, axis=2) for x in (target, weight, xt))
        weight = jnp.where(exceeds_capacity(noised)[..., None], jnp.nan, weight)
    part = length // noised.sigma_BxMxK.shape[2]
    sigma = jnp.take_along_axis(noised.sigma_BxMxK, index // part, axis=2)
    features = trunk.features(model, params, h, sigma if is_time_conditioned else None)
    return LossInputs(features, target, weight, index, xt, sigma, tokens_B, out.aux)


def exceeds_capacity(noised: Noised) -> jax.Array:
    """Copies `[B, M]` that mask more tokens than their capacity: no objective may draw them."""
    return (noised.weight_BxMxL > 0).sum(-1) > noised.capacity


def row_losses(model: Backbone, params: dict, scored: LossInputs, mask_id: int, chunk: int,
               token_loss: TokenLoss | None = None) -> jax.Array:
    """Loss in nats of every position of `scored`, float32 `[B, M, C]`: cross-entropy, or `Objective.token_loss`.

    chunk as in `loss.token_losses`.
    """
    if token_loss is not None:
        losses = _custom_losses(model, params, scored, mask_id, chunk, token_loss)
    else:
        arrays = _group_by_device(scored.features_BxMxCxD, scored.target_BxMxC)
        losses = token_losses(_output(model, params, mask_id), *arrays, chunk)
    return losses.reshape(scored.target_BxMxC.shape)


def total_loss(model: Backbone, params: dict, scored: LossInputs, mask_id: int, chunk: int,
               token_loss: TokenLoss | None = None, mean_term: TokenLoss | None = None) -> jax.Array:
    """Sum of weight * loss over all positions of `scored`, in nats; arguments as for `row_losses`.

    mean_term: `Objective.mean_term`, which counts the tokens of the row in every copy.
    """
    arrays = _group_by_device(scored.features_BxMxCxD, scored.target_BxMxC, scored.weight_BxMxC)
    if token_loss is None:
        return weighted_total(_output(model, params, mask_id), *arrays, chunk)
    weight = arrays[2]

    def both(*args, mask_id):
        return token_loss(*args, mask_id=mask_id), mean_term and mean_term(*args, mask_id=mask_id)

    losses, term = _custom_losses(model, params, scored, mask_id, chunk, both)
    total = jnp.sum(jnp.where(weight == 0, 0, losses) * weight)
    if mean_term is None:
        return total
    term, counted = (x.reshape(scored.weight_BxMxC.shape) for x in term)
    counted = counted & (scored.weight_BxMxC > 0)
    mean_BxM = jnp.where(counted, term, 0).sum(-1) / jnp.maximum(counted.sum(-1), 1)
    return total + jnp.sum(mean_BxM * scored.tokens_B[:, None])


def _custom_losses(model, params, scored, mask_id, chunk, token_loss):
    """Losses `[G, N]` by an objective's own `token_loss`."""
    features, target, *more = _group_by_device(scored.features_BxMxCxD, scored.target_BxMxC, scored.xt_BxMxC, scored.sigma_BxMxC)
    output = OutputLayer(*trunk.output_layer(model, params))
    return custom_token_losses(output, functools.partial(token_loss, mask_id=mask_id), model.config.vocab_size, features,
                               target, tuple(more), chunk)


def _output(model, params, mask_id) -> OutputLayer:
    return OutputLayer(*trunk.output_layer(model, params)).exclude_tokens(mask_id, model.config.vocab_size)


def _group_by_device(*arrays_BxMxC):
    """`[B, M, C, ...]` -> `[G, N, ...]` where group g holds the rows of one device (all rows without a mesh)."""
    groups = math.gcd(batch_devices(), arrays_BxMxC[0].shape[0])
    return [constrain(x.reshape(groups, -1, *x.shape[3:]), BATCH_AXES) for x in arrays_BxMxC]


def loss_positions(counted_BxMxL, capacity: int) -> jax.Array:
    """Indices `[B, M, capacity]` with every counted position first, in order (the rest: other positions)."""
    return jnp.argsort(~counted_BxMxL, axis=-1, stable=True)[..., :capacity].astype(jnp.int32)
