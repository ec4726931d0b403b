"""One network at each of the block sizes that it was trained with: likelihood, calls and speed, and which to take."""

import dataclasses
import time
from typing import Any

from bd3lm_jax.core import jax_settings, log
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.stats import format_interval
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.token_bytes import RowsWithBytes
from bd3lm_jax.likelihood.evaluate import LoadedRun, open_run
from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions
from bd3lm_jax.lm import load

TEXTS, SAMPLER, THRESHOLD = 8, "threshold", 0.9  # how the texts are written on which calls and tokens are counted


@jax_settings.pinned()
def curve(workdir: str, *, split: str = "test", estimator: EstimatorOptions = EstimatorOptions(),
          model: ModelOptions = ModelOptions(), tolerance: float = 0.01) -> dict[str, Any]:
    """Rows by block size: the bound with its interval, network calls a token and tokens a second of texts.

    split: of the run's own text. estimator: "" for the best one at each size; the same rows and the same seed at every
    size. model: its block size is not used. tolerance: as for `recommended`. The first texts of a size are compiled for
    and not timed. Raises UserError for a model of one block size.
    """
    began, lm = time.perf_counter(), load(workdir, weights=model.weights)
    sizes = lm.config.trained_block_sizes
    if len(sizes) < 2:
        raise UserError(f"{workdir} was trained with blocks of {min(sizes)} tokens only: a curve needs a model of "
                        "diffusion.kind='mixed'")
    corpus = lm.run_config(workdir).data
    assert lm.tokenizer is not None  # what has a corpus is a run, which brings its tokenizer
    text, rows = RowsWithBytes(prepare(corpus, split, lm.config.block_size, lm.tokenizer), lm.tokenizer), []
    for size in sizes:
        bound = _likelihood(open_run(workdir, dataclasses.replace(model, block_size=size)), text, estimator)
        rows.append({"block_size": size, **bound, **_speed(lm.at_block_size(size), estimator.seed)})
    best = recommended(rows, tolerance)
    rule = f"the largest block size whose nll is at most {tolerance:.2%} above the best"
    log.table(f"{workdir}, {split}: by block size (texts: sampler {SAMPLER} {THRESHOLD})",
              ("block size", "nats/token", "95 % interval", "calls/token", "tokens/s"),
              [(str(row["block_size"]), f"{row['nll']:.4f}", format_interval(row["nll_ci95"], ".4f"),
                f"{row['nfe_per_token']:.3f}", f"{row['tokens_per_s']:.1f}") for row in rows])
    log.note(f"recommended block size: {best}, {rule}")
    return {"workdir": workdir, "split": split, "rows": rows, "recommended": best, "rule": rule, "sampler": SAMPLER,
            "threshold": THRESHOLD, "texts": TEXTS, "draws": estimator.draws, "seed": estimator.seed,
            "wall_s": time.perf_counter() - began}


def recommended(rows: list[dict[str, Any]], tolerance: float) -> int:
    """The largest block size whose `nll` is at most (1 + tolerance) times the smallest of all: larger blocks are more
    tokens that can be written in one call."""
    limit = min(row["nll"] for row in rows) * (1 + tolerance)
    return max(row["block_size"] for row in rows if row["nll"] <= limit)


def _likelihood(run: LoadedRun, text: RowsWithBytes, estimator: EstimatorOptions) -> dict[str, Any]:
    bound = run.evaluator.measure(run.params, text, estimator).summary(text)
    return {name: bound[name] for name in ("estimator", "nll", "nll_ci95", "nll_mc_se", "ppl", "ppl_ci95",
                                           "bits_per_byte", "bits_per_byte_ci95", "tokens", "documents")}


def _speed(lm, seed: int) -> dict[str, float]:
    for number in range(2):  # the first time compiles
        began = time.perf_counter()
        texts = lm.generate(num=TEXTS, length=lm.context, sampler=SAMPLER, threshold=THRESHOLD, seed=seed + number)
        seconds = time.perf_counter() - began
    tokens = max(1, sum(len(text.tokens) for text in texts))
    return {"nfe_per_token": sum(text.nfe for text in texts) / tokens, "tokens_per_s": tokens / seconds}
