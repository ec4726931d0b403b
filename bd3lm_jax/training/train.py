"""Training: one loop from a laptop CPU to a pod; `train(config, workdir)` is all that `python -m launch train` does."""

import contextlib
import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.checkpoints import adapt, rundir
from bd3lm_jax.checkpoints.checkpoint import Checkpoints, items_of
from bd3lm_jax.config import Config
from bd3lm_jax.core import compile_cache, jax_settings, paths
from bd3lm_jax.core.errors import Preempted, RunError, UserError
from bd3lm_jax.core.log import RunLog, note, read_metrics, spinner
from bd3lm_jax.core.state import LORA, OBJECTIVE_PARAMS, TrainState
from bd3lm_jax.core.stats import format_interval, format_number
from bd3lm_jax.core.typed import Nested, flatten
from bd3lm_jax.data.loader import Loader, prefetch
from bd3lm_jax.data.prepare import Rows, prepare, prepare_tokenizer
from bd3lm_jax.data.token_bytes import RowsWithBytes
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.likelihood import paired
from bd3lm_jax.likelihood.estimators import has_bound
from bd3lm_jax.likelihood.evaluate import Evaluator
from bd3lm_jax.likelihood.options import EstimatorOptions
from bd3lm_jax.models import forward, lora
from bd3lm_jax.parallel import distributed, replicas, sharding
from bd3lm_jax.parallel.watchdog import Watchdog
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training import memory, optim, profiling, report
from bd3lm_jax.training.noise import NoiseSelector
from bd3lm_jax.training.profiling import Profiler
from bd3lm_jax.training.program import Program

PREFETCH = 2  # batches placed ahead of the step, at least
SHOWN_COUNTS = 32  # larger blocks log their NLL at powers of two masked tokens only
RATE_STEPS = 20  # steps over which the shown rate is averaged


@dataclasses.dataclass
class Run:
    """What a run is made of, resolved and placed; built once by `set_up`."""

    config: Config
    workdir: Path
    tokenizer: Tokenizer
    rows: dict[str, Rows]  # by split: "train", "valid"
    program: Program

    @functools.cached_property
    def valid_rows(self) -> RowsWithBytes:
        """The validation split with the bytes of its tokens."""
        return RowsWithBytes(self.rows["valid"], self.tokenizer)


@jax_settings.pinned()
def train(config: Config | Nested, workdir: str | os.PathLike, profile: bool = False,
          stuck_after: float = 0.0) -> dict[str, Any]:
    """Train to `config.train.steps`, going on from the newest checkpoint in `workdir` if there is one.

    config: a Config, or the ConfigDict or dict that `get_config()` of a config file returns. profile: write a trace of
    a few steps into WORKDIR/profile. stuck_after: seconds without a finished step after which the process ends with
    exit code 75 (watchdog.py), 0 for never. Returns the result object of the `train` command; of a run that is finished
    that of its stored report.
    Raises UserError for wrong input (also if another process trains in `workdir`), RunError when the loss is not finite
    (with step and rows), memory runs out (with what would fit), a save fails or replicas differ, Preempted after
    SIGTERM once the state is saved (at once where nothing is: before the first step and in the closing report).
    """
    start_time = time.perf_counter()
    config = Config.from_dict(adapt.resolve(config))
    compile_cache.enable()
    with contextlib.ExitStack() as exit_stack:
        stop = exit_stack.enter_context(distributed.stop_on_sigterm())
        run = set_up(config, paths.local(workdir, "workdir"), exit_stack)
        valid, step_ms = _train(run, stop, profile, stuck_after)
    lines = read_metrics(run.workdir)
    return {"workdir": str(run.workdir), "step": run.config.train.steps, "train_nll": _last(lines, "train/nll"),
            "valid_nll": valid.get("nll"), "valid_ppl": valid.get("ppl"),
            "tokens_per_s": _last(lines, "train/tokens_per_s"), "step_ms": step_ms, "params": run.program.num_params,
            "wall_s": time.perf_counter() - start_time}


