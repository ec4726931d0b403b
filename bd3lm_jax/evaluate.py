"""Likelihood of a split with its error bars: the exact-count bound, and the exact NLL where there is one.

Each draw masks every block of a row twice, independently, by `Masked` with uniform counts; both views share one clean
pass. Every view is an unbiased estimate of the bound (see `diffusion/masked.py`); the difference between the views of
a row tells the Monte-Carlo error. The noise is a function of (seed, row, draw, view) alone.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bd3lm_jax import log, passes, sharding, stats
from bd3lm_jax.config import Config
from bd3lm_jax.data.corpora import WHOLE
from bd3lm_jax.data.loader import place_rows
from bd3lm_jax.data.prepare import Rows
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.errors import UserError
from bd3lm_jax.models import Backbone, trunk
from bd3lm_jax.passes import Execution
from bd3lm_jax.sharding import batch_sharding
from bd3lm_jax.step import SpecialIds, execution_of, row_losses, score

ESTIMATORS = ("exact_count", "nll")
VIEWS = 2  # maskings of each draw: the fewest that show their own error


def is_exact(config: Config) -> bool:
    """Whether one pass gives the likelihood itself: AR, and blocks of one token without a noise level as input."""
    return config.diffusion.causal or (config.block_size == 1 and not trunk.takes_level(config.model))


def default_estimator(config: Config) -> str:
    """"nll" where the likelihood is exact, else "exact_count"."""
    return "nll" if is_exact(config) else "exact_count"


def check_estimator(estimator: str, config: Config, draws: int) -> None:
    if estimator not in ESTIMATORS:
        raise UserError(f"unknown estimator '{estimator}': known: {', '.join(ESTIMATORS)}")
    if estimator == "nll" and not is_exact(config):
        raise UserError(f"estimator 'nll' is exact only for AR and for block size 1 without time conditioning, this "
                        f"model has block size {config.block_size}: use --estimator=exact_count")
    if draws < 1:
        raise UserError(f"draws is {draws}, expected at least 1")


def unbiased(objective: Any) -> Any:
    """The objective whose weighted losses estimate the bound of a model trained with `objective`."""
    if objective.causal:
        return objective
    return Masked.uniform_counts(objective.block_size)


def make_row_nats(model: Backbone, objective: Any, special: SpecialIds, execution: Execution, views: int):
    """`f(params, key, draw, row_ids, tokens, positions, segments)` -> contributions and masked tokens a block.

    float32 `[B, views, L]` that sum to each view's estimate in nats, int32 `[B, views, K]`.
    """
    measure = unbiased(objective)

    def noise(key, draw, row, tokens, segments):
        def view(index):
            view_key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, row), draw), index)
            noised = measure.corrupt(view_key, tokens[None], segments[None], views=1, mask_id=special.mask,
                                     end_id=special.end)
            return jax.tree.map(lambda x: x[0, 0], noised)
        return jax.vmap(view)(jnp.arange(views))

    def row_nats(params, key, draw, row_ids, tokens, positions, segments):
        noised = jax.vmap(lambda *row: noise(key, draw, *row))(row_ids, tokens, segments)
        scored = score(model, params, objective, noised, tokens, positions, segments, execution)
        losses = row_losses(model, params, scored, special.mask, chunk=0) * scored.weight_BxMxC
        place = jax.vmap(jax.vmap(lambda losses, index: jnp.zeros(tokens.shape[1]).at[index].add(losses)))
        counts = (noised.weight_BxMxL > 0).reshape(*losses.shape[:2], -1, objective.block_size).sum(-1)
        return place(losses, scored.index_BxMxC), counts

    return row_nats


def evaluate_run(workdir: str, *, split: str, data: str, estimator: str, draws: int, seed: int, weights: str,
                 batch: int) -> dict[str, Any]:
    """The `eval` command: likelihood of a split under the newest checkpoint of a run.

    data: "" for the run's own corpus, "austen", or a .txt / .jsonl file (all of it, whatever the split) or directory,
    tokenised with the run's tokenizer. estimator: "" for the best one. weights: "ema" or "params". batch: rows a pass,
    0 for the config's.
    """
    from bd3lm_jax import models, rundir
    from bd3lm_jax.checkpoint import Checkpoints
    from bd3lm_jax.data.prepare import prepare

    config, tokenizer = rundir.read(workdir)
    split = WHOLE if Path(data).is_file() else split
    estimator = estimator or default_estimator(config)
    check_estimator(estimator, config, draws)
    config = dataclasses.replace(config, data=_other_data(config.data, data),
                                 eval=dataclasses.replace(config.eval, batch=batch or config.eval.batch),
                                 mesh=dataclasses.replace(config.mesh, data=-1, fsdp=1, tensor=1))
    mesh = sharding.make_mesh(config.mesh)
    model = models.build(config.model, passes.compute_dtype(config.compute.dtype))
    abstract = jax.eval_shape(lambda: trunk.init(model, jax.random.key(0)))
    abstract = sharding.with_shardings(abstract, sharding.param_shardings(abstract, mesh))
    with Checkpoints(workdir, 1, read_only=True) as checkpoints:
        params, meta, step = checkpoints.restore_params(weights, abstract)
    rundir.check_tokenizer(tokenizer, meta["tokenizer"], f"the checkpoint in {workdir}")
    rows = prepare(config.data, split, config.block_size, tokenizer)
    evaluator = Evaluator(config, model, SpecialIds(tokenizer.mask_id, tokenizer.end_id), mesh)
    result = evaluator.run(params, rows, estimator=estimator, draws=draws, seed=seed)
    by_count = result.pop("nll_by_count")
    _show(workdir, split, result, by_count)
    return {"data": data or config.data.source, "split": split, **result, "step": step,
            "config_sha256": meta["config_sha256"]}


def _other_data(own, data: str):
    """The data section with another source of text, or itself."""
    path = Path(data)
    if data in ("", own.source):
        return own
    if data == "austen":
        return dataclasses.replace(own, source="austen", path="")
    if not path.exists():
        raise UserError(f"--data={data} is neither 'austen' nor a file or directory of .txt or .jsonl text")
    jsonl = ".jsonl" in path.suffixes or (path.is_dir() and any(path.glob("*.jsonl*")))
    return dataclasses.replace(own, source="jsonl" if jsonl else "text", path=str(path))


def _show(workdir: str, split: str, result: dict, by_count: dict) -> None:
    low, high = result["ppl_ci95"]
    log.table(f"{workdir}, {split}: {result['documents']} documents, {result['tokens']} tokens",
              ("nats/token", "perplexity", "95 % interval", "bits/byte", "Monte-Carlo error"),
              [(f"{result['nll']:.4f}", f"{result['ppl']:.2f}", f"{low:.2f} .. {high:.2f}",
                f"{result['bits_per_byte']:.4f}", f"{result['nll_mc_se']:.5f}")])
    if 1 < len(by_count) <= 32:
        log.table("nats per masked token, by masked tokens in the block", [str(k) for k in by_count],
                  [[f"{nll:.3f}" for nll in by_count.values()]])


class Evaluator:
    """Likelihood of prepared rows under one model; compiles once."""

    def __init__(self, config: Config, model: Backbone, special: SpecialIds, mesh):
        self.config, self.objective, self.mesh = config, config.diffusion, mesh
        execution = dataclasses.replace(execution_of(config), remat="none")
        self.views = 1 if is_exact(config) else VIEWS
        devices = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
        self.batch = -(-config.eval.batch // devices) * devices
        self.sharding = batch_sharding(mesh)
        everywhere = NamedSharding(mesh, P())
        self._row_nats = jax.jit(make_row_nats(model, self.objective, special, execution, self.views),
                                 out_shardings=(everywhere, everywhere))

    def run(self, params, rows: Rows, *, estimator: str, draws: int, seed: int, num_rows: int = 0) -> dict:
        """NLL of the first `num_rows` rows (0: all) in nats per token, with intervals.

        Returns the numbers of the `eval` command, and `nll_by_count`: mean cross-entropy of the masked tokens of
        blocks with k of them, by k. Deterministic in (params, rows, seed, draws), whatever the devices.
        """
        check_estimator(estimator, self.config, draws)
        began = time.perf_counter()
        draws = 1 if is_exact(self.config) else draws
        total = _Totals(self.objective.block_size)
        chosen = np.arange(len(rows) if num_rows == 0 else min(num_rows, len(rows)))
        with jax.set_mesh(self.mesh):
            for start in range(0, len(chosen), self.batch):
                self._add_rows(total, params, rows, chosen[start:start + self.batch], draws, seed)
        return {**total.summary(rows), "estimator": estimator, "draws": draws, "seed": seed,
                "wall_s": time.perf_counter() - began}

    def _add_rows(self, total: "_Totals", params, rows: Rows, ids: np.ndarray, draws: int, seed: int) -> None:
        """One batch of rows, all draws. A short batch is filled up with its last row, which is then not counted."""
        padded = np.concatenate([ids, np.full(self.batch - len(ids), ids[-1])])
        arrays = place_rows(rows, padded, self.sharding)
        row_ids = jax.make_array_from_callback(padded.shape, self.sharding,
                                               lambda index: padded[index].astype(np.int32))
        key = jax.random.key(seed)
        parts = [self._row_nats(params, key, draw, row_ids, arrays["tokens"], arrays["positions"], arrays["segments"])
                 for draw in range(draws)]
        parts = [(np.asarray(nats)[:len(ids)], np.asarray(counts)[:len(ids)]) for nats, counts in parts]
        nats_BxMxL, counts_BxMxK = (np.concatenate(x, axis=1) for x in zip(*parts))
        documents_BxL = rows.documents(ids)
        if self.objective.causal:
            documents_BxL = np.where(self.objective.weight(rows.segments(ids)) > 0, documents_BxL, -1)
        total.add(nats_BxMxL.astype(np.float64), counts_BxMxK, documents_BxL)


class _Totals:
    """Sums over rows on the host, in float64."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.nats, self.tokens = np.zeros(0), np.zeros(0)  # by document
        self.rows = []  # [views] nats of each row and view
        self.count_nats, self.count_blocks = np.zeros(block_size + 1), np.zeros(block_size + 1)

    def add(self, nats_BxMxL, counts_BxMxK, documents_BxL) -> None:
        real = documents_BxL >= 0
        documents = documents_BxL[real]
        self.nats = _grow(self.nats, np.bincount(documents, nats_BxMxL.mean(1)[real]))
        self.tokens = _grow(self.tokens, np.bincount(documents))
        self.rows.extend(nats_BxMxL.sum(-1))
        blocks = nats_BxMxL.reshape(*counts_BxMxK.shape, -1).sum(-1)
        n = np.minimum(self.block_size, np.maximum(real.reshape(len(real), -1, self.block_size).sum(-1), 1))[:, None]
        mean = blocks / n  # weight is n / k (uniform counts): this is the mean cross-entropy of the k masked tokens
        counts = counts_BxMxK.reshape(-1)
        self.count_nats += np.bincount(counts, mean.reshape(-1), self.block_size + 1)
        self.count_blocks += np.bincount(counts, minlength=self.block_size + 1)

    def summary(self, rows: Rows) -> dict:
        kept = self.tokens > 0
        nll, low, high = stats.ratio_interval(self.nats[kept], self.tokens[kept])
        tokens, views_RxM = self.tokens.sum(), np.array(self.rows)
        mc_se = 0.0 if views_RxM.shape[1] == 1 else stats.monte_carlo_se(views_RxM) / tokens
        # Without all tokens scored (some rows, or AR without bos) bytes are those of as many average tokens.
        size = rows.meta["bytes"] * tokens / rows.meta["tokens"]
        by_count = {k: self.count_nats[k] / self.count_blocks[k] for k in range(1, self.block_size + 1)
                    if self.count_blocks[k]}
        return {"nll": nll, "nll_ci95": [low, high], "nll_mc_se": mc_se, "ppl": _exp(nll),
                "ppl_ci95": [_exp(low), _exp(high)], "bits_per_byte": self.nats.sum() / math.log(2) / size,
                "tokens": int(tokens), "documents": int(kept.sum()), "nll_by_count": by_count}


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _grow(total: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Sum of two lists by index, as long as the longer one."""
    if len(part) > len(total):
        total = np.pad(total, (0, len(part) - len(total)))
    total[:len(part)] += part
    return total
