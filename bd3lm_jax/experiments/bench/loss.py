"""Output layer and cross-entropy, forward and backward: with all logits in memory, in chunks, on masked positions only.

chunked and masked_chunked are this library's `loss.weighted_total`, with the chunk that training chooses by itself.
"""

import dataclasses

import jax
import jax.numpy as jnp

from bd3lm_jax.core import jax_settings
from bd3lm_jax.diffusion.masked import cross_entropy_subs
from bd3lm_jax.experiments.bench.runner import Limit, compare, compiled
from bd3lm_jax.models.forward import compute_dtype
from bd3lm_jax.scoring.loss import OutputLayer, weighted_total


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a loss: `positions` tokens, of which every second one is masked."""

    vocab: int
    width: int
    positions: int

    def __str__(self) -> str:
        return f"V={self.vocab}, D={self.width}, {self.positions} tokens, half of them masked"


PAPER = Case(vocab=50258, width=768, positions=2048)
NOTE = ("Ratios to all positions at once. Memory is temporary memory by the compiler's account, beyond the gradients "
        "of the output layer and of its input.")
AGAINST = ()
LIMITS = (Limit(str(PAPER), "chunked", "naive", "temp_mib", 128),
          Limit(str(PAPER), "masked_chunked", "naive", "temp_mib", 128))


def run(rounds: int, against: str) -> list[dict]:
    """Rows of the paper's vocabulary and width."""
    del against
    return run_case(PAPER, rounds)


def run_case(case: Case, rounds: int) -> list[dict]:
    arguments = problem(case)
    variants = [compiled(name, jax.value_and_grad(loss, argnums=(0, 1)), arguments, carries=False)
                for name, loss in losses(case).items()]
    return compare(str(case), variants, "naive", rounds)


def problem(case: Case) -> tuple[OutputLayer, jax.Array, jax.Array, jax.Array]:
    """Output layer, its input `[N, D]` in the dtype of training, targets and weights `[N]`, 0 at odd positions."""
    @jax.jit
    def draw():
        keys = jax.random.split(jax_settings.key(0), 4)
        kernel = jax.random.normal(keys[0], (case.width, case.vocab)) * case.width**-0.5
        features = jax.random.normal(keys[1], (case.positions, case.width)).astype(compute_dtype("auto"))
        target = jax.random.randint(keys[2], (case.positions,), 0, case.vocab - 1)
        weight = jax.random.uniform(keys[3], (case.positions,)) * (jnp.arange(case.positions) % 2 == 0)
        return OutputLayer(kernel, jnp.zeros(case.vocab)), features, target, weight

    return draw()


def losses(case: Case) -> dict:
    """Variant -> sum of weight * cross-entropy, of the arguments of `problem`. The mask token is the last id."""
    mask_id = case.vocab - 1

    def naive(output, features, target, weight):
        kernel = output.kernel_DxV.astype(features.dtype)
        logits = jnp.dot(features, kernel, preferred_element_type=jnp.float32) + output.bias_V
        return jnp.sum(weight * cross_entropy_subs(logits, target, mask_id))

    def chunked(output, features, target, weight):
        return weighted_total(output.exclude_tokens(mask_id, case.vocab), features[None], target[None], weight[None], 0)

    def masked(loss):
        def gathered(output, features, target, weight):
            index = jnp.argsort(weight == 0, stable=True)[:case.positions // 2]
            return loss(output, features[index], target[index], weight[index])
        return gathered

    return {"naive": naive, "chunked": chunked, "masked": masked(naive), "masked_chunked": masked(chunked)}