def _train(run: Run, stop: distributed.Stop, profile: bool, stuck_after: float) -> tuple[dict, float | None]:
    """All steps and the report -> last validation, median milliseconds a step. Of a finished run the stored report."""
    program, checkpoint_config = run.program, run.config.checkpoint
    with (jax.set_mesh(program.mesh), Watchdog(stuck_after, "no step finished") as watchdog,
          Checkpoints(run.workdir, checkpoint_config.keep, keep_best=checkpoint_config.keep_best) as checkpoints):
        state, losses = _initial_or_restored_state(run, checkpoints)
        watchdog.done()
        start = int(state.step)
        stored = distributed.broadcast_from_process0(report.read_finished_report(run)) if start == run.config.train.steps else None
        if stored:
            return stored.get("valid", {}), None
        evaluator = Evaluator(run.config, program.model, program.special, program.mesh)
        evaluator.alive = lambda: (watchdog.done(), stop.alive())
        with (RunLog(run.workdir, run.config.train.steps, start_step=start) as log,
              Profiler(run.workdir, start + profiling.FIRST, profiling.STEPS if profile else 0) as profiler):
            state, step_ms, valid = _loop(run, state, losses, checkpoints, evaluator, log, stop, profiler, watchdog)
        weights = _weights(run, state)
        valid = valid or _validate(run, evaluator, weights, is_final=True)
    report.write_report(run, weights, valid, evaluator)
    return valid, step_ms


def set_up(config: Config, workdir: str | os.PathLike, exit_stack: contextlib.ExitStack) -> Run:
    """Read the data, check everything that can be wrong and claim the run directory, which stays locked until
    `exit_stack` is closed; nothing is computed yet."""
    replicas.check_start()
    distributed.assert_equal_across_processes(flatten(config.to_dict()), "configuration")
    mesh = sharding.make_mesh(config.mesh)
    tokenizer = adapt.add_mask_token(config, distributed.process0_first(lambda: prepare_tokenizer(config.data)))
    config = rundir.resolve(config, tokenizer)
    program = Program.of(config, SpecialIds(tokenizer.mask_id, tokenizer.end_id), mesh,
                         forward.compute_dtype(config.compute.dtype))
    if config.train.init_from:
        adapt.check_source(config, tokenizer)
    rows = distributed.process0_first(lambda: {
        split: prepare(config.data, split, config.block_size, tokenizer, _report_preparation) for split in ("train", "valid")})
    hashes = {name: split.meta["hash"] for name, split in rows.items()}
    distributed.assert_equal_across_processes(hashes | {"tokenizer": tokenizer.identity}, "text")
    distributed.run_on_process0(lambda: rundir.create_or_validate(workdir, config, tokenizer, exit_stack))
    distributed.assert_shared_directory(Path(workdir), lambda: rundir.shared_state(workdir))
    if rows["train"].has_density:
        _report_density(rows["train"].meta["density_mean"])
    return Run(config, Path(workdir), tokenizer, rows, program)


def _report_density(mean: float) -> None:
    uniform_note = "; a block whose tokens are all alike is masked uniformly"
    note(f"density: {mean:.1%} on average" + (uniform_note if 0 < mean < 1 else ", everywhere: all masks are uniform"))


def _report_preparation(documents: int, tokens: int) -> None:
    note(f"preparing: {documents:,} documents, {tokens:,} tokens")


def _initial_or_restored_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, list[float]]:
    """The newest checkpoint of this run and its latest losses, else the weights of `init_from`, else random ones."""
    abstract_state = run.program.arguments()[0]
    done = checkpoints.latest_step()
    if done is not None and done > run.config.train.steps:
        raise UserError(f"{run.workdir} is at step {done} already, train.steps={run.config.train.steps}: give at least "
                        f"{done}, or another --workdir")
    if done is not None:
        state, meta = checkpoints.restore(abstract_state)
        rundir.check_tokenizer(run.tokenizer, meta["tokenizer"], f"the checkpoint in {run.workdir}")
        note(f"continuing from step {int(state.step)} of {run.workdir}")
        return state, meta["losses"]
    with memory.explain_out_of_memory(run.program):
        with spinner("making the first weights"):
            state = jax.block_until_ready(run.program.initial_state())
    if not run.config.train.init_from:
        return state, []
    network = {name: x for name, x in abstract_state.params.items() if name not in (OBJECTIVE_PARAMS, LORA)}
    params = state.params | adapt.initial_weights(run.config, run.program.model, run.tokenizer, network,
                                                  run.program.mesh)  # an objective's own parameters begin anew
    ema = jax.tree.map(jnp.copy, params) if state.ema else {}
    return state.replace(params=params, ema=ema), []


