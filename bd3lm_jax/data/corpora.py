"""Text sources: a corpus is an iterator of documents for each of the splits train, valid and test.

A new source is one function `(data, split) -> Corpus` and one line in SOURCES.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path

from bd3lm_jax.config import DataConfig
from bd3lm_jax.data import mixture, text_files
from bd3lm_jax.data.detokenize import detokenize, rules_of
from bd3lm_jax.errors import UserError, lookup, nearest
from bd3lm_jax.foreign import open_regular
from bd3lm_jax.log import note_once
from bd3lm_jax.typed import check_characters, from_json

SPLITS = ("train", "valid", "test")
HASHED_BYTES = 1 << 28  # of a source file
WHOLE = "all"  # every document of local files, whatever their split
SPLIT_NAMES = {split: split for split in SPLITS} | {"validation": "valid", "val": "valid", "dev": "valid"}
NOVELS = ("SENSE AND SENSIBILITY", "PRIDE AND PREJUDICE", "MANSFIELD PARK", "EMMA", "NORTHANGER ABBEY")
AUSTEN_VALID_FRACTION = 0.05  # of each train novel: part of the definition of the corpus


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split of a source."""

    documents: Callable[[], Iterator[str]]  # a fresh pass over the documents
    fingerprint: Callable[[], str]  # changes whenever the documents could


def open_corpus(data: DataConfig, split: str) -> Corpus:
    """The split "train", "valid" or "test" of `data.source`, or "all" of local files. UserError if it is not there."""
    if split not in SPLITS and not (split == WHOLE and data.path):
        raise UserError(f"unknown split '{split}': {nearest(split, SPLITS)}")
    return lookup(SOURCES, data.source, "data.source")(data, split)


def load_documents(data: DataConfig, split: str) -> Iterator[str]:
    """Documents of a split, in a fixed order, without the newline at their end. UserError for unreadable input."""
    return open_corpus(data, split).documents()


def join_documents(documents: Iterable[str]) -> bytes:
    """UTF-8 text in which every document is followed by a newline: what bits per byte are counted over."""
    return b"".join(document.encode() + b"\n" for document in documents)


# ---- embedded corpus


def austen(data: DataConfig, split: str) -> Corpus:
    """Jane Austen. train: five novels; valid: the last 5 % of each of them; test: *Persuasion*."""
    del data
    packed = _resource("austen_persuasion.txt.xz" if split == "test" else "austen_train.txt.xz")

    def documents():
        lines = lzma.decompress(packed).decode().removesuffix("\n").split("\n")
        if split != "test":
            lines = _austen_part(lines, split)
        return iter([line for line in lines if line.strip()])

    return Corpus(documents, lambda: hashlib.sha256(packed).hexdigest() + split)


def _austen_part(lines: list[str], split: str) -> list[str]:
    """Whole paragraphs: valid are those that start in the last AUSTEN_VALID_FRACTION of the bytes of their novel."""
    starts = [lines.index(title) for title in NOVELS] + [len(lines)]
    part = []
    for start, stop in itertools.pairwise(starts):
        sizes = [len(line.encode()) + 1 for line in lines[start:stop]]
        offsets = itertools.accumulate(sizes, initial=0)
        limit = (1 - AUSTEN_VALID_FRACTION) * sum(sizes)
        part += [line for line, offset in zip(lines[start:stop], offsets) if (offset >= limit) == (split == "valid")]
    return part


def embedded(name: str) -> Corpus:
    """A packed .txt (one document a line) or .jsonl file (its "text") of the package, all of it."""
    packed = _resource(name)

    def documents():
        lines = (line for line in lzma.decompress(packed).decode().removesuffix("\n").split("\n") if line.strip())
        return (json.loads(line)["text"] for line in lines) if ".jsonl" in name else lines

    return Corpus(documents, lambda: hashlib.sha256(packed).hexdigest())


def _resource(name: str) -> bytes:
    return resources.files("bd3lm_jax.data").joinpath("resources", name).read_bytes()


# ---- local files


def text(data: DataConfig, split: str) -> Corpus:
    """A file or a directory of .txt files (also .xz, .gz, .bz2): one line is one document, blank lines are dropped.

    `data.name`: how the text was tokenised, which is undone (data/detokenize.py), e.g. "wikitext"; "": it was not.
    """
    rules_of(data.name or "plain")

    def read(path: Path) -> Iterator[str]:
        lines = (detokenize(line, data.name or "plain") for _, line in text_files.lines(path))
        return (line for line in lines if line.strip())

    return local_files(data, split, ".txt", read, key=f"text {data.name}" if data.name else "text")


