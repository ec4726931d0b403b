"""A transition from outside the package in the one loop: what the loop does around it, against a plain loop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from toy_blocks import KINDS, LENGTH, MASK, QUICK, SIZE, begin, conditional, denoise, make_request, row_keys, settings

from bd3lm_jax.generation.sampling import DenoiserContext, run_blocks


class BestInPairs(NamedTuple):
    """The most probable tokens, drawn from two calls: all of a block, then all of it again given the first ones."""

    def max_calls(self, settings):
        return 2

    def start(self, frame, block):
        return block

    def is_unfinished(self, settings, block):
        return block.open & (block.calls < 2)

    def step(self, frame, block, previous, cache):
        positions = jnp.broadcast_to(jnp.arange(SIZE), block.canvas.shape)
        logits, cache = frame.context.denoise(block.canvas, frame.progress.block, previous, positions,
                                              jnp.ones(len(positions)), cache)
        canvas = jnp.where(block.masked, jnp.argmax(logits[..., :KINDS], axis=-1), block.canvas)
        return block._replace(canvas=canvas, calls=block.calls + 1, nfe=block.nfe + block.open), cache


def test_a_transition_of_ones_own():
    prompt, tokens = [0, 2, 4], np.array([[0] * LENGTH, [2, 1] + [0] * 4, [1, 2, 0, 2, 0, 0]])
    context = DenoiserContext(denoise, BestInPairs(), settings())
    request = make_request(row_keys(3), LENGTH, prompt)
    run = jax.jit(lambda: run_blocks(context, request, begin(context, request, tokens), LENGTH // SIZE),
                  compiler_options=QUICK)
    progress = run()
    for row, (count, given) in enumerate(zip(prompt, tokens)):
        text = [*given[:count], *[MASK] * (LENGTH - count)]
        for start in range(0, LENGTH, SIZE):
            for _ in range(2):
                best = [int(conditional(text, i).argmax()) for i in range(start, start + SIZE)]
                text[start:start + SIZE] = [given[i] if i < count else best[i - start]
                                            for i in range(start, start + SIZE)]
        assert progress.tokens[row].tolist() == [int(token) for token in text]
    assert progress.nfe.tolist() == [4, 4, 2]  # nothing is written where all is given