def _loop(run: Run, state, losses: list[float], checkpoints: Checkpoints, evaluator: Evaluator, log: RunLog, stop,
          profiler: Profiler, watchdog: Watchdog):
    """All steps -> last state, median milliseconds a step, last validation. Metrics are read one step late."""
    config, program, start = run.config, run.program, int(state.step)
    step_fns = program.steps()
    replicas.check_program(lambda: step_fns[config.phase_at(start)].lower(*program.arguments()))
    loader = Loader(run.rows["train"], config.train.batch_size, config.seed, sharding.batch_sharding(program.mesh))
    tokens_a_step = config.train.batch_size * config.data.seq_len
    pending, clock, valid = None, _Clock(), {}
    schedule, warmup = (make(config.optim, config.train.steps) for make in (optim.make_schedule, optim.warmup_steps))
    choose_noise = NoiseSelector(config, program.model, program.special, program.mesh)
    window = _MetricsWindow(config, tokens_a_step, schedule, losses)
    log.note(f"{program.num_params:,} parameters, {len(run.rows['train'])} rows of {config.data.seq_len} tokens, "
             f"{program.mesh.size} x {jax.devices()[0].device_kind}; compiling the step")
    if warmup != config.optim.warmup_steps:
        log.note(f"optim.warmup_steps={config.optim.warmup_steps} leaves no room within train.steps="
                 f"{config.train.steps}: warming up over {warmup}")
    workers, compiled = config.data.workers, set()
    if config.train.init_from and not start:
        window.log_initial_validation(_validate(run, evaluator, _weights(run, state), is_final=False), log)
        watchdog.done()
    batches = prefetch(loader.get, start, config.train.steps, workers, max(PREFETCH, workers))
    with contextlib.closing(batches), stop.defer_to_steps():
        for step, (ids, batch) in zip(range(start, config.train.steps), batches):
            profiler.step(step, state)
            phase = config.phase_at(step)
            with memory.explain_out_of_memory(program):
                with contextlib.nullcontext() if phase in compiled else spinner("compiling the step"):
                    state, metrics = step_fns[phase](state, batch)
                compiled.add(phase)
                values = _read(run, pending, clock) if pending is not None else None
            if step == start and program.mesh.size > 1:
                replicas.check(items_of(state), f"found after step {step + 1}, the first of this start")
            watchdog.done()
            checkpoints.check()
            if values is not None:
                window.add(*values, {}, {}, clock, log)
            pending, done = (step, ids, metrics), step + 1
            last, stopping = done == config.train.steps, stop.should_stop(done)
            validating = last or done % config.eval.every == 0
            saving = last or stopping or done % config.checkpoint.every == 0
            if validating or saving:
                values = _read(run, pending, clock)
                valid, noise = {}, {}
                if validating:
                    valid = {} if stopping else stop.run_unless_stopped(
                        lambda: _validate(run, evaluator, _weights(run, state), is_final=last), {})
                    stopping = stopping or stop.signalled.is_set()
                    saving = saving or stopping
                    state, noise = choose_noise(state, lambda at: loader.get(at)[1], done)
                window.add(*values, valid, noise, clock, log)
                pending = None
                clock.pause()
            if saving:
                log.sync()
                checkpoints.save(done, state, {"tokenizer": run.tokenizer.identity, "config_sha256": config.sha256(),
                                               "losses": window.losses,
                                               "noise": choose_noise.as_metrics(state)}, wait=last or stopping,
                                 bound=_best_checkpoint_bound(run, evaluator, state, valid, last))
                watchdog.done()
            if stopping:
                raise Preempted(f"stopped by SIGTERM after step {done}, which is saved in {run.workdir}: run the same "
                                "command again to go on", on_all_processes=True)
    return state, clock.median_ms(), valid


def _weights(run: Run, state: TrainState) -> dict:
    """What is evaluated: the average if there is one, with low-rank updates in their matrices."""
    return lora.merge_lora_jitted(state.ema or state.params, run.config.train)


def _validate(run: Run, evaluator: Evaluator, weights, is_final: bool) -> dict:
    """The bound on the validation split; {} for a model that has none. whole: as in the report, `eval.report_rows` rows
    with all draws, which then stay in the run directory by document; else `eval.rows` rows from one draw."""
    if not has_bound(run.config):
        return {}
    settings, rows = run.config.eval, run.valid_rows
    with spinner("validating"):
        options = EstimatorOptions(draws=settings.mc_samples if is_final else 1, seed=run.config.seed)
        measured = evaluator.measure(weights, rows, options,
                                     num_rows=settings.report_rows if is_final else settings.rows)
    if is_final and jax.process_index() == 0:
        paired.save(run.workdir, measured, rows)
    return measured.summary(rows)


