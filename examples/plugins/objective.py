"""An objective with inputs of its own: the network reads mixtures of tokens instead of tokens.

    python -m launch train --import=examples.plugins.objective --config=configs/tiny.py:algo=smoothed,block_size=4 \
        --workdir=runs/smoothed
"""

import dataclasses
from typing import ClassVar

import jax

from bd3lm_jax.diffusion import OBJECTIVES, Masked


@dataclasses.dataclass(frozen=True)
class Smoothed(Masked):
    """Masked diffusion whose network reads every noised token as a distribution: the token itself, and `part` of all
    tokens alike. The keys of `diffusion` are those of masked diffusion and `part`."""

    kind: ClassVar[str] = "smoothed"
    reads_soft_inputs: ClassVar[bool] = True
    part: float = 0.1

    def inputs(self, noised, rows, vocab_size):
        """One of the five hooks of an objective (bd3lm_jax/diffusion/objective.py)."""
        token = jax.nn.one_hot(noised.xt_BxMxL, vocab_size)
        mixture = (1 - self.part) * token + self.part / vocab_size
        return super().inputs(noised, rows, vocab_size).replace(noised=mixture)


OBJECTIVES["smoothed"] = Smoothed
