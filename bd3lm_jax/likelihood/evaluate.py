"""Likelihood of a split with its error bars, by any estimator of `estimators.py`.

A round of D draws gives every row `replicates` independent estimates; their spread tells the Monte-Carlo error. The
noise is a function of (seed, round, row, replicate, draw) alone.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bd3lm_jax.checkpoints.hf import is_published, local
from bd3lm_jax.checkpoints.restore import refuse_step, restore, restore_published
from bd3lm_jax.config import DataConfig, LMConfig, MeshConfig
from bd3lm_jax.core import jax_settings, log, stats
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.stats import ppl_of
from bd3lm_jax.data.loader import place_rows
from bd3lm_jax.data.rows import TokenRows
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions, Target
from bd3lm_jax.models import Backbone
from bd3lm_jax.models.forward import Execution
from bd3lm_jax.parallel import sharding
from bd3lm_jax.parallel.sharding import batch_sharding
from bd3lm_jax.scoring.score import SpecialIds, exceeds_capacity, row_losses, score

MIN_FREEDOM = 120  # degrees of freedom of the draws before a target is judged: fewer stop by the luck of a low spread
CHUNK_TOKENS = 1 << 20  # whose bytes are counted at a time
QUEUE = 2  # batches in flight: the device goes on while the host reads rows and adds up
PILOT_ROWS, PILOT_ROUND = 32, 2**32 - 1  # what "importance" learns from; a round that is never scored
GIVE_UP_FACTOR = 4  # a target that seems to need so many times --max_mc_samples is given up before they are drawn


def check_draws(draws: int) -> None:
    if draws < 1:
        raise UserError(f"draws is {draws}, expected at least 1")


def make_scores(model: Backbone, objective: Any, estimator: Any, special: SpecialIds, execution: Execution, draws: int):
    """`f(params, key, index, row_ids, tokens, positions, segments, scored)` -> pass `index` of `draws` draws of rows.

    Tokens that are not `scored` (bool [B, L]) are given: never masked, never counted. Returns contributions in nats,
    float32 `[B, R, L]` (summed over L and averaged over passes: an estimate of the row by each of R replicates), and of
    every block of the M copies the masked tokens, int32 `[B, M, K]`, and their mean cross-entropy, float32 `[B, M, K]`.
    """
    def noise(key, index, tokens, segments):
        return estimator.noised(key, index, draws, tokens, segments, special)

    def scores(params, key, index, row_ids, tokens, positions, segments, scored):
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)
        maskable = jnp.where(scored, segments, 0) if objective.draws_noise else segments
        noised = jax.vmap(noise, in_axes=(0, None, 0, 0))(keys, index, tokens, maskable)
        rows = {"tokens": tokens, "positions": positions, "segments": segments, "scored": scored}
        return score_noised(model, params, objective, noised, rows, special, execution, estimator)

    return scores


def score_noised(model: Backbone, params: dict, objective: Any, noised: Any, rows: dict, special: SpecialIds,
                 execution: Execution, estimator: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `make_scores` returns, of noised copies that are there. rows: `tokens`, `positions`, `segments`, `scored`,
    `[B, L]` each."""
    scored = score(model, params, objective, noised, rows, execution, special.end)
    is_unscored = scored.weight_BxMxC == 0
    losses = jnp.where(is_unscored, 0, row_losses(model, params, scored, special.mask, 0, estimator.token_loss))
    place = jax.vmap(jax.vmap(lambda losses, index: jnp.zeros(rows["tokens"].shape[1]).at[index].add(losses)))
    losses_BxMxL = jnp.where(rows["scored"][:, None], place(losses, scored.index_BxMxC), 0)
    nats_BxMxL = losses_BxMxL * noised.weight_BxMxL + jnp.where(exceeds_capacity(noised), jnp.nan, 0)[..., None]
    batch, noise_samples, length = nats_BxMxL.shape
    nats_BxRxL = nats_BxMxL.reshape(batch, estimator.replicates, -1, length).mean(2)
    blocks = (batch, noise_samples, -1, objective.block_size)
    counts_BxMxK = ((noised.weight_BxMxL > 0) & rows["scored"][:, None]).reshape(blocks).sum(-1)
    return nats_BxRxL, counts_BxMxK, losses_BxMxL.reshape(blocks).sum(-1) / jnp.maximum(counts_BxMxK, 1)


class LoadedRun(NamedTuple):
    """A run that is ready to be measured."""

    workdir: str
    config: LMConfig
    data: DataConfig
    tokenizer: Any
    params: Any
    evaluator: "Evaluator"
    step: int
    config_sha256: str

    def for_estimator(self, name: str) -> "LoadedRun":
        """The run as an estimator measures it: "nll" as an autoregressive model where it is one, too."""
        if name != "nll" or self.evaluator.autoregressive is None:
            return self
        return self._replace(config=self.evaluator.autoregressive.config, evaluator=self.evaluator.autoregressive)


