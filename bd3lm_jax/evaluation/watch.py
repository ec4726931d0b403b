"""`eval --watch`: the likelihood of each new checkpoint of a run that trains, from a process the run does not notice.

Everything in the run directory is only read, but for the file `watch.jsonl`, which training does not know.
"""

import contextlib
import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

from bd3lm_jax.checkpoints import hf, rundir
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.checkpoints.checkpoint_selection import CheckpointNotFound
from bd3lm_jax.checkpoints.restore import restore
from bd3lm_jax.core import jax_settings, log
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.signals import Signals
from bd3lm_jax.core.stats import format_interval, format_number
from bd3lm_jax.data.domains import Text
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.likelihood.estimators import default_estimator
from bd3lm_jax.likelihood.evaluate import LoadedRun, open_run
from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions, TextOptions

FILE = "watch.jsonl"  # of the run directory: a line an evaluation
POLL_S = 2.0  # between looks at the directory
LAST, NOTHING_NEW = "last step", "nothing new"  # why a watch ended, beside the names of signals


def _is_evaluation(line: dict) -> bool:
    return type(line.get("step")) is int and {"asked", "config_sha256"} <= line.keys()


class _Interrupted(Exception):
    """A signal came while a checkpoint was evaluated."""


@jax_settings.pinned()
def watch(workdir: str, *, text: TextOptions = TextOptions(), estimator: EstimatorOptions = EstimatorOptions(),
          model: ModelOptions = ModelOptions(), timeout: float = 3600.0) -> dict[str, Any]:
    """Evaluate each newest checkpoint of a run once, until that of its last step (`train.steps`) is done.

    timeout: seconds without a new checkpoint after which the watch ends, 0 for never. estimator, model: no target, no
    step. A line of `watch.jsonl` holds the step, the figures of `eval` and, as "asked", the options: what stands there
    for the same options and config is not evaluated again. A checkpoint that is deleted while it is read is passed
    over, a damaged one with a warning, until it is saved anew; if it is the last one, the watch waits for that.

    Returns the last line, `ended` ("last step", "nothing new", or the name of the signal that came) and `watched`: all
    lines of these options. Raises UserError for a published checkpoint and wrong options, RunError if no checkpoint
    came in time.
    """
    if hf.is_published(workdir):
        raise UserError(f"{workdir} is a published checkpoint: --watch follows a run that trains")
    with Signals() as signals:
        follower = _RunFollower(Path(workdir), text, estimator, model, signals)
        ended = _follow(follower, timeout, signals)
    if not follower.lines and ended == NOTHING_NEW:
        raise RunError(f"no checkpoint came in {workdir} within {timeout:g} s: is anything training there?")
    return {**(follower.lines[-1] if follower.lines else {}), "workdir": workdir, "ended": ended,
            "watched": follower.lines}


def _options_record(text: TextOptions, estimator: EstimatorOptions, model: ModelOptions) -> dict[str, Any]:
    """The options as every version has written them; `batch_size` changes no figure."""
    return {"data": text.data, "split": text.split, "data_dir": text.data_dir, "chunks": text.context_mode,
            "stride": text.stride, "first_token": text.first_token, "end_token": text.end_token,
            "estimator": estimator.estimator, "draws": estimator.draws, "seed": estimator.seed,
            "weights": model.weights, "block_size": model.block_size}


def _follow(follower: "_RunFollower", timeout: float, signals: Signals) -> str:
    """Evaluate what comes; returns why it ended."""
    last_progress = time.monotonic()
    while not signals.received:
        step = follower.newest()
        if step is not None:
            try:
                follower.evaluate(step)
            except _Interrupted:
                break
            last_progress = time.monotonic()
        elif follower.finished():
            return LAST
        elif timeout and time.monotonic() - last_progress > timeout:
            return NOTHING_NEW
        else:
            signals.wait(POLL_S)
    return signal.Signals(signals.received[0]).name


