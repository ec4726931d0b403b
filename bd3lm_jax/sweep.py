"""Sweeps: the runs of one config with some keys changed, a process each, and one table and plot of all of them.

A sweep directory holds a run directory for each point, logs/NAME.log with what its process said, status.json,
table.csv, table.md and sweep.png. Whether a run is finished is read from its own directory. Several processes of a
machine can share a sweep: none touches a run that another one trains.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import re
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bd3lm_jax import plots, report, rundir
from bd3lm_jax.config import Config, flatten
from bd3lm_jax.errors import Preempted, RunError, UserError
from bd3lm_jax.log import note, save, table
from bd3lm_jax.pool import Job, Signals, exclusive, is_running, run_all

ARG = "arg"  # the key of a point that is no config key, but the argument of get_config
AGAIN = (42, 75)  # exit codes of a run that wants to be started again: preempted and saved, stuck
NAME_LENGTH = 120
MEASURES = {"nll": "valid_nll", "nll_ci95": "nll_ci95", "ppl": "valid_ppl", "bits_per_byte": "bits_per_byte"}
CAPTION = ("The validation split; 95 % intervals over its documents and the noise, not over training seeds. All runs "
           "are measured on the same documents: a difference of two is known better than their intervals say.")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep. overrides: what names it and what the table shows; config: validated, with the overrides.

    command: trains the config; `--workdir=DIR` is added.
    """

    overrides: Mapping[str, Any]
    config: Config
    command: Sequence[str]


def sweep(points: Sequence[Point], workdir: str, *, parallel: int, index: int | None, dry_run: bool) -> dict[str, Any]:
    """Train all points that are not finished, or only number `index`, `parallel` at a time. dry_run: only list them.

    Returns the result of the `sweep` command; `ok` says whether all that was asked for is finished. A run that fails
    does not stop the others. Raises UserError for equal points, an index that does not exist, and a run directory of
    another config; RunError if `workdir` cannot be written; after SIGTERM or Ctrl-C, once the runs have saved and left,
    Preempted or KeyboardInterrupt.
    """
    _check_distinct(points)
    if index is not None and not 0 <= index < len(points):
        raise UserError(f"index is {index}, the sweep has runs 0 to {len(points) - 1}")
    if parallel < 1:
        raise UserError(f"parallel is {parallel}, expected at least 1")
    board = _Board(Path(workdir), points, index)
    if dry_run:
        board.show_commands()
        return board.result() | {"ok": True}
    with _disk_errors(workdir), Signals() as signals:
        board.save()
        run_all(board.jobs(), parallel, signals, board.changed)
        board.save(plot=True)
    if signal.SIGINT in signals.received:
        raise KeyboardInterrupt
    if signals.received:
        raise Preempted(f"stopped by {signal.Signals(signals.received[0]).name}; what was trained is saved in "
                        f"{workdir}: run the same command again to go on")
    board.show()
    return board.result()


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
    seen = {}
    for i, point in enumerate(points):
        first = seen.setdefault(json.dumps(point.config.to_dict(), sort_keys=True), i)
        if first != i:
            raise UserError(f"runs {first} and {i} of the sweep are the same ({run_name(points[first].overrides)} and "
                            f"{run_name(point.overrides)}): leave one out")


@contextlib.contextmanager
def _disk_errors(workdir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write in {workdir}: {error.strerror or error}; choose another --workdir, or free some "
                       "disk space") from None


