"""Reading files that others made: regular files only, of bounded size, and none outside the directory they came in."""

import io
import os
import stat
from pathlib import Path

from bd3lm_jax.core.errors import UserError

MAX_SMALL_FILE = 1 << 28  # bytes: more than a config, a vocabulary or a template holds
MAX_TEXT_FILE = 1 << 32  # bytes: more than fits a text that is read at once
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
         stat.S_IFBLK: "a device"}


def open_regular(path: str | os.PathLike) -> io.BufferedReader:
    """A regular file, open for reading. OSError for anything else, which could make a reader wait or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(f"it is {KINDS.get(kind, 'something else')}, expected a regular file")
    return open(descriptor, "rb")


def read_bytes(path: str | os.PathLike, max_bytes: int = MAX_SMALL_FILE) -> bytes:
    """The content of a regular file. OSError for anything else, and for more than `max_bytes` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""
    if max(size, len(content)) > max_bytes:
        raise OSError(f"it holds more than {max_bytes:,} bytes")
    return content


def read_text(path: str | os.PathLike, max_bytes: int = MAX_SMALL_FILE) -> str:
    """The text of a regular file in UTF-8, with \\n for every end of a line. OSError, UnicodeDecodeError."""
    return io.TextIOWrapper(io.BytesIO(read_bytes(path, max_bytes)), encoding="utf-8").read()


def read_within(directory: str | os.PathLike, name: str) -> bytes:
    """The content of a file that came in a directory and is to be copied elsewhere.

    UserError if it cannot be read, or is a link to a file outside of the directory: a copy would give that away. The
    links of the Hub's cache, from a directory in snapshots/ to blobs/ beside it, are followed.
    """
    path, base = Path(directory) / name, Path(directory).resolve()
    roots = [base, *[base.parent.parent / "blobs"] * (base.parent.name == "snapshots")]
    try:
        resolved = path.resolve(strict=True)
        if not any(resolved.is_relative_to(root) for root in roots):
            raise OSError(f"it is a link to {resolved}, outside of the directory: put a copy of the file in its place")
        return read_bytes(resolved)
    except (OSError, RuntimeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise UserError(f"cannot copy {path}: {reason}") from None
