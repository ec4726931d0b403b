"""Sweeps: the runs of one config with some keys changed, a process each, and one table and plot of all of them.

A sweep directory holds a run directory for each point, logs/NAME.log with what its process said, status.json,
table.csv, table.md and sweep.png (sweep_table.py). Whether a run is finished is read from its own directory. Several
processes can share a sweep: none touches a run that another one trains.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.config import Config
from bd3lm_jax.core import migrations
from bd3lm_jax.core.checksummed import verify_checksum
from bd3lm_jax.core.errors import Preempted, RunError, UserError, WatchdogTimeout
from bd3lm_jax.core.log import note, note_once, pluralize, save
from bd3lm_jax.core.signals import Signals
from bd3lm_jax.core.typed import flatten
from bd3lm_jax.experiments.clusters.job import RETRY_EXIT_CODES
from bd3lm_jax.experiments.sweeps.early_stopping import StoppingRule, ValidationCurve, comparable_key
from bd3lm_jax.experiments.sweeps.pool import Job, exclusive, is_running, run_all
from bd3lm_jax.experiments.sweeps.sweep_table import BEST, FILES, MEASURES, Table
from bd3lm_jax.training import report

ARG = "arg"  # the key of a point that is no config key, but the argument of get_config
GIVEN_UP = "given up"
NAME_LENGTH = 120
LOGS, STATUS, PLOT = "logs", "status.json", "sweep.png"
RESERVED = (LOGS, STATUS, "status.tmp", PLOT, *FILES, ".", "..")  # by others than runs, in the directory of a sweep
WATCH_S = 5.0  # between looks at how far behind the runs are


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep. overrides: what names it and what the table shows; config: validated, with the overrides.

    command: trains the config; `--workdir=DIR` is added.
    """

    overrides: Mapping[str, Any]
    config: Config
    command: Sequence[str]


def sweep(points: Sequence[Point], workdir: str, *, parallel: int, index: int | None, dry_run: bool, retries: int,
          give_up: StoppingRule | None, baseline: int | str) -> dict[str, Any]:
    """Train all points that are not finished, or only number `index`, `parallel` at a time. dry_run: only list them.

    retries: how often a run is started again that was preempted, stuck or killed. give_up: which runs are stopped
    before their end, None for none. baseline: the run that the table compares the others with, a number or "best".

    Returns the result of the `sweep` command; `ok` says whether all that was asked for is finished (or given up, if
    that was asked for). A run that fails does not stop the others. Raises UserError for equal points, names that are
    equal or not free, an index or a baseline that does not exist, and a run directory of another config; RunError if
    `workdir` cannot be written; after SIGTERM or Ctrl-C, once the runs have saved and left, Preempted or
    KeyboardInterrupt.
    """
    _check_distinct(points)
    for name, number in (("index", index), ("baseline", baseline)):
        if isinstance(number, int) and not 0 <= number < len(points):
            raise UserError(f"{name} is {number}, the sweep has runs 0 to {len(points) - 1}")
    if isinstance(baseline, str) and baseline != BEST:
        raise UserError(f"baseline is '{baseline}', expected the number of a run or '{BEST}'")
    if parallel < 1:
        raise UserError(f"parallel is {parallel}, expected at least 1")
    if retries < 0:
        raise UserError(f"retries is {retries}, expected at least 0")
    scheduler = _Scheduler(Path(workdir), points, index, retries, give_up, baseline)
    if dry_run:
        scheduler.show_commands()
        return scheduler.result() | {"ok": True}
    with _disk_errors(workdir), Signals() as signals:
        scheduler.save()
        run_all(scheduler.next_job, parallel, signals, scheduler.changed, scheduler.watch)
        scheduler.save(plot=True)
    if signal.SIGINT in signals.received:
        raise KeyboardInterrupt
    if signals.received:
        raise Preempted(f"stopped by {signal.Signals(signals.received[0]).name}; what was trained is saved in "
                        f"{workdir}: run the same command again to go on")
    scheduler.show()
    return scheduler.result()


def run_name(overrides: Mapping[str, Any]) -> str:
    """`diffusion.block_size=4+optim.lr=0.0003`: the directory of a run, a function of its overrides alone.

    The words of `arg` stand for themselves: `algo=ar+seed=1`. What does not suit a file name becomes "-", and a hash
    tells such names apart.
    """
    parts = [(key, str(value)) for key, value in sorted(overrides.items())]
    words, same = [], True
    for key, text in parts:
        if key == ARG and re.fullmatch(r"[\w.=,-]+", text, flags=re.ASCII):
            words += text.split(",")
        else:
            plain = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
            words, same = [*words, f"{key}={plain}"], same and plain == text
    name = "+".join(words) or "base"
    if len(name) > NAME_LENGTH or not same:
        name = f"{name[:NAME_LENGTH]}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"
    return name


