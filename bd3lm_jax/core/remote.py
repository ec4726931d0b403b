"""Input files of other file systems (`gs://`, `s3://`, `https://`, `memory://`, ...), read as copies in the cache."""

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from bd3lm_jax.core import files, paths
from bd3lm_jax.core.errors import RunError, UserError, one_line

VERSION_KEYS = {  # what file systems call the state of a file
    "size", "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "Last-Modified", "LastModified",
    "last_modified", "updated", "mtime", "created"}


def check(path: str) -> None:
    """UserError for a path with a scheme that fsspec does not know, or whose package is not here."""
    scheme = paths.scheme_of(path)
    if not scheme:
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {scheme}:// cannot be read here ({one_line(error)}): install what is missing, or "
                        "give a local copy") from None


def fetch(path: str | os.PathLike) -> Path:
    """A file or directory to read: a local path as it is; of one with a scheme, which fsspec reads, a local copy.

    The copy is made once for each state of the original, as far as its file system tells states apart (size, date,
    hash). Raises UserError if it cannot be read, RunError if the disk is full.
    """
    path = os.fspath(path)
    if not paths.scheme_of(path):
        return Path(path)
    check(path)
    cache = paths.default_cache() / "remote"
    import fsspec

    try:
        system, root = fsspec.url_to_fs(path)
        return _copy(system, root, path, cache)
    except Exception as error:  # every file system has its own
        if isinstance(error, OSError) and error.errno in files.DISK_FULL_ERRNOS:
            raise RunError(f"cannot copy {path} to {cache}: {error.strerror}; free some space, or set $BD3LM_CACHE to "
                           "a directory that has it") from None
        raise UserError(f"cannot read {path}: {one_line(error) or type(error).__name__}") from None


def _copy(system: Any, root: str, url: str, cache: Path) -> Path:
    """The copy of a file, or of all files below a directory. Each is written whole or not at all."""
    info = system.info(root)
    found = {root: info} if info["type"] == "file" else system.find(root, detail=True)
    found = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
    relative = {name: PurePosixPath(name).relative_to(root) for name in found}
    if not found or any(".." in name.parts for name in relative.values()):
        raise FileNotFoundError("there is no file of that name, nor one below it")
    states = [(name, [(key, str(info[key])) for key in sorted(VERSION_KEYS & {*info})]) for name, info in found.items()]
    copy = cache / hashlib.sha256(repr((url, states)).encode()).hexdigest()[:16] / PurePosixPath(root).name
    for name in found:
        target = copy / relative[name]
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_replace(target) as temporary:
                system.get_file(name, str(temporary))
    return copy
