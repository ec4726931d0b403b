"""Compiled programs on disk: the second time a command runs it compiles nothing.

It is the persistent compilation cache of JAX in the project's cache directory, bounded. `--compile_cache=off`,
BD3LM_COMPILE_CACHE=off and JAX_ENABLE_COMPILATION_CACHE=0 turn it off; a directory of the user's own,
JAX_COMPILATION_CACHE_DIR, is left as it is. Where there is no directory to be had, programs are compiled as ever.
"""

import contextlib
import hashlib
import os
import platform
import stat
from pathlib import Path
from typing import Any

import jax

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.paths import default_cache

VARIABLE = "BD3LM_COMPILE_CACHE"
MAX_BYTES = 2 << 30  # the programs that were used least recently go
MIN_SECONDS = 0.1  # programs that compile faster are not kept
STAMP_BYTES = 8  # of the file beside each program that says when it was used
CPU_INFO_KEYS = ("vendor_id", "model name", "cpu family", "model", "stepping", "flags",  # x86
                 "CPU implementer", "CPU part", "CPU variant", "Features")  # Arm


def enable() -> None:
    """Use the cache from now on, unless the user turned it off, has one already, or there is no place for it."""
    config: Any = jax.config  # has its flags as attributes from the time of the import on
    if os.environ.get(VARIABLE, "on") == "off" or config.jax_compilation_cache_dir or \
            not config.jax_enable_compilation_cache:
        return
    try:
        path = directory()
        _make_private(path)
        _remove_partial_programs(path)
    except (OSError, ImportError, NotImplementedError, RuntimeError, UserError, ValueError):
        return  # a full or read-only disk, somebody else's directory, no locks
    config.update("jax_compilation_cache_dir", str(path))
    if config.jax_compilation_cache_max_size == -1:
        config.update("jax_compilation_cache_max_size", MAX_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def directory() -> Path:
    """In `paths.default_cache`, of this user and this kind of CPU. UserError where there is none.

    Programs hold machine code for the CPU that compiled them, and machines of several kinds may share a home.
    """
    return default_cache().absolute() / f"programs-{os.getuid()}-{platform.machine()}-{cpu()}"


def cpu(description: str = "/proc/cpuinfo") -> str:
    """A short hash of what this machine's CPU is and can do."""
    with contextlib.suppress(OSError):
        lines = Path(description).read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        words = [[word.strip() for word in line.split(":", 1)] for line in lines]
        return _short_hash([word for word in words if word[0] in CPU_INFO_KEYS])
    return _short_hash([platform.system(), platform.processor()])


def _short_hash(values: list) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _make_private(path: Path) -> None:
    """Make the directory; PermissionError unless it is this user's alone: who can write there can have code run."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022 or not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(path)


def _remove_partial_programs(path: Path) -> None:
    """Remove programs that a killed process wrote in part: their stamp, which is written last, is not whole. JAX never
    writes a program that is there again, and none at all where a stamp is missing."""
    import filelock

    lock = filelock.FileLock(path / ".lockfile")  # that of jax
    with contextlib.suppress(filelock.Timeout), lock.acquire(timeout=0):  # in use: another process has looked
        for program in path.glob("*-cache"):
            stamp = program.with_name(program.name.removesuffix("-cache") + "-atime")
            if not stamp.is_file() or stamp.stat().st_size != STAMP_BYTES or not program.stat().st_size:
                program.unlink(missing_ok=True)
                stamp.unlink(missing_ok=True)
