"""The training program of a config on a mesh: the network, the optimiser, the state and the step, placed but not run.

`train` runs it; `plan` and `memory` compile it from shapes alone, for devices that need not be there.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bd3lm_jax import models
from bd3lm_jax.config import Config
from bd3lm_jax.core import jax_settings
from bd3lm_jax.core.errors import RunError
from bd3lm_jax.core.state import TrainState, trainable_params
from bd3lm_jax.models import Backbone
from bd3lm_jax.parallel import sharding
from bd3lm_jax.scoring import parameters
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training import optim
from bd3lm_jax.training.step import make_step

BATCH_KEYS = ("tokens", "segments", "positions")


@dataclasses.dataclass(frozen=True)
class Program:
    """Built by `of`. abstract: the state as shapes; shardings: where its arrays lie, a TrainState of NamedSharding."""

    config: Config
    special: SpecialIds
    mesh: jax.sharding.Mesh
    model: Backbone
    tx: optax.GradientTransformation
    abstract: TrainState
    shardings: TrainState

    @classmethod
    def of(cls, config: Config, special: SpecialIds, mesh: jax.sharding.Mesh, dtype: Any) -> "Program":
        """config: resolved, its vocabulary size known. dtype: that the network computes in.

        Raises UserError if the mesh divides neither heads nor rows.
        """
        sharding.check_mesh(mesh, config.model, config.compute.microbatch or config.train.batch_size)
        model = models.build(config.model, dtype)
        tx = optim.make_optimizer(config.optim, config.train.steps)
        abstract = jax.eval_shape(lambda: _initial_state(config, model, tx))
        shardings = sharding.state_shardings(tx, abstract, mesh, models.sharding_rules(config.model))
        return cls(config, special, mesh, model, tx, abstract, shardings)

    @property
    def num_params(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.abstract.params))

    def initial_state(self) -> TrainState:
        """The random state of step 0, placed."""
        initial = jax.jit(lambda: _initial_state(self.config, self.model, self.tx), out_shardings=self.shardings)
        return initial()

    def step(self):
        """`step(state, batch) -> (state, metrics)`, jitted; the state given is donated. Use it under the mesh."""
        return self._step(self.config)

    def steps(self) -> dict:
        """`step` for every phase of the run (`Config.phase_at`); each is compiled when it is first used, and once."""
        train = self.config.train
        starts = (0, train.anneal_steps, *(step for step, _ in train.block_sizes))
        return {phase: self._step(self.config.in_phase(*phase)) for phase in map(self.config.phase_at, starts)}

    def _step(self, config: Config):
        return jax.jit(make_step(config, self.model, self.tx, self.special), donate_argnums=0,
                       out_shardings=(self.shardings, None))

    def arguments(self) -> tuple[TrainState, dict]:
        """Shapes and shardings of what the step takes."""
        shape = (self.config.train.batch_size, self.config.data.seq_len)
        ints, floats = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(self.mesh))
                        for dtype in (jnp.int32, jnp.float32))
        batch = dict.fromkeys(BATCH_KEYS, ints) | dict.fromkeys(self.config.batch_arrays, floats)
        return sharding.with_shardings(self.abstract, self.shardings), batch

    def compile(self) -> jax.stages.Compiled:
        """The step compiled for the devices of the mesh, which may be described only (jax topologies)."""
        with jax.set_mesh(self.mesh):
            return self.step().lower(*self.arguments()).compile()


def bytes_per_device(arguments: Any) -> int:
    """Bytes that abstract arrays with shardings take on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arguments))


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """Bytes of device memory that a compiled program needs on each device, by its compiler's account."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise RunError("this compiler does not say how much memory a program needs")
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)


def _initial_state(config: Config, model: Backbone, tx: optax.GradientTransformation) -> TrainState:
    params = parameters.init(model, config.diffusion, config.train.lora_rank, jax_settings.key(config.seed))
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema_decay > 0 else {}
    opt_state = tx.init(trainable_params(params))
    return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state, config.adaptive_noise.init_state())
