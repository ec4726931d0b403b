"""Every writer on a disk without room: it says so in one line, with exit code 1, and leaves what was there before."""

import contextlib
import dataclasses
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bd3lm_jax.checkpoints import hf, rundir
from bd3lm_jax.checkpoints.published import write
from bd3lm_jax.config import DataConfig
from bd3lm_jax.core import log
from bd3lm_jax.core.errors import RunError, UserError, one_line
from bd3lm_jax.data import parts
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.data.tokenizers import ByteTokenizer
from bd3lm_jax.evaluation import convert
from bd3lm_jax.experiments import clusters
from bd3lm_jax.experiments.clusters import slices
from bd3lm_jax.generation import sample_files, trace

LARGEST = 64  # bytes of a file while the disk is full, less than any of these
PART_CHARS = 500
GROWING = ("lines of JSON", "metrics", "the files of a new run")  # the same command goes on with what is there of them
WRITERS: dict[str, Callable[["Place"], None]] = {}


class Place(NamedTuple):
    """directory: an empty one to write in. text: a file of documents. run: a run directory of one checkpoint or more.

    published: the same run in Hugging Face layout.
    """

    directory: Path
    text: Path
    run: Path
    published: Path


def _writer(name: str) -> Callable:
    return lambda function: WRITERS.setdefault(name, function)


def outcome(name: str, place: Place) -> str:
    """"" if the writer did as it should, else what it did."""
    before = _content(place.directory)
    try:
        with full():
            WRITERS[name](place)
        problem = "it wrote as if there were room"
    except RunError as error:
        line = one_line(error)
        problem = "" if "File too large" in line and "free some" in line.lower() else f"it does not say why: {line}"
    except UserError as error:
        problem = f"exit code {error.exit_code}: {one_line(error)}"
    except Exception as error:
        problem = f"a traceback: {error!r}"
    left = sorted(_content(place.directory).items() ^ before.items())
    return problem or (f"it left {left[0][0]}" if left and name not in GROWING else "")


@contextlib.contextmanager
def full() -> Iterator[None]:
    """Files of this process cannot grow beyond LARGEST: EFBIG, as a quota gives."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def data_config(place: Place, **changes) -> DataConfig:
    return DataConfig(**{"source": "text", "path": str(place.text), "tokenizer": "bytes", "seq_len": 32,
                         "valid_fraction": 0.1, "cache_dir": str(place.directory), "workers": 1} | changes)


@_writer("prepare")
def _rows(place: Place) -> None:
    prepare(data_config(place), "train", 4, ByteTokenizer())


@_writer("prepare, in parts")
def _parts(place: Place) -> None:
    before, parts.PART_CHARS = parts.PART_CHARS, PART_CHARS
    try:
        prepare(data_config(place), "train", 4, ByteTokenizer())
    finally:
        parts.PART_CHARS = before


@_writer("a trained tokenizer")
def _tokenizer(place: Place) -> None:
    prepare_tokenizer(data_config(place, tokenizer="bpe:260"))


@_writer("convert to Hugging Face layout")
def _published(place: Place) -> None:
    _convert(place, place.run, "hf")


@_writer("convert to a run directory")
def _native(place: Place) -> None:
    _convert(place, place.published, "native")


def _convert(place: Place, source: Path, form: str) -> None:
    convert.convert(source, place.directory / "made" / "model", form=form, dtype="float32", check=0, max_shard="5GB",
                    weights="ema", tokenizer="", length=0, allow_pickle=False)


@_writer("weights in several files")
def _shards(place: Place) -> None:
    tensors = [write.Tensor(name, 4000, lambda: np.zeros(1000, np.float32)) for name in "ab"]
    with write.atomic_directory(place.directory / "model") as work:
        write.write_tensors(work, tensors, 4000)


@_writer("sample --out")
def _samples(place: Place) -> None:
    sample_files.write(_old(place), [{"text": "a" * LARGEST, "num_tokens": 1, "nfe": 1, "stop": "length"}])


@_writer("sample --trace")
def _trace(place: Place) -> None:
    trace.write_html(_old(place), [{"title": "a", "mask": 1, "end": 0, "pieces": {}, "samples": []}])


@_writer("tpu")
def _scripts(place: Place) -> None:
    job = clusters.Job(name="a", slice=slices.find("H100:8"), slices=1, project="", zone="", cluster="",
                       shared_dir="/a",
                       spot=False, restarts=1, out=str(place.directory), command=("train",), points=0)
    clusters.launch("slurm", job, "create", False)


@_writer("results in JSON")
def _json(place: Place) -> None:
    log.save(_old(place), {"a": "b" * LARGEST})


@_writer("lines of JSON")
def _line(place: Place) -> None:
    log.append(place.directory / "new", {"a": "b" * LARGEST})


@_writer("metrics")
def _metrics(place: Place) -> None:
    with log.RunLog(place.directory, 10, quiet=True) as run_log:
        for step in range(10):
            run_log.metrics(step, {"train/loss": 1.0})


@_writer("the files of a new run")
def _claim(place: Place) -> None:
    config, tokenizer = rundir.read(place.run)
    rundir.create_or_validate(place.directory / "run", dataclasses.replace(config, seed=config.seed + 1), tokenizer)


def _old(place: Place) -> str:
    """A file that is there already, and has to stay."""
    return str(place.directory / "old")


def prepare_place(home: Path, text: Path, run: Path) -> Place:
    """A place whose `directory` holds one old file; with room."""
    place = Place(home / "full", text, run, home / "published")
    place.directory.mkdir()
    (place.directory / "old").write_text("as it was")
    if not hf.is_published(place.published):
        _convert(place._replace(directory=home), run, "hf")
        os.rename(home / "made" / "model", place.published)
    return place


def _content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
