"""What a run tells: `metrics.jsonl`, progress and tables on stderr, the result on stdout."""

import contextlib
import functools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bd3lm_jax.core import checksummed, files
from bd3lm_jax.core.errors import CONTROL_CHARACTERS, RunError, escape_control_characters

METRICS_FILE = "metrics.jsonl"
METRIC_PREFIXES = ("train/", "valid/")  # what keys of metrics that are numbers begin with
PLAIN_SECONDS = 5.0  # between progress lines when stderr is not a terminal
UNLIMITED = 100_000  # columns, to measure how wide a table would be
BUSY_SECONDS = 15.0  # between the lines of `spinner` there

_console = Console(stderr=True, highlight=False)
_silent = False


def silence() -> None:
    """From now on this process, one of many, says neither notes nor results."""
    global _silent
    _silent = _console.quiet = True


def note(text: str) -> None:
    """One line for people, on stderr."""
    _console.print(escape_control_characters(text), markup=False, soft_wrap=True)


@functools.cache
def note_once(text: str) -> None:
    """As `note`, but nothing when this process has said the same before."""
    note(text)


@contextlib.contextmanager
def spinner(what: str) -> Iterator[None]:
    """Show that `what` goes on, and for how long, while the block runs: a live line on a terminal, else a line now and
    then."""
    if _console.is_terminal and not _console.is_dumb_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=_console, transient=True) as line:
            line.add_task(escape_control_characters(what), total=None)
            yield
        return
    start_s, done = time.monotonic(), threading.Event()

    def report_elapsed() -> None:
        while not done.wait(BUSY_SECONDS):
            with contextlib.suppress(OSError):
                note(f"{what}: {_duration(time.monotonic() - start_s)}")

    thread = threading.Thread(target=report_elapsed, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def pluralize(number: int, noun: str) -> str:
    """`1 draw`, `2 draws`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stderr: the first column to the left, the others to the right.

    Where it is wider than the terminal each row becomes lines of its own, `column value` under the row's first cell. A
    file or a pipe gets all of the table.
    """
    grid = Table(title=escape_control_characters(title), title_justify="left")
    for i, column in enumerate(columns):
        grid.add_column(escape_control_characters(column), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(escape_control_characters(str(cell)) for cell in row))
    width = _console.measure(grid, options=_console.options.update(width=UNLIMITED)).maximum
    if width <= _console.width:
        _console.print(grid, markup=False)
    elif not _console.is_terminal:
        _console.print(grid, markup=False, width=width, crop=False)
    else:
        _print_rows(title, columns, rows)


def _print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    note(title)
    name_width = max(map(len, columns))
    for first, *others in rows:
        note(f"{columns[0]} {first}".strip())
        for column, cell in zip(columns[1:], others):
            if str(cell):
                note(f"  {column:{name_width}}  {cell}")


def result(values: Mapping[str, Any]) -> None:
    """The result of a command: one JSON object, the last line of stdout. Numbers that are not finite become null.

    Where stdout is not UTF-8 (in an ASCII or Latin-1 locale), or a path holds what UTF-8 cannot say, JSON's own escapes
    are used: a finished result is never lost.
    """
    if _silent:
        return
    text, encoding = _to_json(values), getattr(sys.stdout, "encoding", None) or "utf-8"
    plain = encoding.lower().replace("-", "") == "utf8" and text.isprintable()
    print(text if plain else json.dumps(json.loads(text)), flush=True)


def save(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write a JSON file with a checksum (sealed.py), all of it or nothing. Numbers that are not finite become null.

    RunError if it cannot be written.
    """
    text = json.dumps(checksummed.add_checksum(_plain(values)), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with files.errors(path, "choose another directory"):
        files.write(path, text.encode())


def append(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Add a line with a checksum to a JSON-lines file, in one piece; it is on the disk when this returns.

    After a line that a kill cut off it begins a new one. Numbers that are not finite become null. RunError if it cannot
    be written.
    """
    with _full_disk(path), open(path, "a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        is_truncated = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * is_truncated + _line(values).encode())
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _full_disk(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; free some disk space and run the same command "
                       "again") from None


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """The logged lines of a run in order ([] if there are none), without damaged ones (see `read_lines`)."""
    return read_lines(Path(workdir) / METRICS_FILE, _is_logged)


def _is_logged(line: dict) -> bool:
    """Whether a line has a step and numbers."""
    return type(line.get("step")) is int and all(
        value is None or type(value) in (int, float) for key, value in line.items() if key.startswith(METRIC_PREFIXES))


def read_lines(path: str | os.PathLike, is_valid_line: Callable[[dict], bool] = lambda line: True) -> list[dict]:
    """The objects in a JSON-lines file, [] if it is not there.

    What a kill cut off is left out, and with a warning every other line that is no object, is not what was written (by
    its checksum), or that `is_valid_line` refuses.
    """
    try:
        *texts, last_text = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    lines, damaged = [], 0
    for text in filter(bytes.strip, [*texts, last_text]):
        try:
            line = checksummed.verify_checksum(text)
        except checksummed.ChecksumError:
            line = None
        if line is not None and is_valid_line(line):
            lines.append(line)
        else:
            damaged += text is not last_text
    if damaged:
        note_once(f"warning: {path} has {damaged} damaged line{'s' * (damaged > 1)}, left out")
    return lines


class RunLog:
    """The log of one run; a context manager. Only the first process writes, `quiet` silences stderr.

    `start_step`: updates done when this log begins. Lines of later steps, left by a run that was killed after its last
    checkpoint, are removed (all lines if it is 0), so that no step appears twice. listeners: called with every line, on
    the first process.
    """

    def __init__(self, workdir: str | os.PathLike, total_steps: int, quiet: bool = False, start_step: int = 0,
                 listeners: Sequence[Callable[[int, Mapping[str, Any]], object]] = ()):
        import jax

        self._listeners = listeners

        self._is_writer = jax.process_index() == 0
        self._quiet = quiet or not self._is_writer
        self._total_steps = total_steps
        self._path = Path(workdir) / METRICS_FILE
        self._file = None
        self._bar = None
        self._first = None  # (seconds, step) of the first plain call
        self._last_line = None  # seconds of the last plain line
        if self._is_writer:
            self._truncate_after(start_step)

    def __enter__(self) -> "RunLog":
        if self._is_writer:
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                if exception[0] is None:  # else that came first, and tells why
                    raise RunError(f"cannot write {self._path}: {error.strerror or error}; free some disk space and "
                                   "run the same command again") from None

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line for `step`. Call it once a step, and before that step is saved."""
        if self._file is None:
            return
        with _full_disk(self._path):
            self._file.write(_line({"step": step, **values}))
            self._file.flush()
        for listener in self._listeners:
            listener(step, values)

    def sync(self) -> None:
        """Wait until all lines are on the disk; call it before what they tell of is saved."""
        if self._file is not None:
            with _full_disk(self._path):
                os.fsync(self._file.fileno())

    def progress(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show that `step` updates are done: a live bar on a terminal, else a line every few seconds and at the end."""
        if self._quiet:
            return
        if _console.is_terminal and not _console.is_dumb_terminal:
            self._show_bar(step, loss, tokens_per_s)
        else:
            self._print_line(step, loss, tokens_per_s)

    def note(self, text: str) -> None:
        """One line for people, above the live bar."""
        if not self._quiet:
            note(text)

    def _show_bar(self, step: int, loss: float, tokens_per_s: float) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
                TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeRemainingColumn(), TextColumn("left"),
                console=_console)
            self._bar.add_task("train", total=self._total_steps, completed=step, loss=loss, rate=tokens_per_s)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, loss=loss, rate=tokens_per_s)

    def _print_line(self, step: int, loss: float, tokens_per_s: float) -> None:
        now = time.monotonic()
        self._first = self._first or (now, step)
        recent = self._last_line is not None and now - self._last_line < PLAIN_SECONDS
        if recent and step < self._total_steps:
            return
        self._last_line = now
        seconds, steps = now - self._first[0], step - self._first[1]
        left = f"  {_duration(seconds / steps * (self._total_steps - step))} left" if steps else ""
        note(f"step {step}/{self._total_steps}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s{left}")

    def _truncate_after(self, start_step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        remaining = [line for line in read_metrics(self._path.parent)
                     if line["step"] <= start_step] if start_step else []
        with _full_disk(self._path):
            files.write(self._path, "".join(map(_line, remaining)).encode())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _line(values: Mapping[str, Any]) -> str:
    return _to_json(checksummed.add_checksum(_plain(values))) + "\n"


def _to_json(values: Any) -> str:
    """On one line that a terminal can show and every reader of lines takes for one."""
    text = json.dumps(_plain(values), allow_nan=False, ensure_ascii=False)
    return CONTROL_CHARACTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    """Arrays and their scalars become numbers and lists, numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