class _Run:
    """A point, its places and what it has reached: waiting, running, stopped (goes on when asked), failed, finished."""

    def __init__(self, point: Point, directory: Path):
        self.point, self.name = point, run_name(point.overrides)
        self.workdir = directory / self.name
        log = directory / "logs" / f"{self.name}.log"
        self.job = Job(self.name, (*point.command, f"--workdir={self.workdir}"), log)
        self.status, self.error, self.measured = "waiting", None, {}

    def look(self, recorded: Mapping[str, Any]) -> None:
        """Status from its directory and log, else the recorded one. UserError if the directory holds another config."""
        if (self.workdir / rundir.CONFIG).exists():
            self._check_config()
        told = report.read(self.workdir)
        if told and told["step"] == self.point.config.train.steps:
            self.measured = {"step": told["step"]} | {ours: told.get("valid", {}).get(key)
                                                         for key, ours in MEASURES.items()}
            self.status, self.error = "finished", None
        elif is_running(self.job.log):
            self.status, self.error = "running", None
        elif recorded.get("status") == "running":
            self.status, self.error = "stopped", "its process is gone"
        elif recorded.get("status") in ("stopped", "failed"):
            self.status, self.error = recorded["status"], recorded["error"]
        else:  # also a finished run that is to take more steps, or whose directory was deleted
            self.status, self.error = "waiting", None

    def changed(self) -> None:
        """Status after its job changed."""
        if self.job.state == "running":
            self.status, self.error = "running", None
        elif self.job.state == "busy":
            self.status, self.error = "running", "another process trains it: run the same command again later"
        else:
            self.look({})
            if self.job.code != 0 or self.status != "finished":
                self.status, self.error = self._failure()

    def entry(self) -> dict[str, Any]:
        measured = dict.fromkeys(("step", *MEASURES.values())) | self.measured
        return {"name": self.name, "status": self.status, "overrides": dict(self.point.overrides), **measured,
                "workdir": str(self.workdir), "log": str(self.job.log), "error": self.error}

    def values(self) -> dict[str, Any]:
        """All keys: what a point leaves out has the value of its config."""
        return flatten(self.point.config.to_dict()) | dict(self.point.overrides)

    def _failure(self) -> tuple[str, str]:
        code, said = self.job.code, self.job.last_words() or "it wrote nothing"
        if self.job.state == "stopped" or code in AGAIN:
            return "stopped", said
        if code < 0:
            return "failed", f"killed by {signal.Signals(-code).name}: {said}"
        return "failed", said if code else f"exit code 0, but its directory holds no {report.REPORT}: {said}"

    def _check_config(self) -> None:
        there, _ = rundir.read(self.workdir)
        vocab = self.point.config.model.vocab_size
        ours = self.point.config.with_vocab(vocab)
        if vocab == -1:  # the tokenizer's, known once training has started
            there = there.with_vocab(-1)
        differing = ours.differing_keys(there)
        if differing:
            raise UserError(f"{self.workdir} holds a run of another config ({'; '.join(differing)}; here != there): "
                            "choose another --workdir, or repeat the config it was started with")


