"""What a network says of single places of rows that hold a prompt and its continuation."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from bd3lm_jax.core.ranking import fast_argmax
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective
from bd3lm_jax.models import Backbone, forward, trunk
from bd3lm_jax.scoring.loss import OutputLayer
from bd3lm_jax.scoring.score import SpecialIds, score


class Rows(flax.struct.PyTreeNode):
    """Requests as rows `[B, L]`: scored tokens, and masks after them up to the end of their block."""

    tokens_BxL: Any
    segment_BxL: Any
    scored_BxL: Any
    noise_B: Any


class Predictor(NamedTuple):
    """A network with its objective, and how many places of a row it is asked for: static for a program."""

    model: Backbone
    objective: Objective
    special: SpecialIds
    capacity: int


class Predictions(NamedTuple):
    """What the network says of C places of every copy `[B, M, C]`: -log p of the text's token and of the likeliest one,
    that token, loss weight (0 where not scored), and where in the row the place is."""

    loss_BxMxC: jax.Array
    best_BxMxC: jax.Array
    token_BxMxC: jax.Array
    weight_BxMxC: jax.Array
    index_BxMxC: jax.Array


def predictions(predictor: Predictor, params, noised: Noised, rows: Rows) -> Predictions:
    """Of the noised rows, at `capacity` places that hold all scored tokens."""
    model, objective, special, capacity = predictor
    if not objective.weights_decide_inputs:
        weight = jnp.where(rows.scored_BxL[:, None], noised.weight_BxMxL, 0)
        noised = noised.replace(weight_BxMxL=weight, capacity=capacity)
    position, _ = forward.single_document_rows(rows.tokens_BxL)
    arrays = {"tokens": rows.tokens_BxL, "positions": position, "segments": rows.segment_BxL}
    scored = score(model, params, objective, noised, arrays, forward.DEFAULT_EXECUTION, special.end)
    output = OutputLayer(*trunk.output_layer(model, params)).exclude_tokens(special.mask, model.config.vocab_size)

    def losses(xs):
        features_CxD, target_C = xs
        logits_CxV = jnp.dot(features_CxD, output.kernel_DxV.astype(features_CxD.dtype),
                             preferred_element_type=jnp.float32) + output.bias_V
        lse_C, best_C = jax.nn.logsumexp(logits_CxV, axis=-1), logits_CxV.max(-1)
        target_C = jnp.take_along_axis(logits_CxV, target_C[:, None], 1)[:, 0]
        return lse_C - target_C, lse_C - best_C, fast_argmax(logits_CxV)

    shape = scored.target_BxMxC.shape
    noise_samples = tuple(x.reshape(-1, *x.shape[2:]) for x in (scored.features_BxMxCxD, scored.target_BxMxC))
    # the logits of one copy at a time
    loss, best, token = (x.reshape(shape) for x in jax.lax.map(losses, noise_samples))
    counted = jnp.take_along_axis(jnp.broadcast_to(rows.scored_BxL[:, None], noised.xt_BxMxL.shape),
                                  scored.index_BxMxC, axis=2)
    return Predictions(loss, best, token, jnp.where(counted, scored.weight_BxMxC, 0), scored.index_BxMxC)