def jsonl(data: DataConfig, split: str) -> Corpus:
    """A file or directory of .jsonl files (also .xz, .gz, .bz2): an object a line, its `data.field` is the document."""

    def read(path: Path) -> Iterator[str]:
        documents = (_json_field(path, number, record, data.field) for number, record in json_lines(path))
        return (document for document in documents if document.strip())

    return local_files(data, split, ".jsonl", read, key=f"jsonl {data.field}")


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


def _json_field(path: Path, number: int, record: dict, field: str) -> str:
    if field not in record:
        raise UserError(f"{path} line {number} has no field '{field}' (data.field): {nearest(field, record)}")
    if not isinstance(record[field], str):
        raise UserError(f"{path} line {number}: field '{field}' is {type(record[field]).__name__}, expected text")
    check_characters(record[field], f"{path} line {number}: field '{field}'")
    return record[field].rstrip("\r\n")


def local_files(data: DataConfig, split: str, suffix: str, read: Callable, key: str) -> Corpus:
    """A split of the files at `data.path`; read(path) yields documents, key says what they depend on beside files."""
    files = _split_files(Path(data.path), suffix)
    held_out = split in ("train", "valid") and not files["valid"]
    chosen = sum(files.values(), []) if split == WHOLE else files["train"] if held_out else files[split]
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


# ---- TensorFlow Datasets


def tfds(data: DataConfig, split: str) -> Corpus:
    """A TFDS data set as array_record (read without TensorFlow); `data.path` is its data_dir, "" = TFDS's own."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"data.source='tfds' needs tensorflow-datasets ({error}): pip install tensorflow-datasets "
                        "importlib_resources") from None
    try:
        builder = tensorflow_datasets.builder(data.name, data_dir=data.path or None, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises many kinds; all mean that the data set is not there
        raise UserError(f"TFDS data set '{data.name}' cannot be prepared: {_first_line(error)}") from None
    chosen = _tfds_split(builder, split, data)
    records = builder.as_data_source(split=chosen)

    def documents() -> Iterator[str]:
        texts = (_tfds_text(records[index], data) for index in range(len(records)))
        return (text for text in texts if text.strip())

    return Corpus(documents, lambda: f"{builder.info.full_name} {chosen} {len(records)} {data.field}")


def tfds_is_prepared(name: str) -> bool:
    """Whether a TFDS data set can be read at once, from TFDS's own data_dir ($TFDS_DATA_DIR)."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what is not there is no reason for a warning
    try:
        import tensorflow_datasets

        return tensorflow_datasets.builder(name, file_format="array_record").is_prepared()
    except Exception:  # TFDS raises many kinds, and may not be installed
        return False
    finally:
        logger.setLevel(level)


def _tfds_split(builder, split: str, data: DataConfig) -> str:
    """TFDS's name of a split; without a valid one the last `valid_fraction` of train stands in."""
    known = builder.info.splits
    named = next((name for name in known if SPLIT_NAMES.get(name) == split), None)
    has_valid = any(SPLIT_NAMES.get(name) == "valid" for name in known)
    if split == "test" or has_valid or "train" not in known:
        if named is None:
            raise UserError(f"TFDS data set '{data.name}' has no {split} split, it has {', '.join(known)}")
        return named
    total = known["train"].num_examples
    train = total - max(1, round(data.valid_fraction * total))
    return f"train[:{train}]" if split == "train" else f"train[{train}:]"


def _tfds_text(record: dict, data: DataConfig) -> str:
    if data.field not in record:
        raise UserError(f"TFDS data set '{data.name}' has no field '{data.field}' (data.field): "
                        f"{nearest(data.field, record)}")
    value = record[data.field]
    if not isinstance(value, (str, bytes)):
        raise UserError(f"field '{data.field}' of TFDS data set '{data.name}' is {type(value).__name__}, expected text")
    try:
        return (value.decode() if isinstance(value, bytes) else value).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"field '{data.field}' of TFDS data set '{data.name}' is not UTF-8: {error}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _code(name: str):
    def build(data: DataConfig, split: str) -> Corpus:
        from bd3lm_jax.data import code  # which needs Corpus

        return getattr(code, name)(data, split)
    return build


def _sft(data: DataConfig, split: str) -> Corpus:
    from bd3lm_jax.data import dialogues  # which needs Corpus

    return dialogues.sft(data, split)


def _mixture(data: DataConfig, split: str) -> Corpus:
    """The documents of all its sources, one source after another."""
    parts = [open_corpus(section, split) for section in mixture.sections(data).values()]
    return Corpus(lambda: itertools.chain.from_iterable(part.documents() for part in parts),
                  lambda: json.dumps([part.fingerprint() for part in parts]))


SOURCES = {"austen": austen, "text": text, "jsonl": jsonl, "sft": _sft, "tfds": tfds, mixture.SOURCE: _mixture,
           **{name: _code(name) for name in ("python_sources", "arithmetic", "python_arithmetic")}}
