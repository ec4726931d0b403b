"""Loss on answers alone: what the array "prompt" of a batch (data/dialogues.py) changes for any objective.

Masked objectives never mask a prompt and weigh it 0; autoregressive ones weigh it 0. The loss is the mean over the
tokens of the answers. Objectives that know of prompts themselves (LLaDA) are left alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.noised import Noised


def uses_response_mask(objective: Any, batch: dict) -> bool:
    """Whether the prompts of a batch are to be left out here."""
    return "prompt" in batch and "prompt" not in objective.extra_batch_keys


def maskable_segments(objective: Any, batch: dict) -> jax.Array:
    """The segments `[B, L]` that noise is drawn for; 0 where a token is given."""
    if not uses_response_mask(objective, batch) or objective.causal:  # autoregression reads from them where documents begin
        return batch["segments"]
    return jnp.where(batch["prompt"] == 0, batch["segments"], 0)


def zero_prompt_weights(objective: Any, batch: dict, noised: Noised) -> Noised:
    """The noised copies with weight 0 on prompts."""
    if not uses_response_mask(objective, batch):
        return noised
    return noised.replace(weight_BxMxL=jnp.where(batch["prompt"][:, None] == 0, noised.weight_BxMxL, 0))


def check(config: Any) -> None:
    """UserError for an objective that does not go with the data of a Config."""
    objective, data = config.diffusion, config.data
    if "prompt" in objective.extra_batch_keys and data.source != "sft":
        raise UserError(f"diffusion.kind='{objective.kind}' with diffusion.sft=True needs to know the prompts: use "
                        "data.source='sft', or diffusion.sft=False")
    if data.source != "sft":
        return
    if data.density:
        raise UserError(f"data.density='{data.density}' is not there for dialogues: use ''")
    if objective.mean_term is not None:
        raise UserError(f"diffusion.kind='{objective.kind}' weighs a term of its own by all tokens of a row, prompts "
                        "too: use another objective with data.source='sft'")
    if objective.causal and not objective.bos:
        raise UserError("diffusion.bos=False hides tokens of weight 0 from the network, as prompts are: use True with "
                        "data.source='sft'")
