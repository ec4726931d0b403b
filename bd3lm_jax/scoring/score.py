"""From a network and an objective to losses: the pass over noised rows, and the output layer where tokens count."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.diffusion.network_inputs import NetworkInputs
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Loss, Objective
from bd3lm_jax.models import Backbone, forward, trunk
from bd3lm_jax.models.forward import Execution
from bd3lm_jax.parallel.sharding import BATCH_AXES, batch_devices, constrain
from bd3lm_jax.scoring import target_shift
from bd3lm_jax.scoring.loss import OutputLayer, TokenLoss, custom_token_losses, token_losses, weighted_total
from bd3lm_jax.scoring.transform import Transform, apply


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids that the objective needs; mask is -1 for a vocabulary without a mask token."""

    mask: int
    end: int


class LossInputs(NamedTuple):
    """What the output layer and the loss need: C = capacity positions of each copy, which hold all that count.

    features_BxMxCxD go into the output layer; weight_BxMxC is 0 where a position does not count; index_BxMxC says where
    in the row it stands; xt_BxMxC and sigma_BxMxC: the noised token there and its level (for an objective's own loss).
    tokens_B: tokens of the row. aux: the network's own loss, a sum over tokens as the others. clean: the same of what
    the clean stream predicts, one copy, under plain cross-entropy; None: nothing.
    """

    features_BxMxCxD: jax.Array
    target_BxMxC: jax.Array
    weight_BxMxC: jax.Array
    index_BxMxC: jax.Array
    xt_BxMxC: Any = None
    sigma_BxMxC: Any = None
    tokens_B: Any = None
    aux: jax.Array | float = 0.0
    clean: "LossInputs | None" = None


def score(model: Backbone, params: dict, objective: Objective, noised: Noised, rows: dict, execution: Execution,
          end_id: int = -1, transforms: tuple[Transform, ...] = ()) -> LossInputs:
    """The network on noised rows, up to its output layer. A row that masks more than its capacity has weight NaN.

    rows: `tokens`, `positions` and `segments`, int32 `[B, L]`, and what the transforms of a step added to them.
    end_id: the token that some networks read before the first one. transforms: those of a run; a network's own apply
    always.
    """
    transforms = (*transforms, *target_shift.for_model(model.config, end_id))
    noised = noised.replace(sigma_BxMxK=jnp.minimum(noised.sigma_BxMxK, objective.sigma_max))
    inputs = apply(transforms, "inputs", objective.inputs(noised, rows, model.config.vocab_size), rows)
    out = _forward(model, params, inputs, execution, rows.get("dropout_keys"))
    h_BxMxLxD = apply(transforms, "outputs", objective.outputs(out.noised, out.clean))
    scored = _at_loss_positions(model, params, h_BxMxLxD, noised, rows)._replace(aux=out.aux)
    if noised.clean is None:
        return scored
    h_BxLxD = apply(transforms, "clean_outputs", out.clean, rows)
    return scored._replace(clean=_at_loss_positions(model, params, h_BxLxD[:, None], noised.clean, rows))


def _forward(model, params, inputs: NetworkInputs, execution, dropout_keys) -> trunk.ForwardOutput:
    """A pass over what an objective has the network read, of one stream or of two."""
    sigma = inputs.sigma if trunk.is_time_conditioned(model.config) else None
    if inputs.one_document is not None:
        execution = dataclasses.replace(execution, one_document=inputs.one_document)
    places = inputs.position_BxL, inputs.segment_BxL
    if inputs.noised is None:
        return forward.one_stream_out(model, params, inputs.clean_BxL, *places, rule=inputs.rule, sigma_Bxn=sigma,
                                      block_size=inputs.block_size, execution=execution, dropout_keys=dropout_keys)
    sizes = None
    if inputs.size_B is not None and inputs.min_block_size is not None:
        sizes = forward.RowBlockSizes(inputs.size_B, inputs.min_block_size)
    return forward.two_stream_out(model, params, inputs.noised, inputs.clean_BxL, *places, block_size=inputs.block_size,
                                  sizes=sizes, rule=inputs.rule, clean_outputs=inputs.clean_outputs,
                                  clean_places=inputs.clean_places, sigma_BxMxn=sigma, execution=execution,
                                  dropout_keys=dropout_keys, max_visible_position_BxL=inputs.max_visible_position_BxL)


