"""What a text source gives; and local files as one: a split of what lies at `data.path`, objects of JSON lines."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bd3lm_jax.core import remote
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import note_once
from bd3lm_jax.core.schema import DataConfig
from bd3lm_jax.core.typed import from_json
from bd3lm_jax.core.untrusted_files import open_regular
from bd3lm_jax.data import text_files

SPLITS = ("train", "valid", "test")
HASHED_BYTES = 1 << 28  # of a source file
ALL_SPLITS = "all"  # every document of local files, whatever their split
SPLIT_NAMES = {split: split for split in SPLITS} | {"validation": "valid", "val": "valid", "dev": "valid"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split of a source."""

    documents: Callable[[], Iterator[str]]  # a fresh pass over the documents
    fingerprint: Callable[[], str]  # changes whenever the documents could


def local_files(data: DataConfig, split: str, suffix: str, read: Callable, key: str) -> Corpus:
    """A split of the files at `data.path`; read(path) yields documents, key says what they depend on beside files."""
    files = _split_files(remote.fetch(data.path), suffix)
    held_out = split in ("train", "valid") and not files["valid"]
    chosen = sum(files.values(), []) if split == ALL_SPLITS else files["train"] if held_out else files[split]
    if not chosen:
        raise UserError(f"{data.path} has no {split} split: give data.path a directory that holds a file named "
                        f"{split}{suffix}")

    def all_documents() -> Iterator[str]:
        return itertools.chain.from_iterable(map(read, chosen))

    def documents() -> Iterator[str]:
        return _held_out(all_documents, split, data) if held_out else all_documents()

    def fingerprint() -> str:
        hashes = [_sha256(path) for path in chosen]
        return json.dumps([key, hashes, [split, data.valid_fraction] if held_out else None])

    return Corpus(documents, fingerprint)


def _held_out(all_documents: Callable[[], Iterator[str]], split: str, data: DataConfig) -> Iterator[str]:
    """The last `valid_fraction` of the documents (at least one) is the valid split, the others are the train split."""
    total = sum(1 for _ in all_documents())
    if total < 2:
        raise UserError(f"{data.path} holds {total} documents, expected at least 2 (one a line): the last "
                        f"{data.valid_fraction:.1%}, at least one, is held out for validation")
    train = total - max(1, round(data.valid_fraction * total))
    return itertools.islice(all_documents(), *((0, train) if split == "train" else (train, total)))


def _split_files(path: Path, suffix: str) -> dict[str, list[Path]]:
    """Files of each split. In a directory, with all below it, a name with the word train, valid (val, dev) or test says
    which."""
    if not path.exists():
        raise UserError(f"data.path={str(path)!r} does not exist (looked for {path.absolute()})")
    if not path.is_dir():
        return {"train": [path], "valid": [], "test": []}
    chosen, others = text_files.find(path, suffix)
    if not chosen:
        holds = f": it holds {text_files.describe(path, others)}" if others else ""
        raise UserError(f"data.path={str(path)!r} is a directory without *{suffix} (or .xz, .gz, .bz2) files{holds}")
    if others:
        note_once(f"not read in {path}: {text_files.describe(path, others)}")
    found = {split: [] for split in SPLITS}
    for file in chosen:
        found[_split_of(file.relative_to(path))].append(file)
    return found


def _split_of(file: Path) -> str:
    """What its name says, else the folder that it is in."""
    for name in reversed(file.parts):
        for word in re.findall("[a-z]+", name.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return "train"


def _sha256(path: Path) -> str:
    """Of the file; of a very large one its start, size and date, so that no run waits for it."""
    try:
        with open_regular(path) as file:
            facts = os.fstat(file.fileno())
            if facts.st_size <= HASHED_BYTES:
                return hashlib.file_digest(file, "sha256").hexdigest()
            start = hashlib.sha256(file.read(HASHED_BYTES)).hexdigest()
            return f"{start} {facts.st_size} {facts.st_mtime_ns}"
    except OSError as error:
        raise text_files.unreadable(path, error) from None


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Line numbers and objects of a .jsonl file; UserError with the line for anything else."""
    for number, line in text_files.lines(path):
        if not line.strip():
            continue
        try:
            record = from_json(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number} is a JSON {type(record).__name__}, expected an object")
        yield number, record
