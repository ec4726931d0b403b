"""meta.json of a prepared split: what decided its content, what it holds, and how to tell that it is whole.

Keys: format, source, split, corpus (fingerprint of the text), tokenizer (its identity), layout, length, block_size and,
where there is one, density, which together decide the content; hash, of these; rows, tokens, documents, bytes; files,
for each its size and the SHA-256 of its first HASHED_BYTES (`sha256_whole` of all, if it is longer); versions, for
people; seal, a hash of everything else in it.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

from bd3lm_jax.core.errors import RunError

NAME = "meta.json"
CHECKSUM_KEY = "seal"
HASHED_BYTES = 1 << 30  # enough to see damage, and never a long wait at start-up


def write(directory: Path, identity: dict, counts: dict, names: list[str]) -> dict:
    """Write and return the manifest of a directory that holds the files of these names."""
    meta = identity | counts | {"hash": digest(identity), "files": {name: _entry(directory / name) for name in names},
                                "versions": _versions()}
    meta[CHECKSUM_KEY] = digest(meta)
    (directory / NAME).write_text(json.dumps(meta, indent=1))
    return meta


def read(directory: Path) -> dict:
    return json.loads((directory / NAME).read_text())


def damage(directory: Path, identity: dict) -> str | None:
    """What is wrong with a directory that should hold what `identity` decides, None if nothing; reads no more than
    HASHED_BYTES of a file."""
    try:
        meta = read(directory)
        wrong = [name for name, entry in meta["files"].items()
                 if _check(directory / name, HASHED_BYTES) != {key: entry[key] for key in ("size", "sha256")}]
        stored_checksum = meta.pop(CHECKSUM_KEY, None)  # earlier versions wrote none
        same = {key: meta.get(key) for key in identity} == json.loads(json.dumps(identity))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{NAME}: {error!r}"
    if not same or stored_checksum not in (None, digest(meta)):
        return f"{NAME} is not what was written"
    return f"{wrong[0]} does not match {NAME}" if wrong else None


def verify(directory: Path) -> None:
    """Read every file from end to end. RunError, naming the first that is not what was written."""
    for name, entry in read(directory)["files"].items():
        if _check(directory / name, None)["sha256"] != entry.get("sha256_whole", entry["sha256"]):
            raise RunError(f"{directory / name} is damaged: delete {directory} and prepare it again")


def digest(content: Any) -> str:
    """20 hexadecimal digits of a hash of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _entry(path: Path) -> dict:
    start = _check(path, HASHED_BYTES)
    return start | ({"sha256_whole": _check(path, None)["sha256"]} if start["size"] > HASHED_BYTES else {})


def _check(path: Path, limit: int | None) -> dict:
    """Size of a file, and hash of its first `limit` bytes."""
    size, hashed = path.stat().st_size, hashlib.sha256()
    remaining = size if limit is None else limit
    with open(path, "rb") as file:
        while remaining > 0 and (part := file.read(min(remaining, 1 << 20))):
            hashed.update(part)
            remaining -= len(part)
    return {"size": size, "sha256": hashed.hexdigest()}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("numpy", "tokenizers")
            if importlib.util.find_spec(name) is not None}
