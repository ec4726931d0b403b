"""Whether greedy decoding (`LM.generate` with sampler "confidence" at temperature 0) writes a given continuation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core import ranking
from bd3lm_jax.diffusion.masked import MASK_PROB_MAX
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.likelihood.predictions import Predictor, Rows, predictions


def is_greedy_decoded(lm, capacity: int, rows: Rows, lengths: list[int]) -> np.ndarray:
    """Whether greedy decoding writes the scored tokens, bool `[B]`.

    lengths: of the texts, prompts included; further rows, which fill the batch up, are the last one again.

    One token a step: the most confident masked position of a block, whether the continuation reaches it or not. As long
    as all tokens so far are the text's, every block sees the text before it, so that all blocks decode at once.
    """
    objective, special, rows = lm.config.diffusion, lm.special, _canvases(lm, rows, lengths)
    behind_BxL = (rows.tokens_BxL == special.mask) & (rows.segment_BxL > 0)
    canvas_BxL = np.where(rows.scored_BxL, special.mask, rows.tokens_BxL)
    free = rows.replace(scored_BxL=rows.scored_BxL | behind_BxL)
    capacity = min(capacity + objective.block_size, canvas_BxL.shape[1])
    predictor = Predictor(lm.model, objective, special, capacity)
    masked_BxL, greedy_B = free.scored_BxL, np.ones(len(rows.noise_B), bool)
    while greedy_B.any() and (rows.scored_BxL & np.asarray(masked_BxL)).any():
        state = masked_BxL, canvas_BxL
        masked_BxL, canvas_BxL = _reveal(predictor, lm.params, *state, free)
        wrong_BxL = rows.scored_BxL & ~np.asarray(masked_BxL) & (np.asarray(canvas_BxL) != rows.tokens_BxL)
        greedy_B &= ~wrong_BxL.any(1)
    return greedy_B


def _canvases(lm, rows: Rows, lengths: list[int]) -> Rows:
    """The rows as `LM.generate` writes them: where its canvas ends with the text (`LM.at_length`) nothing is behind."""
    if lm.at_length(1) is lm:
        return rows
    lengths_B = np.array(lengths + lengths[-1:] * (len(rows.noise_B) - len(lengths)))
    return rows.replace(segment_BxL=rows.segment_BxL * (np.arange(rows.tokens_BxL.shape[1]) < lengths_B[:, None]))


@functools.partial(jax.jit, static_argnums=0)
def _reveal(predictor: Predictor, params, masked_BxL, canvas_BxL, rows: Rows):
    """One step of greedy decoding in every block: masks left and canvas, `[B, L]`."""
    def blocks(x_BxL):
        return x_BxL.reshape(len(x_BxL), -1, predictor.objective.block_size)

    level_BxK = blocks(masked_BxL).sum(-1) / jnp.maximum(blocks(rows.scored_BxL).sum(-1), 1)
    noised = Noised(xt_BxMxL=canvas_BxL[:, None], weight_BxMxL=masked_BxL[:, None].astype(jnp.float32),
                    sigma_BxMxK=-jnp.log1p(-jnp.minimum(level_BxK, MASK_PROB_MAX))[:, None],
                    capacity=predictor.capacity)
    predicted = predictions(predictor, params, noised, rows)
    at = jnp.arange(len(masked_BxL))[:, None], predicted.index_BxMxC[:, 0]
    confidence_BxL = jnp.zeros(masked_BxL.shape).at[at].set(jnp.exp(-predicted.best_BxMxC[:, 0]))
    token_BxL = jnp.zeros_like(canvas_BxL).at[at].set(predicted.token_BxMxC[:, 0])
    first = jax.vmap(jax.vmap(lambda confidence, masked: ranking.probability_rank(confidence, masked) == 0))
    new_BxL = first(blocks(confidence_BxL), blocks(masked_BxL)).reshape(masked_BxL.shape) & masked_BxL
    return masked_BxL & ~new_BxL, jnp.where(new_BxL, token_BxL, canvas_BxL)
