"""What a training run carries from one step to the next."""

from typing import Any

import flax.struct
import jax

LORA = "lora"  # name of low-rank updates among the parameters (lora.py)
OBJECTIVE_PARAMS = "objective"  # name of the objective's own parameters among those of the network


class TrainState(flax.struct.PyTreeNode):
    """All of a run's memory: the batch and the noise of a step are functions of (seed, step).

    `step`: int32 scalar, updates done so far. `ema`: a tree like `params` in float32, or {} when the average is off.
    `noise`: state of the schedule that chooses the noise from the data (diffusion/clip.py), {} when the noise is fixed.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    noise: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


def trainable_params(params: dict) -> dict:
    """What is trained of the parameters: all of them, or where there are low-rank updates, not the network's own."""
    return {name: x for name, x in params.items() if LORA not in params or name in (LORA, OBJECTIVE_PARAMS)}
