"""The mathematics of the objectives: noise schedules, corruption and loss weights. No network, no optimiser.

An objective is a frozen dataclass of its hyperparameters (see objective.py); to add one, write its file and register
it here.
"""

from bd3lm_jax.diffusion.adversarial import Adversarial
from bd3lm_jax.diffusion.ar import AR
from bd3lm_jax.diffusion.cap import Cap
from bd3lm_jax.diffusion.d3pm import D3PM
from bd3lm_jax.diffusion.diffusionbert import DiffusionBERT
from bd3lm_jax.diffusion.genmd4 import GenMD4
from bd3lm_jax.diffusion.joint import Joint
from bd3lm_jax.diffusion.levels import Levels
from bd3lm_jax.diffusion.llada import LLaDA
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.md4 import MD4
from bd3lm_jax.diffusion.mixed import Mixed
from bd3lm_jax.diffusion.priority import Priority
from bd3lm_jax.diffusion.roberta import RobertaDiffusion
from bd3lm_jax.diffusion.sedd import SEDD
from bd3lm_jax.diffusion.ssd_lm import SSDLM
from bd3lm_jax.diffusion.uniform import SEDDUniform, Uniform

OBJECTIVES = {objective.kind: objective for objective in (
    Masked, AR, SEDD, D3PM, MD4, GenMD4, Uniform, SEDDUniform, DiffusionBERT, LLaDA, RobertaDiffusion, Levels, Mixed,
    Cap, SSDLM, Adversarial, Priority, Joint)}
