"""All parameters of a run: those of its network, of low-rank updates, and of an objective that has its own."""

from typing import Any

import jax

from bd3lm_jax.core.state import LORA, OBJECTIVE_PARAMS
from bd3lm_jax.models import Backbone, lora, trunk

OBJECTIVE_PARAMS_FOLD = 0x6C656172  # tells the random numbers of the objective's own parameters from the network's


def init(model: Backbone, objective: Any, lora_rank: int, key: jax.Array) -> dict:
    """Random parameters of the network; under LORA its low-rank updates, if these are trained (rank 0: they are not),
    and under LEARNT the parameters of an objective that has its own."""
    params = trunk.init(model, key)
    if lora_rank:
        params[LORA] = lora.init(model, params, lora_rank, key)
    if not objective.learns:
        return params
    objective_key = jax.random.fold_in(key, OBJECTIVE_PARAMS_FOLD)
    return params | {OBJECTIVE_PARAMS: objective.init_learned_params(objective_key, model.config.vocab_size,
                                                                     model.config.hidden_size)}
