"""One writer at a time: lock files, which the system frees when the process that holds them ends, however it ends."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import note, note_once

WAIT_S = 2.0  # for a process that was killed a moment ago to be gone
POLL_S = 0.05
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without flock say
_held_paths: set[str] = set()  # lock files that this process holds by `hold_waiting`


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays there afterwards.

    Only the lock of the system counts; what stands in the file (pid, host, since when) tells people who holds it, so
    that neither a file that a dead process left nor a wrong clock is in the way. Where files cannot be locked a note
    says so. UserError if another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not acquire(descriptor, path, WAIT_S, f"see that no other run writes to {path.parent}"):
            raise UserError(
                f"{path.parent} is written by another run ({_describe_owner(path)}): wait for its end or stop it, "
                "or choose another --workdir")
        _write_owner(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hold_waiting(path: Path, work: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`, which goes afterwards, while others wait for it.

    Where files cannot be locked nobody waits: what is done meanwhile must bear company. A process does not wait for
    itself. work: what it is, for the note of those that wait. Yields whether it is held, which it always is with
    `wait`.
    """
    name = os.path.realpath(path)
    if name in _held_paths:
        yield True
        return
    descriptor = _acquire(path, work, wait)
    if descriptor is None:
        yield False
        return
    _held_paths.add(name)
    try:
        yield True
    finally:
        _held_paths.discard(name)
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is held: whoever has opened it sees that it is gone, and opens the next one
        os.close(descriptor)


def is_own_lock_file(path: Path) -> bool:
    """Whether what stands in a lock file was written here."""
    try:
        return {"pid", "host", "since"} == set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def is_held(path: Path) -> bool:
    """Whether another process holds the lock file `path`. Raises OSError if it cannot be opened."""
    descriptor = _open(path)
    try:
        return not acquire(descriptor, path, 0.0)
    finally:
        os.close(descriptor)


def _acquire(path: Path, work: str, wait: bool) -> int | None:
    """The open lock file that stands at `path` and is held now; None if another process holds it."""
    while True:
        descriptor = _open(path)
        try:
            is_free = acquire(descriptor, path, WAIT_S if wait else 0.0)
            if not is_free and not wait:
                os.close(descriptor)
                return None
            if not is_free:
                note(f"waits for {_describe_owner(path)}, which {work}")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    with contextlib.suppress(OSError):  # a full disk, or another user's file: it is held all the same
                        _write_owner(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int:
    """For writing, which network file systems ask of who locks, else for reading: it may be another user's."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not os.path.exists(path):
            raise
        return os.open(path, os.O_RDONLY)


def _write_owner(descriptor: int) -> None:
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def acquire(descriptor: int, path: Path | str, wait_s: float, advice: str = "", kind: int = fcntl.LOCK_EX) -> bool:
    """Whether nobody else holds the lock within so many seconds, or nobody can; it is held until every copy of the
    descriptor is closed. advice: what to see to where nobody can. kind: fcntl.LOCK_EX or LOCK_SH."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        except OSError as error:
            if error.errno not in LOCKS_UNSUPPORTED:
                raise
            if advice:
                note_once(f"{path} cannot be locked here ({error.strerror}): {advice}")
            return True


def _describe_owner(path: Path) -> str:
    """Who wrote the file, in words."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"pid {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} does not say which"
