"""The mathematics of the objectives: noise schedules, corruption and loss weights. No network, no optimiser.

An objective is a frozen dataclass of its hyperparameters (see objective.py); to add one, write its file and register
it here.
"""

from bd3lm_jax.diffusion.ar import AR
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.priority import Priority

OBJECTIVES = {objective.kind: objective for objective in (Masked, AR, Priority)}
