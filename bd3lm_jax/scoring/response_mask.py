"""Loss on answers alone: what the array "prompt" of a batch (data/dialogues.py) changes for any objective.

Masked objectives never mask a prompt and weigh it 0; autoregressive ones weigh it 0. The loss is the mean over the
tokens of the answers. Objectives that take prompts themselves (LLaDA) are left as they are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.scoring.transform import Transform


@dataclasses.dataclass(frozen=True)
class ResponseMask(Transform):
    """Prompts stay clean and weigh nothing.

    draws_noise: that of the objective; one without noise reads from the segments where documents begin.
    """

    draws_noise: bool

    def maskable_segments(self, segment_BxL: jax.Array, batch: dict) -> jax.Array:
        return jnp.where(batch["prompt"] == 0, segment_BxL, 0) if self.draws_noise else segment_BxL

    def noised(self, noised: Noised, batch: dict) -> Noised:
        clean = noised.clean and self.noised(noised.clean, batch)
        return noised.replace(weight_BxMxL=jnp.where(batch["prompt"][:, None] == 0, noised.weight_BxMxL, 0),
                              clean=clean)


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
    if objective.weights_decide_inputs:
        raise UserError("diffusion.bos=False hides tokens of weight 0 from the network, as prompts are: use True with "
                        "data.source='sft'")
