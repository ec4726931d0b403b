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

from bd3lm_jax.checkpoints import adapt, rundir
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.config import Config
from bd3lm_jax.core import compile_cache, jax_settings, paths
from bd3lm_jax.core.errors import Preempted, RunError, UserError
from bd3lm_jax.core.log import RunLog, note, read_metrics, spinner
from bd3lm_jax.core.state import LORA, OBJECTIVE_PARAMS, TrainState
from bd3lm_jax.core.typed import Nested, flatten
from bd3lm_jax.data.loader import Loader, prefetch
from bd3lm_jax.data.mixture import MixedRows
from bd3lm_jax.data.prepare import Rows, prepare, prepare_tokenizer
from bd3lm_jax.data.token_bytes import RowsWithBytes
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.likelihood.evaluate import Evaluator
from bd3lm_jax.models import forward
from bd3lm_jax.parallel import distributed, replicas, sharding
from bd3lm_jax.parallel.watchdog import Watchdog
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training import memory, optim, profiling, report, trackers
from bd3lm_jax.training.callbacks import (
    Alive,
    Callback,
    NoiseSelection,
    Progress,
    ReplicaCheck,
    Saving,
    Validation,
    call_due,
)
from bd3lm_jax.training.metrics import Clock, Logging
from bd3lm_jax.training.noise import NoiseSelector
from bd3lm_jax.training.profiling import Profiler
from bd3lm_jax.training.program import Program
from bd3lm_jax.training.trackers import Trackers
from bd3lm_jax.training.validation import Validator

PREFETCH = 2  # batches placed ahead of the step, at least


@dataclasses.dataclass
class Run:
    """What a run is made of, resolved and placed; built once by `set_up`."""

    config: Config
    workdir: Path
    tokenizer: Tokenizer
    rows: dict[str, Rows | MixedRows]  # by split: "train", "valid"
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
    config, program, checkpoint, clock = run.config, run.program, run.config.checkpoint, Clock()
    with (jax.set_mesh(program.mesh), Watchdog(stuck_after, "no step finished") as watchdog,
          Checkpoints(run.workdir, checkpoint.keep, keep_best=checkpoint.keep_best) as checkpoints):
        now = _initial_or_restored_state(run, checkpoints)
        watchdog.done()
        start, steps = now.step, config.train.steps
        stored = distributed.broadcast_from_process0(report.read_finished_report(run)) if start == steps else None
        if stored:
            return stored.get("valid", {}), None
        evaluator = Evaluator(config, program.model, program.special, program.mesh, config.eval.batch_size,
                              config.execution)
        evaluator.alive = lambda: (watchdog.done(), stop.alive())
        validator, selector = Validator(run, evaluator), NoiseSelector(config, program.model, program.special,
                                                                       program.mesh)
        loader = Loader(run.rows["train"], config.train.batch_size, config.seed, sharding.batch_sharding(program.mesh))
        names = config.log.trackers if jax.process_index() == 0 else ()
        with (Trackers(names, run.workdir, config.to_dict(), start) as tracking,
              RunLog(run.workdir, steps, start_step=start, listeners=(tracking.metrics,)) as log,
              Profiler(run.workdir, start + profiling.FIRST, profiling.STEPS if profile else 0) as profiler):
            _loop(run, now, loader, clock, stop, log, [
                profiler,
                ReplicaCheck(start, program.mesh.size),
                Alive(watchdog, checkpoints),
                Validation(validator, config.eval.every, stop, bool(config.train.init_from) and not start),
                NoiseSelection(selector, config.eval.every, lambda step: loader.get(step)[1]),
                Logging(config, clock, log),
                Saving(checkpoints, checkpoint.every, log, watchdog, validator, lambda state: {
                    "tokenizer": run.tokenizer.identity, "config_sha256": config.sha256(),
                    "noise": selector.as_metrics(state)}),
            ])
        weights, valid = validator.weights(now.state), now.valid or validator(now.state, is_final=True)
    report.write_report(run, weights, valid, evaluator)
    return valid, clock.median_ms()


def set_up(config: Config, workdir: str | os.PathLike, exit_stack: contextlib.ExitStack) -> Run:
    """Read the data, check everything that can be wrong and claim the run directory, which stays locked until
    `exit_stack` is closed; nothing is computed yet."""
    replicas.check_start()
    trackers.check(config.log.trackers)
    distributed.assert_equal_across_processes(flatten(config.to_dict()), "configuration")
    mesh = sharding.make_mesh(config.mesh)
    tokenizer = adapt.add_mask_token(config, distributed.process0_first(lambda: prepare_tokenizer(config.data)))
    config = rundir.resolve(config, tokenizer)
    program = Program.of(config, SpecialIds(tokenizer.mask_id, tokenizer.end_id), mesh,
                         forward.compute_dtype(config.compute.dtype))
    if config.train.init_from:
        adapt.check_source(config, tokenizer)
    rows = distributed.process0_first(lambda: {
        split: prepare(config.data, split, config.block_size, tokenizer, _report_preparation)
        for split in ("train", "valid")})
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


