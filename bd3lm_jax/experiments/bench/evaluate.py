"""Evaluation against its own forward passes: what reading rows, drawing masks and adding up cost beside the network.

evaluate is `Evaluator.measure`, as the `eval` command runs it; forward scores the same copies, drawn before, batch
after
batch, and fetches nothing but the end. Rows are spread over all devices.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax import models
from bd3lm_jax.config import DataConfig, MeshConfig
from bd3lm_jax.core import jax_settings
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.tokenizers import get_tokenizer
from bd3lm_jax.experiments.bench import step
from bd3lm_jax.experiments.bench.runner import Limit, Variant, compare
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.likelihood.evaluate import Evaluator, score_noised
from bd3lm_jax.likelihood.options import EstimatorOptions
from bd3lm_jax.models import trunk
from bd3lm_jax.models.forward import compute_dtype
from bd3lm_jax.parallel import sharding
from bd3lm_jax.scoring.score import SpecialIds

SMALL = step.Case(layers=6, width=256, heads=4, batch=8, length=512, block_size=16, vocab=8192)
PAPER = step.Case(layers=12, width=768, heads=12, batch=64, length=1024, block_size=16, vocab=50258)
BATCHES, ESTIMATOR = 4, "exact_count"
NOTE = "Ratios to forward, the same noised copies without host work; 1.25 is 0.8 of its throughput."
AGAINST = ()
LIMITS = (Limit("", "evaluate", "forward", "time_ratio", 1.25),)


def run(rounds: int, against: str) -> list[dict]:
    """Rows of a small network on a CPU, of the paper's elsewhere."""
    del against
    return run_case(SMALL if jax.default_backend() == "cpu" else PAPER, rounds)


def run_case(case: step.Case, rounds: int) -> list[dict]:
    """Both variants, BATCHES batches each, on rows of random bytes in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        text = np.random.default_rng(0).integers(97, 123, case.batch * BATCHES * case.length - 1, np.uint8).tobytes()
        (Path(directory) / "text.txt").write_bytes(text + b"\n")
        data = DataConfig(source="text", path=f"{directory}/text.txt", tokenizer="bytes", seq_len=case.length,
                          cache_dir=directory, workers=1)
        tokenizer = get_tokenizer("bytes", tuple)
        rows = prepare(data, "all", case.block_size, tokenizer)
        config = dataclasses.replace(step.config_of(case, "two_stream", "none"), data=data)
        mesh = sharding.make_mesh(MeshConfig())
        model = models.build(config.model, compute_dtype("auto"))
        special = SpecialIds(tokenizer.mask_id, tokenizer.end_id)
        evaluator = Evaluator(config, model, special, mesh, case.batch, config.execution)
        with jax.set_mesh(mesh):
            params = jax.jit(lambda: trunk.init(model, jax_settings.key(0)))()
            forward = _forward(evaluator, params, rows)
        evaluate = Variant("evaluate", lambda: evaluator.measure(params, rows, EstimatorOptions(ESTIMATOR)),
                           wait=lambda _: None)
        return compare(f"{case}, {len(jax.devices())} devices", [Variant("forward", forward), evaluate], "forward",
                       rounds)


def _forward(evaluator: Evaluator, params, rows):
    """Scores of all batches, whose copies are drawn here."""
    estimator = estimators.make(ESTIMATOR, evaluator.config)
    key = jax.random.fold_in(jax_settings.key(0), 0)

    @jax.jit
    def draw(ids, tokens, segments):
        return jax.vmap(lambda row, *arrays: estimator.noised(jax.random.fold_in(key, row), 0, 1, *arrays,
                                                              evaluator.special))(ids, tokens, segments)

    @jax.jit
    def forward(params, noised, tokens, positions, segments):
        rows = {"tokens": tokens, "positions": positions, "segments": segments, "scored": segments > 0}
        return score_noised(evaluator.model, params, evaluator.config.diffusion, noised, rows, evaluator.special,
                            evaluator.execution, estimator)

    batches = []
    for start in range(0, len(rows), evaluator.batch):
        ids = np.arange(start, start + evaluator.batch)
        arrays = jax.device_put((rows.tokens(ids), rows.positions(ids), rows.segments(ids)), evaluator.sharding)
        batches.append((draw(jnp.asarray(ids), arrays[0], arrays[2]), *arrays))

    def run():
        with jax.set_mesh(evaluator.mesh):
            return [forward(params, *batch) for batch in batches]
    return run
