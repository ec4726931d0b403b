"""Directories that are built beside their place, by one process at a time, and what killed processes leave of them.

`PATH.part-HOST-PID-RANDOM` is such a directory, `PATH.parts` holds what a build that goes on needs (data/parts.py),
`.NAME.lock` is held by who builds. Where files cannot be locked several may build the same: each has its own directory.
"""

import contextlib
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from bd3lm_jax.core import files, lock

IDLE_S = 24 * 3600.0  # without a change, after which what a process elsewhere was writing counts as abandoned


@contextlib.contextmanager
def directory(path: Path, work: str) -> Iterator[Path]:
    """An empty directory beside `path`, gone afterwards unless it was renamed; those of killed processes go before.

    Waits for another process that does the same; `work` says what that is. Raises OSError.
    """
    with lock.hold_waiting(lock_file(path), work):
        for leftover in abandoned_builds(path):
            shutil.rmtree(leftover, ignore_errors=True)
        build_path = path.with_name(f"{path.name}.part-{files.unique()}")
        build_path.mkdir()
        try:
            yield build_path
        finally:
            shutil.rmtree(build_path, ignore_errors=True)


def rename_into_place(build_path: Path, path: Path) -> None:
    """Give a directory of `directory` its name, on the disk with all that is in it. OSError if the name is taken."""
    files.sync_tree(build_path)
    build_path.rename(path)
    files.sync(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left beside `path`, which is done, unless somebody builds it anew."""
    leftovers = [*abandoned_builds(path), *([parts(path)] if parts(path).exists() else [])]
    if leftovers:
        with contextlib.suppress(OSError), lock.hold_waiting(lock_file(path), "", wait=False) as is_held:
            for leftover in leftovers if is_held else ():
                shutil.rmtree(leftover, ignore_errors=True)


def abandoned_builds(path: Path) -> list[Path]:
    """Directories in which nobody builds `path` any more."""
    candidates = [entry for entry in path.parent.iterdir() if entry.name.startswith(f"{path.name}.part-")]
    return [entry for entry in candidates if is_abandoned(entry)]


def is_abandoned(entry: Path, idle_s: float = IDLE_S) -> bool:
    """Whether the process that was writing a file or directory with a name of `files.unique` is gone.

    Of another host, or a name without process (earlier versions): whether nothing in it has changed for so long.
    """
    host, part = re.escape(socket.gethostname()), re.escape(files.TEMPORARY_SUFFIX)
    process = re.search(rf"[.-]{host}-(\d+)-[0-9a-f]+({part})?$", entry.name)
    return not files.is_alive(int(process[1])) if process else age_s(entry) > idle_s


def age_s(path: Path) -> float:
    """Seconds since the last change of a file, or of anything in a directory; 0 if it is gone."""
    newest = 0.0
    with contextlib.suppress(OSError):
        newest = path.lstat().st_mtime
    for entry in path.rglob("*") if path.is_dir() and not path.is_symlink() else ():
        with contextlib.suppress(OSError):
            newest = max(newest, entry.lstat().st_mtime)
    return max(0.0, time.time() - newest) if newest else 0.0


def lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def parts(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")