def open_run(workdir: str, options: ModelOptions = ModelOptions()) -> LoadedRun:
    """A checkpoint of a run, or a published one (`hf.local`), over all devices."""
    mesh, path = sharding.make_mesh(MeshConfig(slices=-1)), local(workdir)
    if is_published(path):
        refuse_step(workdir, options.step)
        run = restore_published(path, options.weights, mesh, options.length)
    else:
        run = restore(path, options.weights, None, mesh, options.step)
    config = run.config.at_trained_block_size(options.block_size) if options.block_size else run.config
    evaluator = Evaluator(config, run.model, SpecialIds(run.tokenizer.mask_id, run.tokenizer.end_id), mesh,
                          options.batch_size or run.batch_size, run.execution)
    return LoadedRun(workdir, config, run.data, run.tokenizer, run.params, evaluator, run.step, run.config_sha256)


class _Round(NamedTuple):
    """Draws of one round: its noise is a function of (seed, number) and of rows, replicates and draws."""

    estimator: Any
    params: Any
    rows: Any
    draws: int
    seed: int
    number: int


class Evaluator:
    """Likelihood of prepared rows under one model; compiles once for each estimator and number of draws.

    batch_size: rows a pass, rounded up to a multiple of the devices.
    """

    def __init__(self, config: LMConfig, model: Backbone, special: SpecialIds, mesh, batch_size: int,
                 execution: Execution):
        self.config, self.model, self.special, self.mesh = config, model, special, mesh
        self.execution = dataclasses.replace(execution, remat="none")
        devices = sharding.num_row_shards(mesh)
        self.batch = -(-batch_size // devices) * devices
        self.sharding = batch_sharding(mesh)
        self._programs = {}
        self.alive: Callable[[], object] = lambda: None  # called after every batch

    @functools.cached_property
    def autoregressive(self) -> "Evaluator | None":
        """The evaluator of the same weights as an autoregressive model; None where they were not trained as one."""
        config = self.config.autoregressive
        if config is None:
            return None
        evaluator = Evaluator(config, self.model._replace(config=config.model), self.special, self.mesh, self.batch,
                              self.execution)
        evaluator.alive = lambda: self.alive()
        return evaluator

    def autoregressive_summary(self, params, rows: TokenRows, num_rows: int = 0) -> dict:
        """The exact likelihood under the autoregressive mode of a model that has one, its keys with "ar_" before them;
        {} for others."""
        if self.autoregressive is None:
            return {}
        options = EstimatorOptions("nll", 1, 0)
        summary = self.autoregressive.measure(params, rows, options, num_rows=num_rows).summary(rows)
        return {f"ar_{name}{end}": summary[f"{name}{end}"] for name in ("nll", "ppl", "bits_per_byte")
                for end in ("", "_ci95")}

    def run(self, params, rows: TokenRows, *, estimator: str, draws: int, seed: int, num_rows: int = 0) -> dict:
        """NLL of the first `num_rows` rows (0: all) in nats per token, with intervals.

        rows: `sized.RowsWithBytes`, or windows of them. Returns the numbers of the `eval` command, and `nll_by_count`:
        mean cross-entropy of the masked tokens of blocks with k of them, by k. Deterministic in (params, rows, seed,
        draws), whatever the devices.
        """
        options = EstimatorOptions(estimator, draws, seed)
        return self.measure(params, rows, options, num_rows=num_rows).summary(rows)

    def measure(self, params, rows: TokenRows, options: EstimatorOptions, *, num_rows: int = 0,
                rounds: int = 1) -> "LikelihoodResult":
        """As `run`, as sums by row and document.

        `rounds` rounds of draws, or with a target until it is met. Raises RunError if `max_draws` do not meet it.
        """
        check_draws(options.draws)
        estimator, target, seed = options.estimator, options.target, options.seed
        began = time.perf_counter()
        ids = np.arange(len(rows) if num_rows == 0 else min(num_rows, len(rows)))
        with jax.set_mesh(self.mesh):
            if isinstance(estimator, str):
                estimator = estimators.make(estimator or estimators.default_estimator(self.config), self.config)
            if estimator.needs_pilot:
                estimator = self._run_pilot(estimator, params, rows, ids[:PILOT_ROWS], seed)
            draws = options.draws if estimator.replicates > 1 else 1
            total = LikelihoodResult(estimator, draws, seed, self.config.block_size, ids, self._documents)
            round_, is_done = 0, False
            while not is_done:
                for batch, passes in self._batches(_Round(estimator, params, rows, draws, seed, round_), ids):
                    total.add(round_, passes, self._documents(rows, batch))
                    self.alive()
                total.wall_s = time.perf_counter() - began
                round_ += 1
                is_done = round_ == rounds if target is None else _target_reached(total, target)
        return total

    def _run_pilot(self, estimator, params, rows, ids, seed):
        """The estimator with the count law of a pilot, whose noise and rows depend on nothing but seed and split."""
        pilot = _Round(estimator, params, rows, 1, seed, PILOT_ROUND)
        parts = [part for _, passes in self._batches(pilot, ids) for part in passes]
        counts, means = (np.concatenate([part[i].swapaxes(1, 2).reshape(-1, estimator.noise_samples) for part in parts])
                         for i in (1, 2))
        return estimator.from_pilot(counts, means)

    def _batches(self, round_: "_Round", ids: np.ndarray):
        """Yields row ids and the passes of their scores (NumPy, see `make_scores`) batch by batch, a few in flight."""
        pending = collections.deque()
        for start in range(0, len(ids), self.batch):
            batch = ids[start:start + self.batch]
            pending.append((batch, self._start(round_, batch)))
            if len(pending) > QUEUE:
                yield _fetch(*pending.popleft())
        while pending:
            yield _fetch(*pending.popleft())

    def _start(self, round_: "_Round", ids: np.ndarray):
        """All passes of a batch, on their way. A short batch is filled up with its last row, which then counts nothing.
        """
        rows, draws = round_.rows, round_.draws
        padded = np.concatenate([ids, np.full(self.batch - len(ids), ids[-1])])
        arrays = place_rows(rows, padded, self.sharding)
        row_ids = jax.make_array_from_callback(padded.shape, self.sharding,
                                               lambda index: padded[index].astype(np.int32))

        def scored_part(index: Any) -> np.ndarray:
            return rows.scored(padded[index[0]])[:, index[1]]

        scored = jax.make_array_from_callback((len(padded), rows.length), self.sharding, scored_part)
        key = jax.random.fold_in(jax_settings.key(round_.seed), round_.number)
        program = self._program(round_.estimator, draws)
        batch = arrays["tokens"], arrays["positions"], arrays["segments"], scored
        return [sharding.block_until_ready_if_simulated(program(round_.params, key, index, row_ids, *batch))
                for index in range(round_.estimator.num_passes(draws))]

    def _program(self, estimator, draws: int):
        if (estimator, draws) not in self._programs:
            scores = make_scores(self.model, self.config.diffusion, estimator, self.special, self.execution, draws)
            replicated = NamedSharding(self.mesh, P())
            self._programs[estimator, draws] = jax.jit(scores, out_shardings=(replicated,) * 3)
        return self._programs[estimator, draws]

    def _documents(self, rows: TokenRows, ids) -> np.ndarray:
        """The document of every token that is scored `[n, L]`; -1 elsewhere."""
        predicted_BxL = np.asarray(self.config.diffusion.predicted_tokens(rows.segments(ids)))
        return np.where(rows.scored(ids) & predicted_BxL, rows.documents(ids), -1)


def _fetch(ids, passes):
    return ids, [tuple(np.asarray(x)[:len(ids)] for x in part) for part in passes]


def _target_reached(total: "LikelihoodResult", target: Target) -> bool:
    """Whether the Monte-Carlo part is as tight as it should be. Raises RunError where it will not be."""
    half, freedom = stats.mc_margin(total.rows_UxR) / total.rows_UxR.mean(0).sum(), stats.mc_degrees_of_freedom(
        total.rows_UxR)
    is_last = total.draws + total.round_draws > target.max_draws
    if freedom < MIN_FREEDOM and not is_last:
        return False
    reached = (f"the Monte-Carlo part of the 95 % interval is +- {half:.3%} of the nll after "
               f"{log.pluralize(total.draws, 'draw')}")
    log.note(f"{reached}, wanted: {target.ci:.3%}; more draws cannot shrink the part that comes from the choice of "
             "documents")
    if half <= target.ci:
        return True
    needed = total.draws * (half / target.ci) ** 2
    if is_last or needed > GIVE_UP_FACTOR * target.max_draws:
        nll = total.rows_UxR.mean(0).sum() / total.tokens_N.sum()
        raise RunError(f"{reached} (nll {nll:.4f}), wanted: {target.ci:.3%}, which takes about {math.ceil(needed)} "
                       f"draws and --max_mc_samples is {target.max_draws}: raise --max_mc_samples or --target_ci")
    return False


class LikelihoodResult:
    """Sums over rows on the host, in float64: U independent estimates (rounds x replicates) of every row and document.
    """

    def __init__(self, estimator: Any, draws: int, seed: int, block_size: int, row_ids: np.ndarray,
                 scored_documents: Callable[[TokenRows, np.ndarray], np.ndarray]):
        """row_ids: the rows that are measured. scored_documents: as `Evaluator._documents`."""
        self._row_ids, self._scored_documents = row_ids, scored_documents
        self.estimator, self.round_draws, self.seed, self.block_size = estimator, draws, seed, block_size
        self.rounds, self.wall_s = 0, 0.0
        self._documents, self._rows, self.tokens_N = [], [], np.zeros(0)
        self.count_nats, self.count_blocks = np.zeros(block_size + 1), np.zeros(block_size + 1)

    @property
    def draws(self) -> int:
        return self.rounds * self.round_draws

    @property
    def documents_UxN(self) -> np.ndarray:
        """Nats of the documents in every estimate."""
        return np.stack(self._documents)

    @property
    def rows_UxR(self) -> np.ndarray:
        """Nats of the rows in every estimate."""
        return np.array(self._rows)

    def add(self, round_: int, passes: list, documents_BxL: np.ndarray) -> None:
        """Scores of a batch of rows, all passes of a round."""
        replicates = self.estimator.replicates
        if round_ == self.rounds:
            self.rounds += 1
            self._documents += [np.zeros(0) for _ in range(replicates)]
            self._rows += [[] for _ in range(replicates)]
        nats_BxRxL = np.asarray(np.mean([nats for nats, _, _ in passes], axis=0, dtype=np.float64))
        real = documents_BxL >= 0
        documents = documents_BxL[real]
        if round_ == 0:
            self.tokens_N = _add_padded(self.tokens_N, np.bincount(documents))
        for replicate in range(replicates):
            nats, unit = nats_BxRxL[:, replicate], round_ * replicates + replicate
            self._documents[unit] = _add_padded(self._documents[unit], np.bincount(documents, nats[real]))
            self._rows[unit].extend(nats.sum(-1))
        for _, counts, means in passes:
            self.count_nats += np.bincount(counts.ravel(), means.ravel(), self.block_size + 1)
            self.count_blocks += np.bincount(counts.ravel(), minlength=self.block_size + 1)

    def bytes_N(self, rows: Any) -> np.ndarray:
        """Bytes of text of the scored tokens of every document, as `tokens_N`. rows: those measured,
        `sized.RowsWithBytes`."""
        bytes_N, step = np.zeros(len(self.tokens_N)), max(1, CHUNK_TOKENS // rows.length)
        for first in range(0, len(self._row_ids), step):
            ids = self._row_ids[first:first + step]
            documents_BxL = self._scored_documents(rows, ids)
            scored = documents_BxL >= 0
            bytes_N += np.bincount(documents_BxL[scored], rows.sizes(ids)[scored], len(bytes_N))
        return bytes_N

    def per_token(self) -> stats.Estimates:
        """Nats per token as a ratio over documents."""
        return stats.Estimates(self.documents_UxN, self.rows_UxR, self.tokens_N)

    def per_byte(self, rows: Any) -> stats.Estimates:
        """Bits per byte of the scored tokens as a ratio over documents."""
        return stats.Estimates(self.documents_UxN, self.rows_UxR, self.bytes_N(rows) * math.log(2))

    @property
    def nll_by_count(self) -> dict[int, float]:
        """Mean cross-entropy of the masked tokens of blocks with k of them, by k."""
        return {k: self.count_nats[k] / self.count_blocks[k] for k in range(1, self.block_size + 1)
                if self.count_blocks[k]}

    def summary(self, rows: Any) -> dict:
        """The numbers of the `eval` command, and nll_by_count. rows: those measured, `sized.RowsWithBytes`."""
        nll = stats.two_part_interval(*self.per_token()).non_negative()
        bits = stats.two_part_interval(*self.per_byte(rows)).non_negative()
        count_distribution = {"count_probs": self.estimator.measure.count_probs
                              } if self.estimator.name == "importance" else {}
        missing = {"ci95_missing": nll.missing or bits.missing} if nll.missing or bits.missing else {}
        return {
            "nll": nll.value, "nll_ci95": [nll.low, nll.high], **missing, "nll_mc_se": nll.mc_se,
            "nll_document_se": nll.document_se, "ppl": ppl_of(nll.value),
            "ppl_ci95": [ppl_of(nll.low),
                         ppl_of(nll.high)], "bits_per_byte": bits.value, "bits_per_byte_ci95": [bits.low, bits.high],
            "tokens": int(self.tokens_N.sum()), "documents": int(np.count_nonzero(self.tokens_N)),
            "nll_by_count": self.nll_by_count, "estimator": self.estimator.name,
            **count_distribution, "draws": self.draws, "seed": self.seed, "wall_s": self.wall_s
        }


def _add_padded(total: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Sum of two lists by index, as long as the longer one."""
    if len(part) > len(total):
        total = np.pad(total, (0, len(part) - len(total)))
    total[:len(part)] += part
    return total