def _at_loss_positions(model, params, h_BxMxLxD, noised: Noised, rows: dict) -> LossInputs:
    """What the output layer and the loss need of hidden states, at the positions that may count."""
    weight, xt, length = noised.weight_BxMxL, noised.xt_BxMxL, rows["tokens"].shape[1]
    target = jnp.broadcast_to(rows["tokens"][:, None], xt.shape)
    index = jnp.broadcast_to(jnp.arange(length), target.shape)
    if noised.capacity < length:
        index = loss_positions(weight > 0, noised.capacity)
        h_BxMxLxD = jnp.take_along_axis(h_BxMxLxD, index[..., None], axis=2)
        target, weight, xt = (jnp.take_along_axis(x, index, axis=2) for x in (target, weight, xt))
        weight = jnp.where(exceeds_capacity(noised)[..., None], jnp.nan, weight)
    part = length // noised.sigma_BxMxK.shape[2]
    sigma = jnp.take_along_axis(noised.sigma_BxMxK, index // part, axis=2)
    features = trunk.features(model, params, h_BxMxLxD, sigma if trunk.is_time_conditioned(model.config) else None)
    return LossInputs(features, target, weight, index, xt, sigma, (rows["segments"] != 0).sum(1))


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
        features, target = _group_by_device(scored.features_BxMxCxD, scored.target_BxMxC)
        losses = token_losses(_output(model, params, mask_id), features, target, chunk)
    return losses.reshape(scored.target_BxMxC.shape)


def total_loss(model: Backbone, params: dict, scored: LossInputs, mask_id: int, chunk: int,
               loss: Loss = Loss()) -> jax.Array:
    """Sum of weight * loss over all positions of `scored`, in nats; other arguments as for `row_losses`."""
    if scored.clean is not None:
        of_clean = total_loss(model, params, scored.clean, mask_id, chunk)
        return of_clean + total_loss(model, params, scored._replace(clean=None), mask_id, chunk, loss)
    token_loss, mean_term = loss
    features, target, weight = _group_by_device(scored.features_BxMxCxD, scored.target_BxMxC, scored.weight_BxMxC)
    if token_loss is None:
        return weighted_total(_output(model, params, mask_id), features, target, weight, chunk)

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
    features, target, *more = _group_by_device(scored.features_BxMxCxD, scored.target_BxMxC, scored.xt_BxMxC,
                                               scored.sigma_BxMxC)
    output = OutputLayer(*trunk.output_layer(model, params))
    return custom_token_losses(output, functools.partial(token_loss, mask_id=mask_id), model.config.vocab_size,
                               features, target, tuple(more), chunk)


def _output(model, params, mask_id) -> OutputLayer:
    return OutputLayer(*trunk.output_layer(model, params)).exclude_tokens(mask_id, model.config.vocab_size)


def _group_by_device(*arrays_BxMxC):
    """`[B, M, C, ...]` -> `[G, N, ...]` where group g holds the rows of one device (all rows without a mesh)."""
    groups = math.gcd(batch_devices(), arrays_BxMxC[0].shape[0])
    return [constrain(x.reshape(groups, -1, *x.shape[3:]), BATCH_AXES) for x in arrays_BxMxC]


def loss_positions(counted_BxMxL, capacity: int) -> jax.Array:
    """Indices `[B, M, capacity]` with every counted position first, in order (the rest: other positions)."""
    return jnp.argsort(~counted_BxMxL, axis=-1, stable=True)[..., :capacity].astype(jnp.int32)
