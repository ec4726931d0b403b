"""Decoding by simplex diffusion (SSD-LM, arXiv 2210.17432): T network calls a block.

A block begins as noise. Each step asks the network with softmax(w), draws a token at every place (filters and
temperature as everywhere), and puts the noise of the next lower level on +-K one-hot logits of what was drawn; what the
last step draws stays. The canvas of the network is a distribution a place, float `[B, S, V]`. Given tokens are noised
like drawn ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.ssd_lm import alpha_bar, noisy_logits
from bd3lm_jax.generation.compatibility import refuse
from bd3lm_jax.generation.sampling.draw import is_excluded, position_keys, tokens_present
from bd3lm_jax.generation.sampling.filters import apply_repetition_penalty, filter_logits, sample_categorical
from bd3lm_jax.generation.sampling.generate import Block, Frame, PreviousBlock, Settings

NAME = "simplex"


class Simplex(NamedTuple):
    """A transition (see `generate.py`). scale: K. alpha_bar: signal power left at the T + 1 levels between the steps of
    a block, from clean (1) to noise (about 0)."""

    scale: float
    alpha_bar: tuple[float, ...]

    def max_calls(self, settings: Settings) -> int:
        return len(self.alpha_bar) - 1

    def start(self, frame: Frame, block: Block) -> Block:
        return block

    def is_unfinished(self, settings: Settings, block: Block) -> jax.Array:
        return block.open & (block.calls < self.max_calls(settings))

    def step(self, frame: Frame, block: Block, previous: PreviousBlock | None, cache) -> tuple[Block, Any]:
        noise_keys, draw_keys = frame.call_keys(block.calls)
        positions = jnp.broadcast_to(jnp.arange(block.canvas.shape[1]), block.canvas.shape)
        places = frame.progress.block * frame.settings.block_size + positions
        vocab_size = frame.request.forbidden.shape[0]
        keys = position_keys(noise_keys, places)
        eps = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (vocab_size,))))(keys)
        power = jnp.asarray(self.alpha_bar)[len(self.alpha_bar) - 1 - block.calls]
        w = noisy_logits(block.canvas, eps, jnp.broadcast_to(power, block.canvas.shape), self.scale)
        level = jnp.broadcast_to(1 - power, block.open.shape)
        logits, cache = frame.context.denoise(jax.nn.softmax(w, axis=-1), frame.progress.block, previous, positions,
                                              level, cache)
        drawn = _draw(frame, block, position_keys(draw_keys, places), positions, logits)
        canvas = jnp.where(frame.given, block.canvas, drawn)
        return block._replace(canvas=canvas, calls=block.calls + 1, nfe=block.nfe + block.open), cache


class SimplexSampler(NamedTuple):
    """What options know of the transition. steps, threshold, can_remask: as in `reveal.Sampler`."""

    steps: int = 100
    threshold: float = 0.0
    can_remask: bool = True

    def transition(self, objective: Any, steps: int) -> Simplex:
        """`steps` steps at equal distances in time."""
        grid = np.asarray(alpha_bar(np.linspace(0, 1, steps + 1)), np.float64)
        return Simplex(objective.scale, tuple(np.clip(grid, 0, 1).tolist()))

    def check(self, lm: Any, options: Any) -> None:
        """UserError for options that need masks, or tokens that stay from step to step."""
        refuse(options, ("constraint", "guidance"), "constraint and guidance need canvases of tokens and masks, which "
               "simplex diffusion does not have: leave them out")
        refuse(options, ("approximate_cache",), "approximate_cache keeps the tokens around a window from step to step, "
               "and simplex diffusion draws all of them again in every step: leave it out")


SAMPLER = SimplexSampler()


def check_watched(lm: Any, options: Any) -> None:
    """UserError: no step brings something to watch."""
    if options.sampler == NAME:
        raise UserError("a text of simplex diffusion is not watched step by step, every step draws all of a block: use "
                        "generate, or sample without --animate and --trace")


def _draw(frame: Frame, block: Block, keys_BxS, positions_BxS, logits_BxSxV):
    """A token for every place, its noise keyed by the place."""
    filters, vocab_size = frame.settings.filters, logits_BxSxV.shape[-1]
    logits = jnp.where(is_excluded(frame, positions_BxS, vocab_size), -jnp.inf, logits_BxSxV)
    if filters.repetition_penalty != 1:
        present_BxV = tokens_present(frame, block, vocab_size)
        logits = apply_repetition_penalty(logits, present_BxV[:, None], filters.repetition_penalty)
    flat = logits.reshape(-1, vocab_size)
    return sample_categorical(keys_BxS.reshape(-1), filter_logits(flat, filters)).reshape(block.canvas.shape)
