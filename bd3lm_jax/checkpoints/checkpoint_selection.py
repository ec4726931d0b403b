"""Which checkpoint is read: a step by its number, the best or the newest one, beside a run that deletes old steps."""

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bd3lm_jax.core.errors import RunError, UserError, command_line
from bd3lm_jax.parallel import distributed

LATEST, BEST = "latest", "best"  # names of steps
MAX_RETRIES = 20  # for a step that is not deleted while it is read
# what reads in flight say after one has failed
LATE_READ_ERRORS = ("Event loop is closed", "Encountered error while reading")

T = TypeVar("T")


class DamagedCheckpoint(Exception):
    """A step whose files are there but do not hold what was saved."""


class CheckpointNotFound(UserError):
    """A step that was asked for and is not there."""


class _StepDeleted(Exception):
    """A step that went away while it was read."""


class StepSelector:
    """Chooses among the steps in `directory` (`checkpoints` of a run). All processes of a run call it together.

    list_steps: those that are there now, ascending. best_step: that of the lowest bound, None if none has one. warn:
    gets one line for every damaged step that is passed over.
    """

    def __init__(self, directory: Path, list_steps: Callable[[], list[int]], best_step: Callable[[], int | None],
                 warn: Callable[[str], None]):
        self._directory, self._list_steps, self._best_step, self._warn = directory, list_steps, best_step, warn

    def read(self, which: int | str, read: Callable[[int], T]) -> tuple[T, int, list[int]]:
        """`read(step)` of the step that was asked for, that step, and the damaged ones that were passed over.

        The latest and the best are chosen anew when they were deleted while they were read. Raises Absent if there is
        no such step (any more), RunError if it is damaged.
        """
        for _ in range(MAX_RETRIES):
            steps = self._steps()
            if not steps:
                raise CheckpointNotFound(
                    f"no checkpoint in {self._directory}: train first "
                    f"({command_line('train')} --workdir={self._directory.parent}) or pass another --workdir")
            try:
                return self._read_newest(steps, read) if which == LATEST else (*self._read_named(which, steps, read),
                                                                               [])
            except _StepDeleted as error:
                step = error.args[0]
        raise CheckpointNotFound(
            f"{MAX_RETRIES} times a step in {self._directory} was deleted while it was read, the last time {step}: "
            "run the same command again, or train with a larger checkpoint.every or checkpoint.keep")

    def _read_named(self, which: int | str, steps: list[int], read: Callable[[int], T]) -> tuple[T, int]:
        step = distributed.broadcast_from_process0(self._best_step()) if which == BEST else which
        available = _list_steps_text(steps)
        if step is None:
            raise CheckpointNotFound(
                f"no checkpoint in {self._directory} was validated, so that none is the best: {available}; give "
                "one of these as --step, or latest")
        if step not in steps:
            raise CheckpointNotFound(
                f"no step {step} in {self._directory}: {available}; give one of these as --step, or {LATEST} or "
                f"{BEST}")
        try:
            return read(step), step
        except UserError:
            raise
        except Exception as error:
            distributed.raise_if_lost_peer(error)
            _quiet_late_reads()
            if not self._is_deleted(step):
                raise RunError(f"checkpoint {self._directory / str(step)} is damaged ({cause_of(error)}): {available}; "
                               f"give another --step, or {LATEST} for the newest that can be read") from error
        if which == BEST:
            raise _StepDeleted(step)
        raise CheckpointNotFound(
            f"step {step} in {self._directory} was deleted while it was read, as training deletes old steps: "
            f"{_list_steps_text(self._steps())}; give one of these as --step, or {LATEST}")

    def _read_newest(self, steps: list[int], read: Callable[[int], T]) -> tuple[T, int, list[int]]:
        damaged = []
        for step in reversed(steps):
            try:
                return read(step), step, damaged
            except UserError:
                raise
            except Exception as error:  # orbax and its storage raise many kinds; all of them mean: not readable
                distributed.raise_if_lost_peer(error)
                _quiet_late_reads()
                if self._is_deleted(step):
                    raise _StepDeleted(step) from None
                damaged.append(step)
                cause = cause_of(error)
                self._warn(f"warning: checkpoint {self._directory / str(step)} is damaged ({cause}); "
                           f"trying the one before it")
        raise RunError(f"none of the checkpoints {steps} in {self._directory} can be read (the oldest: {cause}): "
                       f"restore the directory from a copy, or train again in another --workdir")

    def _steps(self) -> list[int]:
        return distributed.broadcast_from_process0(self._list_steps())

    def _is_deleted(self, step: int) -> bool:
        return step not in self._steps()


def _list_steps_text(steps: list[int]) -> str:
    return f"there are {', '.join(map(str, steps))}" if steps else "there is none"


@functools.cache
def _quiet_late_reads() -> None:
    """From now on: what a failed read has left in flight would print a traceback for each array when it ends."""
    report = sys.unraisablehook

    def report_others(unraisable) -> None:
        if not str(unraisable.exc_value).startswith(LATE_READ_ERRORS):
            report(unraisable)

    sys.unraisablehook = report_others


def cause_of(error: BaseException) -> str:
    """What went wrong first, in one short line: storage errors put it behind the quoted names of all layers."""
    while error.__cause__ is not None:
        error = error.__cause__
    first_line = f"{error}\n".splitlines()[0]
    text = re.sub(r" \[\w+=.*", "", first_line).rsplit('": ', 1)[-1][:200]
    return text if isinstance(error, DamagedCheckpoint) else f"{type(error).__name__}: {text}"
