"""stdin, stdout and stderr that are closed or full: neither takes a run down, and no lost result counts as done."""

import contextlib
import errno
import os
import sys
from typing import TextIO

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what disks without room say


class BestEffortStream:
    """A text stream for people: what it cannot write is lost, from the first failure on without trying."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with discarding(self._stream):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with discarding(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def discarding(stream: TextIO):
    """Where the block cannot write to the stream, the stream goes to /dev/null: what it holds is not tried again."""
    try:
        yield
    except OSError:
        discard(stream)


def discard(stream: TextIO) -> None:
    """Let a stream that cannot be written go to /dev/null, also what its buffer holds."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_all() -> None:
    """Give closed descriptors 0 to 2 to /dev/null, before a file of a run gets one that libraries print to; and let
    what is said to people on stderr never fail."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    sys.stderr = BestEffortStream(sys.stderr or open(os.devnull, "w", encoding="utf-8"))


@contextlib.contextmanager
def result():
    """Around the printing of a result. RunError if it did not get out: nobody has it."""
    from bd3lm_jax.core.errors import RunError

    if sys.stdout is None:
        raise RunError(_write_error("it is closed"))
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        raise RunError(_write_error(error.strerror or error)) from None


def _write_error(why: object) -> str:
    return f"cannot write the result to stdout: {why}; what was to be done is done, the same command says it again"


def show(text: str) -> int:
    """Print a text for people on stdout; the exit code: 0 also where its reader wants no more of it (`| head`)."""
    try:
        print(text, flush=True)
    except OSError as error:
        discard(sys.stdout)
        if error.errno != errno.EPIPE:
            print(f"error: cannot write to stdout: {error.strerror or error}", file=sys.stderr)
            return 1
    return 0
