"""One writer at a time: a lock file that is held while a run trains, and freed by the system when its process ends."""

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

from bd3lm_jax.errors import UserError
from bd3lm_jax.log import note

WAIT_S = 2.0  # for a process that was killed a moment ago to be gone
POLL_S = 0.05
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without flock say


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays there afterwards.

    Only the lock of the system counts; what stands in the file (pid, host, since when) tells people who holds it, so
    that neither a file that a dead process left nor a wrong clock is in the way. Where files cannot be locked a note
    says so. UserError if another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(descriptor, path):
            raise UserError(f"{path.parent} is written by another run ({_holder(path)}): wait for its end or stop it, "
                            "or choose another --workdir")
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Whether nobody else holds the lock, or nobody can."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            note(f"{path} cannot be locked here ({error.strerror}): see that no other run writes to {path.parent}")
            return True


def _holder(path: Path) -> str:
    """Who wrote the file, in words."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"pid {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} does not say which"
