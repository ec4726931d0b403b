"""Documents to token ids, part by part. Parts of a large text are kept as they are done, so that a build that was
killed goes on where it was, and may be made by several processes; what comes out is the same.

A part is a file of the documents that make up PART_CHARS characters; its name holds a hash of their text, and its
content is checked by the CRC of its zip entries. Texts of a single part never touch the disk.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bd3lm_jax.core import files
from bd3lm_jax.core.errors import RunError
from bd3lm_jax.data.density.source import Annotation
from bd3lm_jax.data.texts import encode_continuation
from bd3lm_jax.data.tokenizers import Tokenizer, load_tokenizer

PART_CHARS = 1 << 22
DENSITY_STEPS = 255  # a density is stored as whole parts of this: tags are exact
TOKENIZER = "tokenizer.json"
_WORKER: tuple = ()  # in a worker: its tokenizer and form

Arrays = dict[str, np.ndarray]  # tokens [N], density and prompt [N] where asked for, lengths [D], bytes []


class ArraySpec(NamedTuple):
    """How documents become arrays. A document counts its UTF-8 bytes and one for the newline of its end token."""

    dtype: str  # of the token ids
    dialogues: bool  # the documents are Dialogues, with prompts


def encode(documents: list[str], tokenizer: Tokenizer, array_spec: ArraySpec, density: Annotation | None) -> Arrays:
    """The arrays of some documents, each with its end token."""
    found = collections.defaultdict(list)
    for text, (ids, offsets) in zip(documents, _encoded(documents, tokenizer, density)):
        if array_spec.dialogues:
            ids, prompt = _encode_dialogue(text, tokenizer)
            found["prompt"].append(np.append(prompt, False).astype(np.uint8))
        found["tokens"].append(np.append(ids, tokenizer.end_id).astype(array_spec.dtype))
        if density is not None:
            values = density.of(text, ids, offsets, tokenizer.end_id)
            found["density"].append(np.round(values * DENSITY_STEPS).astype(np.uint8))
    return {**{name: np.concatenate(arrays) for name, arrays in found.items()},
            "lengths": np.array([len(ids) for ids in found["tokens"]], np.int64),
            "bytes": np.array(sum(len(text.encode()) + 1 for text in documents), np.int64)}


def encode_all(documents: Iterable[str], tokenizer: Tokenizer, array_spec: ArraySpec, density: Annotation | None,
               directory: Path, work: Path, workers: int) -> Iterator[Arrays]:
    """The arrays of all documents, part after part. Raises RunError if a worker is killed.

    directory: where parts are kept, made if there are several; it may be removed at any time by another process that
    has finished the same. With a density, which may depend on what was read before, they are neither kept nor shared
    among workers. work: a directory of this process alone, left as it was.
    """
    parts = _split(documents)
    head = list(itertools.islice(parts, 2))
    parts = itertools.chain(head, parts)
    if density is not None or len(head) < 2:
        for part in parts:
            yield encode(part, tokenizer, array_spec, density)
        return
    directory.mkdir(exist_ok=True)
    if workers == 1:
        for index, part in enumerate(parts):
            path = _path(directory, index, part)
            yield _load(path) or _encode_to(path, part, tokenizer, array_spec)
        return
    yield from _encode_with(workers, parts, tokenizer, array_spec, directory, work)


def _encode_with(workers: int, parts: Iterator[list[str]], tokenizer: Tokenizer, array_spec: ArraySpec, directory: Path,
                 work: Path) -> Iterator[Arrays]:
    """As `encode_all`, by processes that read the texts from here and write the parts."""
    tokenizer.save(work / TOKENIZER)
    context = multiprocessing.get_context("spawn")  # forked threads of the parent could hold locks for ever
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (str(work / TOKENIZER), array_spec))
    pending = collections.deque()

    def next_part() -> Arrays:
        path, future, part = pending.popleft()
        if future is not None:
            future.result()
        return _load(path) or _encode_to(path, part, tokenizer, array_spec)

    try:
        for index, part in enumerate(parts):
            path = _path(directory, index, part)
            pending.append((path, None if path.exists() else pool.submit(_work, str(path), part), part))
            if len(pending) > 2 * workers:
                yield next_part()
        while pending:
            yield next_part()
    except BrokenProcessPool:
        raise RunError(f"one of {workers} workers was killed, perhaps for want of memory: run the same command again, "
                       "with fewer --num_workers; what is done is kept") from None
    finally:
        pool.shutdown(cancel_futures=True)
        (work / TOKENIZER).unlink(missing_ok=True)


def _start(tokenizer: str, array_spec: ArraySpec) -> None:
    """In a worker: it has one core, and ends with its parent, even when that is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM):  # are for the parent, which ends the workers
        signal.signal(number, signal.SIG_IGN)
    global _WORKER
    _WORKER = load_tokenizer(tokenizer), array_spec
    parent = multiprocessing.parent_process()
    assert parent is not None  # of a worker

    def exit_with_parent():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _work(path: str, documents: list[str]) -> None:
    _encode_to(Path(path), documents, *_WORKER)


def _split(documents: Iterable[str]) -> Iterator[list[str]]:
    part, chars = [], 0
    for document in documents:
        part.append(document)
        chars += len(document)
        if chars >= PART_CHARS:
            yield part
            part, chars = [], 0
    if part:
        yield part


def _path(directory: Path, index: int, documents: list[str]) -> Path:
    digest = hashlib.sha256(json.dumps([getattr(text, "parts", text) for text in documents]).encode())
    return directory / f"{index:06}-{digest.hexdigest()[:20]}.npz"


def _load(path: Path) -> Arrays | None:
    """None if the part is not there or damaged."""
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def _encode_to(path: Path, documents: list[str], tokenizer: Tokenizer, array_spec: ArraySpec) -> Arrays:
    """The arrays, stored as a whole unless nobody needs them there any more."""
    arrays, content = encode(documents, tokenizer, array_spec, None), io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    with contextlib.suppress(FileNotFoundError):  # another process has finished, and removed the directory
        path.parent.mkdir(exist_ok=True)
        files.write(path, content.getvalue())
    return arrays


def _encoded(documents: list[str], tokenizer: Tokenizer, density: Annotation | None):
    """Ids and, where the density needs them, the characters of each."""
    if density is not None and density.needs_offsets:
        return tokenizer.encode_offsets(documents)
    return ((ids, None) for ids in tokenizer.encode_batch(documents))


def _encode_dialogue(dialogue, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a Dialogue, part by part, and which of them are prompt."""
    first, *others = [text for text, _ in dialogue.parts]
    parts = [tokenizer.encode_special(first) if dialogue.special else tokenizer.encode(first)]
    parts += [encode_continuation(tokenizer, text, dialogue.special) for text in others]
    return np.concatenate(parts), np.repeat([not answer for _, answer in dialogue.parts], [len(ids) for ids in parts])
