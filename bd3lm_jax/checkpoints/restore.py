"""The trained model of a run directory or of a published checkpoint, as evaluation and generation need it."""

import dataclasses
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bd3lm_jax import models
from bd3lm_jax.checkpoints import hf, rundir
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.checkpoints.checkpoint_selection import LATEST
from bd3lm_jax.checkpoints.published import ModelSpec
from bd3lm_jax.checkpoints.published.mapping import check_mask
from bd3lm_jax.config import DataConfig, LMConfig
from bd3lm_jax.core import compile_cache, jax_settings
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.models import Backbone, forward, lora
from bd3lm_jax.models.trunk import Execution
from bd3lm_jax.parallel import sharding
from bd3lm_jax.scoring import parameters

PUBLISHED_LENGTH, PUBLISHED_BATCH = 1024, 8  # tokens a row at most, and rows a pass, where nobody says


class RestoredModel(NamedTuple):
    """A model with what evaluation takes from its run: its corpus and how that becomes rows (data), rows a pass, how
    passes are computed."""

    config: LMConfig
    data: DataConfig
    tokenizer: Tokenizer
    model: Backbone
    params: Any
    config_sha256: str
    step: int
    batch_size: int
    execution: Execution


def restore(workdir: str | os.PathLike, weights: str, dtype: str | None, mesh: Mesh | None,
            step: int | str = LATEST) -> RestoredModel:
    """A checkpoint of a run, by default the newest that can be read.

    weights: "ema" or "params" ("ema" means "params" if no average was kept). dtype: of the computation, None for the
    run's own. mesh: where the parameters lie, None for the first device. step: "latest", "best" (the lowest bound of
    those that were validated) or a number. Raises UserError if there is nothing to restore (naming the steps that are
    there) or the tokenizer is not the checkpoint's.
    """
    compile_cache.enable()
    config, tokenizer = rundir.read(workdir)
    model = models.build(config.model, forward.compute_dtype(dtype or config.compute.dtype))
    abstract = jax.eval_shape(lambda: parameters.init(model, config.diffusion, config.train.lora_rank,
                                                      jax_settings.key(0)))
    if mesh is not None:
        rules = models.sharding_rules(config.model)
        abstract = sharding.with_shardings(abstract, sharding.param_shardings(abstract, mesh, rules))
    with Checkpoints(workdir, 1, read_only=True) as checkpoints:
        params, meta, found = checkpoints.restore_params(weights, abstract, step)
    rundir.check_tokenizer(tokenizer, meta["tokenizer"], f"the checkpoint in {workdir}")
    return RestoredModel(config, config.data, tokenizer, model, lora.merge_lora_jitted(params, config.train),
                         meta["config_sha256"], found, config.eval.batch_size, config.execution)


def refuse_step(path: str | os.PathLike, step: int | str) -> None:
    """UserError if a step is asked for of a published checkpoint."""
    if step != LATEST:
        raise UserError(f"{path} is a published checkpoint, which has no steps: leave --step={step} out")


def restore_published(path: str | os.PathLike, weights: str, mesh: Mesh, length: int) -> RestoredModel:
    """A published checkpoint, at step 0. It brings no corpus of its own: `data` only says how texts become rows.

    length: tokens a row, 0 for its context or PUBLISHED_LENGTH, if that is less. A model with one block a row has
    blocks of that length. Raises UserError as `hf.read_model`, without a tokenizer or the mask token that the objective
    needs, and for a length that does not fit.
    """
    dtype = forward.compute_dtype("auto")
    found, params = hf.read_model(path, dtype="float32", weights=weights, mesh=mesh)
    config, data, tokenizer = published_config(path, found, length)
    return RestoredModel(config, data, tokenizer, models.build(found.model, dtype), params, config.sha256(), 0,
                         PUBLISHED_BATCH, dataclasses.replace(forward.DEFAULT_EXECUTION, one_document=True))


def published_config(path: str | os.PathLike, found: ModelSpec, length: int) -> tuple[LMConfig, DataConfig, Tokenizer]:
    """Config, rows and tokenizer of `restore_published`, of what `hf.from_hf_config` finds."""
    tokenizer = hf.read_tokenizer(path, found)
    if tokenizer is None:
        raise UserError(f"{path} brings no tokenizer, which texts need: put its tokenizer.json there")
    check_mask(found.objective, tokenizer.mask_id)
    length = length or min(found.length, PUBLISHED_LENGTH)
    if length > found.length:
        raise UserError(f"--length={length} is more than the {found.length} tokens that {path} was trained on")
    config = LMConfig(found.model, found.objective)
    if config.block_size >= found.length:  # one block a row
        config = config.at_block_size(length)
    if length % config.block_size:
        raise UserError(f"--length={length} is no multiple of the block size of {path}, {config.block_size}")
    return config, DataConfig(tokenizer="", seq_len=length), tokenizer