def _check_distinct(points: Sequence[Point]) -> None:
    """UserError for two runs of one config, two of one name, or a name that another file of the sweep has."""
    index_by_config, index_by_name = {}, {}
    for i, point in enumerate(points):
        name = run_name(point.overrides)
        first = index_by_config.setdefault(json.dumps(point.config.to_dict(), sort_keys=True), i)
        if first != i:
            raise UserError(f"runs {first} and {i} of the sweep are the same ({run_name(points[first].overrides)} and "
                            f"{name}): leave one out")
        first = index_by_name.setdefault(name, i)
        if first != i:
            raise UserError(f"runs {first} and {i} of the sweep have the same name '{name}', and would share a "
                            f"directory ({dict(points[first].overrides)} and {dict(point.overrides)}): name one more "
                            "key in one of them")
        if name in RESERVED:
            raise UserError(f"run {i} of the sweep has the name '{name}', which is not free in the directory of a "
                            f"sweep: name one more key beside {dict(point.overrides)}")


@contextlib.contextmanager
def _disk_errors(workdir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write in {workdir}: {error.strerror or error}; choose another --workdir, or free some "
                       "disk space") from None


class Run:
    """A point, its places and what it has reached.

    status: "waiting", "running", "stopped" (goes on when asked), "given up" (likewise), "failed", "finished". measured:
    what it found, if finished. hopeless: why it was told to stop.
    """

    def __init__(self, point: Point, directory: Path):
        first_name = run_name({migrations.first_name(key): value for key, value in point.overrides.items()})
        is_there = (directory / first_name).exists()  # begun by an earlier version
        self.point, self.name = point, first_name if is_there else run_name(point.overrides)
        self.workdir = directory / self.name
        log = directory / LOGS / f"{self.name}.log"
        self.job = Job(self.name, (*point.command, f"--workdir={self.workdir}"), log)
        self.status, self.error, self.measured = "waiting", None, {}
        self.retries, self.stop_reason, self.curve = 0, None, ValidationCurve(self.workdir)

    def refresh(self, recorded: Mapping[str, Any]) -> None:
        """Status from its directory and log, else the recorded one. UserError if the directory holds another config."""
        if (self.workdir / rundir.CONFIG).exists():
            self._check_config()
        summary = report.read(self.workdir)
        self.retries = max(self.retries, recorded.get("retries", 0))
        if summary and summary["step"] == self.point.config.train.steps:
            self.measured = {"step": summary["step"]} | {ours: summary.get("valid", {}).get(key)
                                                         for key, ours in MEASURES.items()}
            self.status, self.error = "finished", None
        elif is_running(self.job.log):
            self.status, self.error = "running", None
        elif recorded.get("status") == "running":
            self.status, self.error = "stopped", "its process is gone"
        elif recorded.get("status") in ("stopped", "failed", GIVEN_UP):
            self.status, self.error = recorded["status"], recorded["error"]
        else:  # also a finished run that is to take more steps, or whose directory was deleted
            self.status, self.error = "waiting", None

    def give_up(self, reason: str) -> None:
        """Not to be started, or told to stop: then `changed` comes."""
        self.stop_reason = reason
        if self.status == "running":
            note(f"{self.name}: told to stop: {reason}")
            self.job.signal(signal.SIGTERM)
        else:
            self.status, self.error = GIVEN_UP, reason
            note(f"{self.name}: {self.status}: {self.error}")

    def changed(self) -> None:
        """Status after its job changed."""
        if self.job.state == "running":
            self.status, self.error = "running", None
        elif self.job.state == "busy":
            self.status, self.error = "running", "another process trains it: run the same command again later"
        else:
            self.refresh({})
            if self.job.code != 0 or self.status != "finished":
                self.status, self.error = self._failure()

    def entry(self) -> dict[str, Any]:
        measured = dict.fromkeys(("step", *MEASURES.values())) | self.measured
        return {"name": self.name, "status": self.status, "overrides": dict(self.point.overrides), **measured,
                "workdir": str(self.workdir), "log": str(self.job.log), "error": self.error, "retries": self.retries}

    def may_retry(self) -> bool:
        """Whether its process left in a way that says nothing against starting it again."""
        code = self.job.code
        if code is None or self.job.state != "ended" or self.status == GIVEN_UP:
            return False
        return (128 - code if code < 0 else code) in RETRY_EXIT_CODES

    def values(self) -> dict[str, Any]:
        """All keys: what a point leaves out has the value of its config."""
        return flatten(self.point.config.to_dict()) | dict(self.point.overrides)

    def _failure(self) -> tuple[str, str]:
        code, last_line = self.job.code, self.job.last_error() or "it wrote nothing"
        if self.stop_reason:
            return GIVEN_UP, self.stop_reason
        if self.job.state == "stopped" or code in (Preempted.exit_code, WatchdogTimeout.exit_code):
            return "stopped", last_line
        if code is not None and code < 0:
            return "failed", f"killed by {signal.Signals(-code).name}: {last_line}"
        return "failed", last_line if code else f"exit code 0, but its directory holds no {report.REPORT}: {last_line}"

    def _check_config(self) -> None:
        existing, _ = rundir.read(self.workdir)
        vocab = self.point.config.model.vocab_size
        ours = self.point.config.with_vocab(vocab)
        if vocab == -1:  # the tokenizer's, known once training has started
            existing = existing.with_vocab(-1)
        differing = ours.differing_keys(existing)
        if differing:
            raise UserError(f"{self.workdir} holds a run of another config ({'; '.join(differing)}; here != there): "
                            "choose another --workdir, or repeat the config it was started with")


