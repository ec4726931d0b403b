"""Files of text as people have them: packed or not, in folders, beside files that are none; read line by line.

A line ends with b"\\n" alone (and b"\\r\\n"): what `str.splitlines` takes for an end as well (U+2028, U+2029, U+0085)
stands inside records.
"""

import bz2
import codecs
import contextlib
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.untrusted_files import open_regular

OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
COMPRESSED = {b"\xfd7zXZ\x00": ".xz", b"\x1f\x8b": ".gz", b"BZh": ".bz2"}  # first bytes of what is read
UNSUPPORTED_FORMATS = {  # first bytes of what is not read: what it is, and how it becomes something that is
    b"PAR1": ("a Parquet file", "write its rows as JSON lines, e.g. with pyarrow.parquet.read_table(FILE).to_pylist()"),
    b"ARROW1": ("an Arrow file",
                "write its rows as JSON lines, e.g. with pyarrow.feather.read_table(FILE).to_pylist()"),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", "unpack it: zstd -d FILE"),
    b"PK\x03\x04": ("a zip archive", "unpack it: unzip FILE"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it: 7z x FILE"),
    codecs.BOM_UTF32_LE: ("UTF-32 text", "write it as UTF-8: iconv -f UTF-32 -t UTF-8 FILE"),
    codecs.BOM_UTF16_LE: ("UTF-16 text", "write it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE"),
    codecs.BOM_UTF16_BE: ("UTF-16 text", "write it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE"),
}
MAX_NAMED = 5  # files in a message
SYSTEM_FILES = ("__MACOSX", "lost+found", "Thumbs.db", "desktop.ini")  # beside names that begin with a dot


def lines(path: Path, max_bytes: int = 1 << 62) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without their end, of a file that may be packed.

    most: bytes that it may hold unpacked. Raises UserError that names the byte offset where it is not UTF-8, and for
    what is no text.
    """
    offset = number = 0
    try:
        with open_regular(path) as raw, opener(path)(raw) as file:
            if file is raw and os.fstat(raw.fileno()).st_size > max_bytes:
                raise UserError(f"{path} holds more than {max_bytes:,} bytes")
            while line := file.readline(max_bytes - offset + 1):
                if offset == 0:
                    check_head(path, line)
                if len(line) > max_bytes - offset:
                    raise UserError(f"{path} unpacks to more than {max_bytes:,} bytes")
                number += 1
                yield number, _decode(path, line, offset)
                offset += len(line)
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is a damaged {path.suffix} file: {error}") from None
    except OSError as error:
        if path.suffix.lower() == ".bz2" and error.errno is None:  # what bz2 says of other bytes
            raise UserError(f"{path} is a damaged {path.suffix} file: {error}") from None
        raise unreadable(path, error) from None


def opener(path: Path):
    """What unpacks an open file, which its name says, or else its first bytes."""
    with open_regular(path) as file:
        head = file.read(8)
    compression = next((suffix for start, suffix in COMPRESSED.items() if head.startswith(start)), "")
    return OPENERS.get(path.suffix.lower()) or OPENERS.get(compression, contextlib.nullcontext)


def check_head(path: Path, head: bytes) -> None:
    """UserError if a file begins as one of another kind, with how to make text of it."""
    for start, (what, remedy) in UNSUPPORTED_FORMATS.items():
        if head.startswith(start):
            raise UserError(f"{path} is {what}, which is not read here: {remedy}")


def _decode(path: Path, line: bytes, offset: int) -> str:
    try:
        return line.decode("utf-8-sig" if offset == 0 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        remedy = ("it holds zero bytes too and is no text: give a file of UTF-8 text" if b"\0" in line else
                  "convert it, e.g. iconv -f LATIN1 -t UTF-8")
        raise UserError(f"{path} is not UTF-8: byte 0x{line[error.start]:02x} at offset {offset + error.start}; "
                        f"{remedy}") from None


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path}: {error.strerror or error}")


def has_ending(path: Path, suffix: str) -> bool:
    """Whether a file is called *.suffix, also packed, in any case."""
    return path.name.lower().endswith(tuple(suffix + compression for compression in ("", *OPENERS)))


def find(directory: Path, suffix: str) -> tuple[list[Path], list[Path]]:
    """The files below a directory that `has_ending`, in the order of their paths, and the others.

    Names that begin with a dot, AppleDouble files among them, and those of operating systems are neither.
    """
    found, visited = [], set()
    for parent, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not _is_system_file(name)]
        where = os.path.realpath(parent)
        if where in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(where)
        found += [path for name in names if not _is_system_file(name) and (path := Path(parent, name)).is_file()]
    found.sort()
    chosen = [path for path in found if has_ending(path, suffix)]
    return chosen, [path for path in found if path not in set(chosen)]


def describe(directory: Path, files: list[Path]) -> str:
    """Some files of a directory in words, with what to do with those of a known other kind."""
    names = ", ".join(str(path.relative_to(directory)) for path in files[:MAX_NAMED])
    more = f" and {len(files) - MAX_NAMED} more" if len(files) > MAX_NAMED else ""
    remedy = next(filter(None, map(_remedy, files)), "")
    return names + more + f" ({remedy})" * bool(remedy)


def _remedy(path: Path) -> str:
    try:
        with open_regular(path) as file:
            check_head(path, file.read(8))
    except UserError as error:
        return str(error)
    except OSError:
        pass
    return ""


def _is_system_file(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FILES
