"""Paths as people write them: `~` is a home directory, `gs://` is no directory, and a comma may belong to a name."""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bd3lm_jax.core.errors import UserError

SCHEME = re.compile("([A-Za-z][A-Za-z0-9+.-]*)://")
LOCAL_SCHEMES = ("file", "local", "asynclocal")


def local(path: str | os.PathLike, name: str = "path", may_be_remote: bool = False) -> str:
    """`path` with `~` and `~user` expanded; "" stays "".

    name: of the flag or config key, for the error. may_be_remote: it names what is only read, so that it may have a
    scheme (`gs://bucket/text.txt`), and `remote.fetch` opens it. Raises UserError for a scheme elsewhere, which would
    become a directory called `gs:`, and for a home directory that is not known.
    """
    path = os.fspath(path)
    scheme = scheme_of(path)
    if scheme and (not may_be_remote or scheme in LOCAL_SCHEMES):
        raise UserError(f"{name}={path}: {scheme}:// is no local path, and only local files are read and written here: "
                        "copy it here, or mount it (e.g. gcsfuse, s3fs) and give the directory")
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path and not os.path.lexists(path):
        raise UserError(f"{name}={path}: the home directory of '{path.partition('/')[0]}' is not known: set HOME, or "
                        "give the whole path")
    return expanded


def scheme_of(path: str) -> str:
    """The `gs` of `gs://bucket/file`; "" of a local path."""
    scheme = SCHEME.match(path)
    return scheme[1] if scheme and not os.path.lexists(path) else ""


def expand_fields(section: Any, prefix: str, names: Sequence[str], may_be_remote: bool = False) -> None:
    """`local` of these fields of a frozen dataclass, whose keys in a config begin with `prefix`."""
    for name in names:
        object.__setattr__(section, name, local(getattr(section, name), prefix + name, may_be_remote))


def split(text: str, name: str = "path", may_be_remote: bool = False) -> list[str]:
    """The paths of a list with commas between them, each as `local`; a name with commas in it that is there is one."""
    words, expanded = text.split(","), []
    while words:
        candidates = (local(",".join(words[:n]), name, may_be_remote) for n in range(len(words), 1, -1))
        number = next((len(words) - i for i, path in enumerate(candidates) if os.path.lexists(path)), 1)
        expanded.append(local(",".join(words[:number]), name, may_be_remote))
        words = words[number:]
    return [path for path in expanded if path]


def default_cache() -> Path:
    """$BD3LM_CACHE, else ~/.cache/bd3lm_jax; where there is no home that can be written, a private directory of the
    user among the temporary files."""
    chosen = os.environ.get("BD3LM_CACHE")
    if chosen:
        return Path(local(chosen, "BD3LM_CACHE"))
    path = Path(os.path.expanduser("~/.cache/bd3lm_jax"))
    try:
        if not path.is_absolute() or os.environ.get("HOME") == "":
            raise FileNotFoundError(path)
        path.mkdir(parents=True, exist_ok=True)
        return path
    except OSError:
        return _temporary_cache()


def _temporary_cache() -> Path:
    """Nobody else may have made it, or may look into it."""
    path = Path(tempfile.gettempdir()) / f"bd3lm_jax-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    expanded = path.lstat()
    if path.is_symlink() or expanded.st_uid != os.getuid() or expanded.st_mode & 0o077:
        raise UserError(f"{path} is not a private directory of yours: set $BD3LM_CACHE to a directory that can be "
                        "written")
    return path
