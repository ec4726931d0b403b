"""What nobody needs any more in the cache and in run directories: what killed processes have left, and damaged steps.

Prepared rows, tokenizers and checkpoints are never among it.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bd3lm_jax.checkpoints import checkpoint, rundir
from bd3lm_jax.core import files, lock, workspace

UNFINISHED = "parts of a build that was not finished (the same command would go on with them)"
WORK, TEMPORARY, LOCK = "directory of a killed process", "file of a killed process", "lock that nobody holds"
DAMAGED, TRASH, BARE = "damaged checkpoint, put aside", "deleted checkpoint", "empty run directory"
UNIQUE = r"[A-Za-z0-9._-]+-\d+-[0-9a-f]{8}"  # files.unique
WORK_NAME = re.compile(rf"(?P<of>.+)\.part-({UNIQUE}|[a-z0-9_]{{8}})")  # the latter of earlier versions
TEMPORARY_NAME = re.compile(rf"\..+\.{UNIQUE}{re.escape(files.TEMPORARY_SUFFIX)}|tokenizer-[0-9a-f]+\.\d+\.part")
ROWS_NAME = re.compile(r"(?P<of>[a-z_]+-[a-z]+-[0-9a-f]{20})\.parts")
SAVING_NAME = re.compile(r"\d+\.orbax-checkpoint-tmp.*")


class Leftover(NamedTuple):
    """num_bytes: of all files. age_s: since its last change. lock: the file that its writer holds, if there is one."""

    path: Path
    kind: str
    num_bytes: int
    age_s: float
    lock: Path | None


def find(directories: list[Path], idle_s: float) -> Iterator[Leftover]:
    """What is left below these directories, and beside each of them of its own name. Nothing that a living process of
    this host writes; of what others may be writing, and of unfinished builds, what has not changed for `idle_s`."""
    for directory in directories:
        yield from _matching([path for path in _entries(directory.parent) if path.name.startswith(directory.name)
                              and path != directory and WORK_NAME.fullmatch(path.name)], idle_s)
        yield from _below(directory, idle_s)


def remove(leftover: Leftover) -> bool:
    """Whether it is gone. What somebody has begun to write since it was found stays."""
    with contextlib.suppress(OSError), _acquire_if_free(leftover.lock) as is_free:
        if is_free:
            path = leftover.path
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return not os.path.lexists(leftover.path)


def _below(directory: Path, idle_s: float) -> Iterator[Leftover]:
    entries, run_lock = _entries(directory), directory / rundir.LOCK
    if _is_moved_run(directory, entries):
        if workspace.age_s(directory) > idle_s:
            yield from _unless_locked(directory, BARE, run_lock)
        return
    yield from _matching(entries, idle_s)
    checkpoints = directory / "checkpoints"
    for kind, paths in ((DAMAGED, _entries(checkpoints / checkpoint.DAMAGED)),
                        (TRASH, _entries(checkpoints / checkpoint.TRASH)),
                        (TRASH, [path for path in _entries(checkpoints) if SAVING_NAME.fullmatch(path.name)])):
        for path in paths:
            if kind == DAMAGED or workspace.age_s(path) > idle_s:  # a save is idle only where its process is gone
                yield from _unless_locked(path, kind, run_lock)
    for path in entries:
        if path != checkpoints and path.is_dir() and not path.is_symlink() and not WORK_NAME.fullmatch(path.name):
            yield from _below(path, idle_s)


def _matching(paths: list[Path], idle_s: float) -> Iterator[Leftover]:
    for path in paths:
        if (work := WORK_NAME.fullmatch(path.name)) and path.is_dir():
            if workspace.is_abandoned(path, idle_s):
                yield from _unless_locked(path, WORK, workspace.lock_file(path.with_name(work["of"])))
        elif (rows := ROWS_NAME.fullmatch(path.name)) and path.is_dir():
            if workspace.age_s(path) > idle_s or path.with_name(rows["of"]).exists():
                yield from _unless_locked(path, UNFINISHED, workspace.lock_file(path.with_name(rows["of"])))
        elif TEMPORARY_NAME.fullmatch(path.name) and path.is_file():
            if workspace.is_abandoned(path, idle_s):
                yield from _unless_locked(path, TEMPORARY, None)
        elif re.fullmatch(r"\..+\.lock", path.name) and path.is_file() and lock.is_own_lock_file(path):
            yield from _unless_locked(path, LOCK, path)


def _unless_locked(path: Path, kind: str, lock_path: Path | None) -> Iterator[Leftover]:
    """The leftover, unless its lock is held."""
    with contextlib.suppress(OSError):
        if lock_path is not None and lock_path.exists() and lock.is_held(lock_path):
            return
        yield Leftover(path, kind, _size(path), workspace.age_s(path), lock_path)


@contextlib.contextmanager
def _acquire_if_free(lock_path: Path | None) -> Iterator[bool]:
    """Hold the lock, if there is one and it is free."""
    if lock_path is None or not lock_path.parent.is_dir():
        yield True
    elif lock_path.name == rundir.LOCK:
        yield not (lock_path.exists() and lock.is_held(lock_path))
    else:
        with lock.hold_waiting(lock_path, "", wait=False) as is_held:
            yield is_held


def _is_moved_run(directory: Path, entries: list[Path]) -> bool:
    """Whether it holds what a run makes anew whose directory was moved, and nothing else."""
    contents = [path for path in entries if path.name != rundir.LOCK]
    return bool(contents) and directory / "checkpoints" in contents and all(map(rundir.is_empty_tree, contents))


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _size(path: Path) -> int:
    paths_below = [path] if path.is_file() else path.rglob("*")
    return sum(entry.lstat().st_size for entry in paths_below if entry.is_file())
