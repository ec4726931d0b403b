"""Writing files so that neither a kill, nor a full disk, nor a power cut leaves half of one."""

import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

from bd3lm_jax.core.errors import RunError, UserError

TEMPORARY_SUFFIX = ".tmp"  # the end of the name of a file that is being written
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk without room says


def temporary_name(path: str | os.PathLike) -> Path:
    """A name beside `path` that no other process, on this host or another, chooses as well."""
    path = Path(path)
    return path.with_name(f".{path.name}.{unique()}{TEMPORARY_SUFFIX}")


def unique() -> str:
    """HOST-PID-RANDOM, which no other process, on this host or another, takes as well."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number on this host; one that has ended and waits for its parent is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    return True


def write(path: str | os.PathLike, content: bytes) -> None:
    """Make `path` hold `content`, all of it or what it held before; it is on the disk when this returns.

    A file that holds `content` already is not written again. Raises OSError and leaves nothing behind.
    """
    path = Path(path)
    with contextlib.suppress(OSError):
        if path.is_file() and path.read_bytes() == content:
            return
    with atomic_replace(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_replace(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file name; what the block wrote there takes the place of `path`, on the disk, if it did not raise.

    A link stays one, to a new file. What is no file, as /dev/stdout or a pipe, is written itself.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path = Path(os.path.realpath(path))
    temporary = temporary_name(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


@contextlib.contextmanager
def errors(path: str | os.PathLike, remedy: str, work_started: bool = True) -> Iterator[None]:
    """An OSError of the block as one line: what cannot be written, why, and how to go on.

    otherwise: how to choose another place, e.g. "choose another --out". Raises RunError; before work has begun
    UserError for a place that is wrong, while a full disk is a RunError at any time.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in DISK_FULL_ERRNOS
        kind = RunError if work_started or is_full else UserError
        raise kind(f"cannot write {path}: {error.strerror or error}; {'free some space, or ' * is_full}{remedy}"
                   ) from None


def sync(path: str | os.PathLike) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: str | os.PathLike) -> None:
    """`sync` of everything below a directory, the directory itself, and its name in its parent."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(os.path.join(parent, name))
        sync(parent)
    sync(Path(directory).parent)