def _initial_or_restored_state(run: Run, checkpoints: Checkpoints) -> Progress:
    """The newest checkpoint of this run with its latest losses, else the weights of `init_from`, else random ones."""
    abstract_state = run.program.arguments()[0]
    done = checkpoints.latest_step()
    if done is not None and done > run.config.train.steps:
        raise UserError(f"{run.workdir} is at step {done} already, train.steps={run.config.train.steps}: give at least "
                        f"{done}, or another --workdir")
    if done is not None:
        state, meta = checkpoints.restore(abstract_state)
        rundir.check_tokenizer(run.tokenizer, meta["tokenizer"], f"the checkpoint in {run.workdir}")
        note(f"continuing from step {int(state.step)} of {run.workdir}")
        return Progress(state, meta["losses"], int(state.step))
    with memory.explain_out_of_memory(run.program):
        with spinner("making the first weights"):
            state = jax.block_until_ready(run.program.initial_state())
    if not run.config.train.init_from:
        return Progress(state, [])
    network = {name: x for name, x in abstract_state.params.items() if name not in (OBJECTIVE_PARAMS, LORA)}
    params = state.params | adapt.initial_weights(run.config, run.program.model, run.tokenizer, network,
                                                  run.program.mesh)  # an objective's own parameters begin anew
    ema = jax.tree.map(jnp.copy, params) if state.ema else {}
    return Progress(state.replace(params=params, ema=ema), [])


def _loop(run: Run, now: Progress, loader: Loader, clock: Clock, stop: distributed.Stop, log: RunLog,
          callbacks: list[Callback]) -> None:
    """All steps: batch, step, callbacks. Metrics are read one step late, except where a callback waits for the step."""
    steps, workers = run.config.train.steps, run.config.data.workers
    launch, pending = _PhasedStep(run.program, now.step), None
    _announce(run, log)
    for callback in callbacks:
        callback.at_start(now)
    now.valid = {}
    batches = prefetch(loader.get, now.step, steps, workers, max(PREFETCH, workers))
    with contextlib.closing(batches), stop.defer_to_steps():
        for step, (ids, batch) in zip(range(now.step, steps), batches):
            for callback in callbacks:
                callback.before_step(now)
            with memory.explain_out_of_memory(run.program):
                now.state, metrics = launch(step, now.state, batch)
                now.finished = pending and _read(run, pending, clock)
            now.step, now.is_last, pending = step + 1, step + 1 == steps, (step, ids, metrics)
            for callback in callbacks:
                callback.after_launch(now)
            now.is_stopping = stop.should_stop(now.step)
            if any(callback.waits and callback.is_due(now) for callback in callbacks):
                now.finished, pending = _read(run, pending, clock), None
                call_due(callbacks, now)
                clock.pause()
            if now.is_stopping:
                raise Preempted(f"stopped by SIGTERM after step {now.step}, which is saved in {run.workdir}: run the "
                                "same command again to go on", on_all_processes=True)


class _PhasedStep:
    """The training step of every phase of a run, compiled when it is first used."""

    def __init__(self, program: Program, start: int):
        self.config, self.functions, self.compiled = program.config, program.steps(), set()
        replicas.check_program(lambda: self.functions[self.config.phase_at(start)].lower(*program.arguments()))

    def __call__(self, step: int, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        phase = self.config.phase_at(step)
        with contextlib.nullcontext() if phase in self.compiled else spinner("compiling the step"):
            result = self.functions[phase](state, batch)
        self.compiled.add(phase)
        return result


def _announce(run: Run, log: RunLog) -> None:
    config, program = run.config, run.program
    log.note(f"{program.num_params:,} parameters, {len(run.rows['train'])} rows of {config.data.seq_len} tokens, "
             f"{program.mesh.size} x {jax.devices()[0].device_kind}; compiling the step")
    warmup = optim.warmup_steps(config.optim, config.train.steps)
    if warmup != config.optim.warmup_steps:
        log.note(f"optim.warmup_steps={config.optim.warmup_steps} leaves no room within train.steps="
                 f"{config.train.steps}: warming up over {warmup}")


def _read(run: Run, pending, clock: Clock) -> tuple[int, dict]:
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
            f"optim.lr or raise optim.warmup_steps; the last checkpoint in {run.workdir} is whole",
            on_all_processes=True)
    return step + 1, values


def _last(lines: list[dict], key: str) -> float | None:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)