class _Board:
    """All runs of a sweep; `chosen` are those to train here. Other processes may write in the same directory."""

    def __init__(self, directory: Path, points: Sequence[Point], index: int | None):
        self.directory = directory
        self.runs = [_Run(point, directory) for point in points]
        self.chosen = self.runs if index is None else [self.runs[index]]
        self.keys = list(dict.fromkeys(key for point in points for key in point.overrides))
        self._look(self.runs)

    def jobs(self) -> Iterator[Job]:
        """What is not finished when its turn comes."""
        for run in self.chosen:
            run.look({})
            if run.status != "finished":
                yield run.job

    def changed(self, job: Job) -> None:
        run = next(run for run in self.chosen if run.job is job)
        run.changed()
        nll = run.measured.get("valid_nll")
        told = run.error or (f"see {job.log}" if nll is None else f"valid nll {nll:.4f}")
        note(f"{run.name}: {run.status}: {told}")
        self.save()

    def save(self, plot: bool = False) -> None:
        """Write status and table, with the latest state of what others train."""
        (self.directory / "logs").mkdir(parents=True, exist_ok=True)
        with exclusive(self.directory / "logs" / ".lock"):
            self._look([run for run in self.runs if run not in self.chosen])
            save(self.directory / "status.json", self.result())
            self._write_tables()
            finished = [run for run in self.runs
                        if run.status == "finished" and run.measured["valid_nll"] is not None]
            if plot and finished:
                plots.nll_intervals(self.directory / "sweep.png", *_curves(finished, self.keys))

    def result(self) -> dict[str, Any]:
        return {"sweep": self.directory.name, "runs": [run.entry() for run in self.runs],
                "ok": all(run.status == "finished" for run in self.chosen)}

    def show(self) -> None:
        """The table for people, and what went wrong."""
        heading, *rows = self._table()
        table(f"{self.directory}: {len(self.runs)} runs", heading, rows)
        note(CAPTION)
        for run in self.chosen:
            if run.error:
                note(f"{run.name}: {run.status}: {run.error}")

    def show_commands(self) -> None:
        for i, run in enumerate(self.runs):
            if run in self.chosen:
                note(f"{i}  {run.status:<8}  {' '.join(map(shlex.quote, run.job.command))}")

    def _look(self, runs: Sequence[_Run]) -> None:
        path, recorded = self.directory / "status.json", {}
        if path.exists():
            recorded = {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["runs"]}
        for run in runs:
            run.look(recorded.get(run.name, {}))

    def _table(self) -> list[list[str]]:
        """For people: a heading and a row a run."""
        leaves = [key.rpartition(".")[2] for key in self.keys]
        headings = leaves if len(set(leaves)) == len(leaves) else self.keys
        lines = [["run", *headings, "nats/token", "95 % interval", "perplexity", "bits/byte", "status"]]
        for i, run in enumerate(self.runs):
            values, measured = run.values(), [""] * 4
            if run.measured.get("valid_nll") is not None:
                nll, (low, high), ppl, bits = (run.measured[key] for key in MEASURES.values())
                interval = "" if low is None else f"{low:.4f} .. {high:.4f}"
                measured = [f"{nll:.4f}", interval, f"{ppl:.2f}", f"{bits:.4f}"]
            lines.append([str(i), *(str(values.get(key, "")) for key in self.keys), *measured, run.status])
        return lines

    def _write_tables(self) -> None:
        heading, *rows = self._table()
        lines = [heading, ["---"] * len(heading), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        (self.directory / "table.md").write_text(f"{text}\n\n{CAPTION}\n", encoding="utf-8")
        with open(self.directory / "table.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            told = ("valid_nll", "valid_ppl", "bits_per_byte", "step", "status")
            writer.writerow(["run", "name", *self.keys, *told, "low", "high"])
            for i, run in enumerate(self.runs):
                values, entry = run.values(), run.entry()
                writer.writerow([i, run.name, *(values.get(key) for key in self.keys), *(entry[key] for key in told),
                                 *(entry["nll_ci95"] or ())])


def _curves(runs: Sequence[_Run], keys: Sequence[str]) -> tuple[str, dict[str, list[tuple]]]:
    """Label of the horizontal axis and `{curve: [(x, nll, low, high), ...]}`.

    x is the swept number with the most values, and a curve has the same other values; without numbers x is the name.
    """
    values = [run.values() for run in runs]
    distinct = {key: len({str(value.get(key)) for value in values}) for key in keys}
    numbers = [key for key in keys if all(type(value.get(key)) in (int, float) for value in values)]
    x_key = max(numbers, key=distinct.get, default=None)
    others = [key for key in keys if x_key and key != x_key and distinct[key] > 1]
    result = {}
    for run, value in zip(runs, values):
        nll = run.measured["valid_nll"]
        low, high = (nll if end is None else end for end in run.measured["nll_ci95"])
        label = ", ".join(f"{key}={value.get(key)}" for key in others)
        result.setdefault(label, []).append((value[x_key] if x_key else run.name, nll, low, high))
    return x_key or "", {label: sorted(points) for label, points in result.items()}
