"""The trained model of a run directory or of a published checkpoint, as evaluation and generation need it."""

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
from bd3lm_jax.config import NO_RUN, ComputeConfig, Config, DataConfig, EvalConfig
from bd3lm_jax.core import compile_cache, jax_settings
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.models import Backbone, forward, lora
from bd3lm_jax.parallel import sharding
from bd3lm_jax.scoring import parameters

PUBLISHED_LENGTH, PUBLISHED_BATCH = 1024, 8  # tokens a row at most, and rows a pass, where nobody says


class RestoredModel(NamedTuple):
    config: Config
    tokenizer: Tokenizer
    model: Backbone
    params: Any
    meta: dict
    step: int


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
    return RestoredModel(config, tokenizer, model, lora.merge_lora_jitted(params, config.train), meta, found)


def refuse_step(path: str | os.PathLike, step: int | str) -> None:
    """UserError if a step is asked for of a published checkpoint."""
    if step != LATEST:
        raise UserError(f"{path} is a published checkpoint, which has no steps: leave --step={step} out")


def restore_published(path: str | os.PathLike, weights: str, mesh: Mesh, length: int) -> RestoredModel:
    """A published checkpoint as if it were a run of step 0 without a corpus of its own.

    length: tokens a row, 0 for its context or PUBLISHED_LENGTH, if that is less. A model with one block a row has
    blocks of that length. Raises UserError as `hf.read_model`, without a tokenizer or the mask token that the objective
    needs, and for a length that does not fit.
    """
    dtype = forward.compute_dtype("auto")
    found, params = hf.read_model(path, dtype="float32", weights=weights, mesh=mesh)
    config, tokenizer = published_config(path, found, length)
    return RestoredModel(config, tokenizer, models.build(found.model, dtype), params,
                         {"config_sha256": config.sha256()}, 0)


def published_config(path: str | os.PathLike, found: ModelSpec, length: int) -> tuple[Config, Tokenizer]:
    """Config and tokenizer of `restore_published`, of what `hf.describe` found in a published checkpoint."""
    tokenizer = hf.read_tokenizer(path, found)
    if tokenizer is None:
        raise UserError(f"{path} brings no tokenizer, which texts need: put its tokenizer.json there")
    check_mask(found.objective, tokenizer.mask_id)
    length = length or min(found.length, PUBLISHED_LENGTH)
    if length > found.length:
        raise UserError(f"--length={length} is more than the {found.length} tokens that {path} was trained on")
    config = Config(0, found.model, found.objective, **NO_RUN | {
        "data": DataConfig(source="austen", path="", name="", field="text", tokenizer="", seq_len=length,
                           packing="wrap", valid_fraction=0.01, cache_dir="", workers=1, density="",
                           density_fraction=1.0, mixture=()),
        "compute": ComputeConfig(dtype="auto", attention="auto", layers="scan", remat="none", microbatch=0,
                                 loss_chunk=0),
        "eval": EvalConfig(every=1, rows=0, batch_size=PUBLISHED_BATCH, mc_samples=1, report_rows=0, num_samples=0,
                           sample_length=0)})
    if config.block_size >= found.length:  # one block a row
        config = config.at_block_size(length)
    if length % config.block_size:
        raise UserError(f"--length={length} is no multiple of the block size of {path}, {config.block_size}")
    return config, tokenizer