def _best_checkpoint_bound(run: Run, evaluator: Evaluator, state: TrainState, valid: dict, is_final: bool) -> float | None:
    """The bound that tells the best checkpoint: of the same rows with the same noise at every step.

    valid: the validation of this step, {} if there was none. whole: it was the last one, that of the report."""
    if not valid or not run.config.checkpoint.keep_best:
        return None
    settings, rows = run.config.eval, len(run.rows["valid"])
    measured, regular_rows = (min(count or rows, rows) for count in (settings.report_rows, settings.rows))
    if is_final and (settings.mc_samples > 1 or measured != regular_rows):
        valid = _validate(run, evaluator, _weights(run, state), is_final=False)
    return valid["nll"]


def _read(run: Run, pending, clock: "_Clock") -> tuple[int, dict]:
    """Updates done and metrics of a step, once it has run. Raises RunError if they are not finite."""
    step, ids, metrics = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    clock.tick()
    if values["overflow"]:
        raise RunError(f"a row of step {step + 1} has more masked tokens than the capacity of its objective: "
                       f"{type(run.config.diffusion).__name__} draws more than it declares; the last checkpoint in "
                       f"{run.workdir} is whole", on_all_processes=True)
    if not values["finite"]:
        raise RunError(
            f"the loss of step {step + 1} is not finite (loss {values['loss']}, gradient norm {values['grad_norm']}; "
            f"rows {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''} of the training split): lower "
            f"optim.lr or raise optim.warmup_steps; the last checkpoint in {run.workdir} is whole", on_all_processes=True)
    return step + 1, values


class _MetricsWindow:
    """Averages what is logged over `every` steps."""

    def __init__(self, config: Config, tokens_a_step: int, schedule, losses: list[float]):
        self.config, self.objective, self.every = config, config.diffusion, config.log.every
        self.tokens_a_step, self.schedule = tokens_a_step, schedule
        self.losses = losses  # the latest ones; they travel with the checkpoint, so that a resumed run logs the same

    def add(self, step: int, values: dict, valid: dict, noise: dict, clock: "_Clock", log: RunLog) -> None:
        """Show a step; log it if it ends a window or was validated (`valid`: result of `Evaluator.run`, or {}; `noise`:
        what is used from then on)."""
        self.losses = [*self.losses, values["loss"]][-max(self.every, RATE_STEPS):]
        rate, line = self.tokens_a_step / clock.recent_s(), {}
        log.progress(step, float(np.mean(self.losses[-RATE_STEPS:])), rate)
        if step % self.every == 0 or valid:
            loss = float(np.mean(self.losses[-self.every:]))
            line = {"train/loss": loss, "train/grad_norm": values["grad_norm"],
                    "train/lr": float(self.schedule(step - 1)), "train/masked_fraction": values["masked"],
                    "train/tokens_per_s": rate}
            if self.config.train.block_sizes:
                line["train/block_size"] = self.config.block_size_at(step - 1)
            if self.objective.is_bound and not self.config.model.load_balancing:
                line["train/nll"] = loss
        if valid:
            line |= self._log_validation(step, valid, log)
            line |= {f"noise/{name}": value for name, value in noise.items()}
        if line:
            log.metrics(step, line)

    def log_initial_validation(self, valid: dict, log: RunLog) -> None:
        """Log what foreign weights are worth before the first step."""
        if valid:
            log.metrics(0, self._log_validation(0, valid, log))

    def _log_validation(self, step: int, valid: dict, log: RunLog) -> dict:
        by_count, size, (low, high) = valid["nll_by_count"], self.objective.block_size, valid["nll_ci95"]
        shown = [k for k in by_count if size <= SHOWN_COUNTS or k == size or k & (k - 1) == 0]
        nll = f"{format_number(valid['nll'], '.4f')} ({format_interval((low, high), '.4f')})"
        log.note(f"step {step}: valid nll {nll}, {format_number(valid['bits_per_byte'], '.3f')} bits per byte")
        return {**{f"valid/{name}": valid[name] for name in ("nll", "ppl", "bits_per_byte")},
                "valid/nll_low": low, "valid/nll_high": high,
                **{f"valid/nll_at_{k}_masked": by_count[k] for k in shown}}


class _Clock:
    """Seconds between steps; what happens in a pause does not count."""

    def __init__(self):
        self.seconds, self.last = [], None

    def tick(self) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now

    def pause(self) -> None:
        self.last = None

    def recent_s(self) -> float:
        return float(np.mean(self.seconds[-RATE_STEPS:])) if self.seconds else float("inf")

    def median_ms(self) -> float | None:
        return float(np.median(self.seconds)) * 1e3 if self.seconds else None


def _last(lines: list[dict], key: str) -> float | None:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)