def _recorded(path: Path) -> dict[str, dict[str, Any]]:
    """By name, what an earlier call has left in status.json: {} if there is none, or a damaged one."""
    if not path.exists():
        return {}
    try:
        recorded = {entry["name"]: {"status": str(entry["status"]), "error": entry["error"],
                                    "retries": int(entry.get("retries", 0))}
                    for entry in verify_checksum(path.read_bytes())["runs"]}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        note_once(f"warning: {path} is damaged ({type(error).__name__}): what runs have reached is read from their "
                  "own directories")
        return {}
    return recorded


class _Scheduler:
    """All runs of a sweep; `chosen` are those to train here. Other processes may write in the same directory."""

    def __init__(self, directory: Path, points: Sequence[Point], index: int | None, retries: int,
                 rule: StoppingRule | None, baseline: int | str):
        self.directory, self.retries, self.rule, self.baseline = directory, retries, rule, baseline
        self.runs = [Run(point, directory) for point in points]
        self.chosen = self.runs if index is None else [self.runs[index]]
        self.keys = list(dict.fromkeys(key for point in points for key in point.overrides))
        self._queue, self._retried = collections.deque(self.chosen), collections.Counter()
        self._watched = 0.0
        self._refresh(self.runs)

    def next_job(self) -> Job | None:
        """Of the next run that is neither finished nor hopeless when its turn comes."""
        while self._queue:
            run = self._queue.popleft()
            run.refresh({})
            if run.status == "waiting" and (reason := self._stop_reason(run)):
                run.give_up(reason)
            if run.status not in ("finished", GIVEN_UP):
                return run.job
        return None

    def changed(self, job: Job) -> None:
        run = self._of(job)
        run.changed()
        nll = run.measured.get("valid_nll")
        summary = run.error or (f"see {job.log}" if nll is None else f"valid nll {nll:.4f}")
        if run.may_retry() and self._retried[job] < self.retries:
            self._retried[job] += 1
            run.retries += 1
            self._queue.appendleft(run)
            summary += f"; starting it again ({self._retried[job]} of {self.retries} retries)"
        note(f"{run.name}: {run.status}: {summary}")
        self.save()

    def watch(self, active: Sequence[Job]) -> None:
        """Stop the hopeless ones of the jobs that run."""
        if self.rule is None or time.monotonic() < self._watched + WATCH_S:
            return
        self._watched = time.monotonic()
        for run in map(self._of, active):
            if not run.stop_reason and (reason := self._stop_reason(run)):
                run.give_up(reason)

    def save(self, plot: bool = False) -> None:
        """Write status and table, with the latest state of what others train."""
        (self.directory / LOGS).mkdir(parents=True, exist_ok=True)
        with exclusive(self.directory / LOGS / ".lock"):
            self._refresh([run for run in self.runs if run not in self.chosen])
            finished_table = self._table()
            save(self.directory / STATUS, self._result(finished_table))
            finished_table.write(self.directory)
            if plot:
                finished_table.draw(self.directory / PLOT)

    def result(self) -> dict[str, Any]:
        return self._result(self._table())

    def _result(self, finished_table: Table) -> dict[str, Any]:
        return {"sweep": self.directory.name, "runs": finished_table.entries(),
                "ok": all(run.status in ("finished", GIVEN_UP) for run in self.chosen)}

    def show(self) -> None:
        """The table for people, and what went wrong."""
        self._table().show(f"{self.directory}: {pluralize(len(self.runs), 'run')}")
        for run in self.chosen:
            if run.error:
                note(f"{run.name}: {run.status}: {run.error}")

    def show_commands(self) -> None:
        for i, run in enumerate(self.runs):
            if run in self.chosen:
                note(f"{i}  {run.status:<8}  {' '.join(map(shlex.quote, run.job.command))}")

    def _table(self) -> Table:
        return Table(self.runs, self.keys, self.baseline)

    def _of(self, job: Job) -> Run:
        return next(run for run in self.chosen if run.job is job)

    def _stop_reason(self, run: Run) -> str | None:
        if self.rule is None:
            return None
        config = run.point.config
        others = {other.name: other.curve.read() for other in self.runs
                  if other is not run and comparable_key(other.point.config) == comparable_key(config)}
        return self.rule.verdict(config.train.steps, run.curve.read(), others)

    def _refresh(self, runs: Sequence[Run]) -> None:
        recorded = _recorded(self.directory / STATUS)
        for run in runs:
            run.refresh(recorded.get(run.name, {}))
