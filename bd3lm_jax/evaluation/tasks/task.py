"""What a task is: how its records become prompts, where a completion ends, and what makes it right."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bd3lm_jax.core import remote
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.typed import from_json
from bd3lm_jax.core.untrusted_files import MAX_TEXT_FILE, read_bytes
from bd3lm_jax.data import text_files


class Problem(NamedTuple):
    """id: "" for the number of its line. reference: a completion of the prompt that is right. answer: what completions
    are checked against."""

    id: str
    prompt: str
    reference: str
    answer: Any


class Verdict(NamedTuple):
    """outcome: in one or two words, to be counted; detail: what happened, or the answer that was read."""

    correct: bool
    outcome: str
    detail: str


@dataclass(frozen=True)
class Task:
    """stop: texts that end a completion. prompt_format, source: for the result and for error messages. fields: of a
    record of the task's file; problem: makes a Problem of a record, None where it is not part of the test set.

    Either `program` (source texts that run in order; right if none of them raises) or `judge` decides.
    """

    name: str
    metric: str
    stop: tuple[str, ...]
    prompt_format: str
    source: str
    fields: tuple[str, ...]
    problem: Callable[[dict], Problem | None]
    program: Callable[[Problem, str], list[str]] | None = None
    judge: Callable[[Problem, str], Verdict] | None = None
    packaged: Path | None = None

    @property
    def runs_code(self) -> bool:
        return self.program is not None


class ProblemFile(NamedTuple):
    """sha256: of the file as it is."""

    path: Path
    sha256: str
    problems: list[Problem]


def read_problems(task: Task, file: str) -> ProblemFile:
    """All problems of the test set in `file`, JSON lines (also .xz, .gz, .bz2) in the task's own format; "": packaged.

    Raises UserError for a file that is missing, damaged or of another format.
    """
    path = remote.fetch(file) if file else task.packaged
    if path is None:
        raise UserError(f"{task.name} is not packaged: give --file=FILE.jsonl, {task.source}")
    try:
        content = read_bytes(path, MAX_TEXT_FILE)
        lines = list(text_files.lines(path, MAX_TEXT_FILE))
    except (OSError, UserError) as error:
        raise UserError(f"cannot read problems of {task.name} in {path} ({error}): expected {task.source}") from None
    read = [_problem(task, path, number, line) for number, line in lines if line.strip()]
    problems = [problem for problem in read if problem is not None]
    if not problems:
        raise UserError(f"{path} holds no test problem of {task.name}: expected {task.source}")
    return ProblemFile(path, hashlib.sha256(content).hexdigest(), problems)


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop texts in it."""
    return text[:min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def _problem(task: Task, path: Path, number: int, line: str) -> Problem | None:
    try:
        record = from_json(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number} is not JSON ({error}): expected {task.source}") from None
    missing = [field for field in task.fields if not isinstance(record, dict) or field not in record]
    if missing:
        raise UserError(f"{path}:{number} lacks {', '.join(missing)}: expected {task.source}")
    try:
        problem = task.problem(record)
    except (AttributeError, IndexError, TypeError) as error:
        raise UserError(f"{path}:{number} holds something else ({error}): expected {task.source}") from None
    return problem and problem._replace(id=problem.id or f"{task.name}/{number}")
