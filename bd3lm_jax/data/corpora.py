"""Text sources: a corpus is an iterator of documents for each of the splits train, valid and test.

A new source is one function `(data, split) -> Corpus` and one line in SOURCES.
"""

import hashlib
import itertools
import json
import logging
import lzma
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from bd3lm_jax.core.errors import UserError, lookup, nearest
from bd3lm_jax.core.schema import DataConfig
from bd3lm_jax.core.typed import check_characters, one_of
from bd3lm_jax.data import code, density, dialogues, mixture, text_files
from bd3lm_jax.data.corpus import ALL_SPLITS, SPLIT_NAMES, SPLITS, Corpus, json_lines, local_files
from bd3lm_jax.data.detokenize import detokenize, rules_of

NOVELS = ("SENSE AND SENSIBILITY", "PRIDE AND PREJUDICE", "MANSFIELD PARK", "EMMA", "NORTHANGER ABBEY")
AUSTEN_VALID_FRACTION = 0.05  # of each train novel: part of the definition of the corpus


def open_corpus(data: DataConfig, split: str) -> Corpus:
    """The split "train", "valid" or "test" of `data.source`, or "all" of local files. UserError if it is not there."""
    if split not in SPLITS and not (split == ALL_SPLITS and data.path):
        raise UserError(f"unknown split '{split}': {nearest(split, SPLITS)}")
    return lookup(SOURCES, data.source, "data.source")(data, split)


def check(data: DataConfig) -> None:
    """UserError unless source, density and mixture of a section `data` are known and go together."""
    one_of("data.source", data.source, tuple(SOURCES))
    density.check(data.density, data.density_fraction)
    mixture.check(data.source, data.mixture, {"path": data.path, "name": data.name, "density": data.density},
                  tuple(SOURCES))


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


def _json_field(path: Path, number: int, record: dict, field: str) -> str:
    if field not in record:
        raise UserError(f"{path} line {number} has no field '{field}' (data.field): {nearest(field, record)}")
    if not isinstance(record[field], str):
        raise UserError(f"{path} line {number}: field '{field}' is {type(record[field]).__name__}, expected text")
    check_characters(record[field], f"{path} line {number}: field '{field}'")
    return record[field].rstrip("\r\n")


# ---- TensorFlow Datasets


def tfds(data: DataConfig, split: str) -> Corpus:
    """A TFDS data set as array_record (read without TensorFlow); `data.path` is its data_dir, "" = TFDS's own."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"data.source='tfds' needs tensorflow-datasets ({error}): pip install tensorflow-datasets "
                        "importlib_resources") from None
    try:
        builder: Any = tensorflow_datasets.builder(data.name, data_dir=data.path or None, file_format="array_record")
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
    tfds_splits = builder.info.splits
    split_name = next((name for name in tfds_splits if SPLIT_NAMES.get(name) == split), None)
    has_valid = any(SPLIT_NAMES.get(name) == "valid" for name in tfds_splits)
    if split == "test" or has_valid or "train" not in tfds_splits:
        if split_name is None:
            raise UserError(f"TFDS data set '{data.name}' has no {split} split, it has {', '.join(tfds_splits)}")
        return split_name
    total = tfds_splits["train"].num_examples
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


def _mixture(data: DataConfig, split: str) -> Corpus:
    """The documents of all its sources, one source after another."""
    parts = [open_corpus(section, split) for section in mixture.sections(data).values()]
    return Corpus(lambda: itertools.chain.from_iterable(part.documents() for part in parts),
                  lambda: json.dumps([part.fingerprint() for part in parts]))


SOURCES = {"austen": austen, "text": text, "jsonl": jsonl, "sft": dialogues.sft, "tfds": tfds,
           mixture.SOURCE: _mixture, "python_sources": code.python_sources, "arithmetic": code.arithmetic,
           "python_arithmetic": code.python_arithmetic}
