"""The trained model of a run directory, as evaluation and generation need it."""

import os
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bd3lm_jax import lora, models, passes, rundir, sharding
from bd3lm_jax.checkpoint import Checkpoints
from bd3lm_jax.config import Config
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.models import Backbone
from bd3lm_jax.program import init_params


class Restored(NamedTuple):
    config: Config
    tokenizer: Tokenizer
    model: Backbone
    params: Any
    meta: dict
    step: int


def restore(workdir: str | os.PathLike, weights: str, dtype: str | None, mesh: Mesh | None) -> Restored:
    """The newest checkpoint of a run.

    weights: "ema" or "params" ("ema" means "params" if no average was kept). dtype: of the computation, None for the
    run's own. mesh: where the parameters lie, None for the first device. Raises UserError if there is nothing to
    restore or the tokenizer is not the checkpoint's.
    """
    config, tokenizer = rundir.read(workdir)
    model = models.build(config.model, passes.compute_dtype(dtype or config.compute.dtype))
    abstract = jax.eval_shape(lambda: init_params(model, config, jax.random.key(0)))
    if mesh is not None:
        abstract = sharding.with_shardings(abstract, sharding.param_shardings(abstract, mesh))
    with Checkpoints(workdir, 1, read_only=True) as checkpoints:
        params, meta, step = checkpoints.restore_params(weights, abstract)
    rundir.check_tokenizer(tokenizer, meta["tokenizer"], f"the checkpoint in {workdir}")
    return Restored(config, tokenizer, model, lora.merge(params, config.train), meta, step)
