"""What wraps an objective in a run: one list, made from the config, that the training step and its noise go through."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax.models import lora
from bd3lm_jax.scoring.annealing import Annealing
from bd3lm_jax.scoring.response_mask import ResponseMask
from bd3lm_jax.scoring.transform import Transform


@dataclasses.dataclass(frozen=True)
class LoRA(Transform):
    """Low-rank updates in the weights (models/lora.py); scale: alpha / r."""

    scale: float

    def params(self, params: dict) -> dict:
        return lora.merge_lora(params, self.scale)


class Dropout(Transform):
    """A key for every row, whatever the microbatch."""

    def prepare_rows(self, rows: dict, key: jax.Array, step: jax.Array) -> dict:
        dropout_key = jax.random.split(key)[1]
        row_keys = jax.vmap(lambda row: jax.random.fold_in(dropout_key, row))(jnp.arange(rows["tokens"].shape[0]))
        return {**rows, "dropout_keys": row_keys}


def transforms_of(config: Any) -> tuple[Transform, ...]:
    """The transforms of a run's training; those that belong to the network itself come with every pass (score.py)."""
    train, objective = config.train, config.diffusion
    masks_prompts = "prompt" in config.batch_arrays and "prompt" not in objective.extra_batch_keys
    found = ((train.lora_rank, lambda: LoRA(lora.scale_of(train))),
             (config.model.dropout > 0, Dropout),
             (train.anneal_steps, lambda: Annealing(train.anneal_steps, objective.block_size)),
             (masks_prompts, lambda: ResponseMask(objective.draws_noise)))
    return tuple(make() for is_used, make in found if is_used)
