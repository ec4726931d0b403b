"""Writing files so that neither a kill, nor a full disk, nor a power cut leaves half of one."""

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

PART = ".tmp"  # the end of the name of a file that is being written


def temporary_name(path: str | os.PathLike) -> Path:
    """A name beside `path` that no other process, on this host or another, chooses as well."""
    path = Path(path)
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{PART}")


def write(path: str | os.PathLike, content: bytes) -> None:
    """Make `path` hold `content`, all of it or what it held before; it is on the disk when this returns.

    A file that holds `content` already is not written again. Raises OSError and leaves nothing behind.
    """
    path = Path(path)
    with contextlib.suppress(OSError):
        if path.is_file() and path.read_bytes() == content:
            return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file name; what the block wrote there takes the place of `path`, on the disk, if it did not raise."""
    path = Path(path)
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