class _RunFollower:
    """A run directory, which need not be there yet, and what is known of its checkpoints."""

    def __init__(self, workdir: Path, text: TextOptions, estimator: EstimatorOptions, model: ModelOptions,
                 signals: Signals):
        self._workdir, self._text_options, self._estimator, self._model = workdir, text, estimator, model
        self._signals, self._record = signals, _options_record(text, estimator, model)
        self._text: Text | None = None  # from when the run is there
        self._run: LoadedRun | None = None  # from the first checkpoint on
        self._started, self._sha256, self._done_steps, self.lines = False, "", set(), []
        self._damaged = set()  # as `_version`
        if not (workdir / rundir.CONFIG).exists():
            log.note(f"waiting for a run in {workdir}")

    def newest(self) -> int | None:
        """The newest checkpoint, if it is later than all that were evaluated and not one that was found damaged."""
        if not self._open_when_present():
            return None
        with Checkpoints(self._workdir, 1, read_only=True) as checkpoints:
            step = checkpoints.latest_step()
        if step is None or step <= max(self._done_steps, default=-1) or self._version(step) in self._damaged:
            return None
        return step

    def _version(self, step: int) -> tuple[int, int | None]:
        """The step and when its directory was written: another one when training saves it anew."""
        with contextlib.suppress(FileNotFoundError):
            return step, (self._workdir / "checkpoints" / str(step)).stat().st_mtime_ns
        return step, None

    def finished(self) -> bool:
        """Whether the last step that the run was told to do was evaluated."""
        return self._started and max(self._done_steps, default=-1) >= rundir.planned_steps(self._workdir)

    def evaluate(self, step: int) -> None:
        """Add a line for a checkpoint, unless it is gone or damaged."""
        version = self._version(step)
        try:
            params = self._read(step)
        except CheckpointNotFound:
            return
        except RunError as error:
            log.note(f"warning: {error}")
            self._damaged.add(version)
            return
        assert self._run is not None and self._text is not None
        measured = self._run.evaluator.measure(params, self._text.rows, self._estimator)
        result = self._text.describe(measured) | self._run.evaluator.autoregressive_summary(params, self._text.rows)
        line = {"step": step, **result, "config_sha256": self._sha256, "asked": self._record}
        log.append(self._workdir / FILE, line)
        self._done_steps.add(step)
        self.lines.append(line)
        nll, bits = (f"{format_number(result[key], '.4f')} ({format_interval(result[f'{key}_ci95'], '.4f')})"
                     for key in ("nll", "bits_per_byte"))
        log.note(f"step {step}: nll {nll}, {bits} bits per byte")

    def _open_when_present(self) -> bool:
        """Whether there is a run. When it is first there: refuse what does not fit, learn what was done before."""
        if not self._started and (self._workdir / rundir.CONFIG).exists():
            config, tokenizer = rundir.read(self._workdir)
            self._sha256, block_size = config.sha256(), self._model.block_size
            config = config.at_trained_block_size(block_size) if block_size else config
            estimators.make(self._estimator.estimator or default_estimator(config), config)
            self._text = self._text_options.open(config.data, config.block_size, tokenizer,
                                                 self._text_options.convention_for([config]))
            self.lines = [line for line in log.read_lines(self._workdir / FILE, _is_evaluation)
                          if line["asked"] == self._record and line["config_sha256"] == self._sha256]
            self._done_steps = {line["step"] for line in self.lines}
            self._started = True
        return self._started

    def _read(self, step: int) -> Any:
        """The weights of a step. The network and its programs are made once."""
        if self._run is not None:
            return restore(self._workdir, self._model.weights, None, self._run.evaluator.mesh, step).params
        run = open_run(str(self._workdir), dataclasses.replace(self._model, step=step))
        run.evaluator.alive = self._raise_if_signalled
        self._run = run._replace(params=None)  # one checkpoint's at a time
        return run.params

    def _raise_if_signalled(self) -> None:
        if self._signals.received:
            raise _Interrupted
