"""Tokenise and lay out a split once; read its rows memory mapped ever after.

A prepared split is a directory named by a hash of all that decides its content: tokens.npy `[R, L]` (uint16 or
uint32), density.npy `[R, L]` (uint8, 255 times the density) where one was asked for, prompt.npy `[R, L]` (uint8, 1 on
prompts) of dialogues, pieces.npy `[P, 4]` (see
packing.py) and meta.json, which is written last (see manifest.py).
"""

import contextlib
import dataclasses
import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from bd3lm_jax.core import files, lock, paths, workspace
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.schema import DataConfig
from bd3lm_jax.data import corpora, manifest, mixture, packing, parts
from bd3lm_jax.data.corpus import Corpus
from bd3lm_jax.data.density import open_density
from bd3lm_jax.data.density.source import Annotation, Context
from bd3lm_jax.data.tokenizers import Tokenizer, get_tokenizer, load_tokenizer

FORMAT = 1  # raise it when the same documents would be stored differently
CHUNK_TOKENS = 1 << 22  # tokens held in memory while rows are written
TOKEN_ARRAYS = {"tokens", "density", "prompt"}  # arrays with an entry a token
DAMAGED, ABSENT = "damaged", "absent"

Progress = Callable[[int, int], None]  # called with the documents and tokens done so far


class Rows:
    """A prepared split: `len()` rows of `length` tokens. Row ids may be in any order and repeat."""

    def __init__(self, path: Path, meta: dict):
        self.path, self.meta, self.length = path, meta, meta["length"]
        self._tokens_RxL = np.load(path / "tokens.npy", mmap_mode="r")
        self._pieces_Px4 = np.load(path / "pieces.npy")
        self.has_density = "density" in meta
        self._density_RxL = np.load(path / "density.npy", mmap_mode="r") if self.has_density else None
        self.has_prompt = "prompt.npy" in meta["files"]
        self._prompt_RxL = np.load(path / "prompt.npy", mmap_mode="r") if self.has_prompt else None
        self._first_piece = np.searchsorted(self._pieces_Px4[:, packing.ROW], np.arange(len(self) + 1))

    def __len__(self) -> int:
        return self._tokens_RxL.shape[0]

    def tokens(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]; padding holds the end token."""
        return self._tokens_RxL[np.asarray(row_ids)].astype(np.int32)

    def density(self, row_ids: np.ndarray) -> np.ndarray:
        """float32 [n, L] in [0, 1]; 0 in padding. Only where `has_density`."""
        assert self._density_RxL is not None
        return self._density_RxL[np.asarray(row_ids)].astype(np.float32) / parts.DENSITY_STEPS

    def prompt(self, row_ids: np.ndarray) -> np.ndarray:
        """float32 [n, L]: 1 on prompts, 0 on answers and in padding. Only where `has_prompt`."""
        assert self._prompt_RxL is not None
        return self._prompt_RxL[np.asarray(row_ids)].astype(np.float32)

    def segments(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: tokens see only their own segment; 0 = padding."""
        chosen, target, index = self._places(row_ids)
        segment = np.ones_like(index) if self.meta["layout"] == "wrap" else index + 1
        return self._fill_pieces(len(row_ids), chosen, target, segment, 0, 0)

    def positions(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: from 0 in each segment; 0 in padding."""
        chosen, target, _ = self._places(row_ids)
        start = chosen[:, packing.START] if self.meta["layout"] == "wrap" else np.zeros_like(target)
        return self._fill_pieces(len(row_ids), chosen, target, start, 1, 0)

    def documents(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: index of the document in the split; -1 = padding."""
        chosen, target, _ = self._places(row_ids)
        return self._fill_pieces(len(row_ids), chosen, target, chosen[:, packing.DOCUMENT], 0, -1)

    def scored(self, row_ids: np.ndarray) -> np.ndarray:
        """bool [n, L]: tokens that evaluation counts, here all but padding and prompts (fewer in windows.py)."""
        real = self.documents(row_ids) >= 0
        return real & (self.prompt(row_ids) == 0) if self.has_prompt else real

    def stream(self) -> np.ndarray:
        """int32 [meta["tokens"]]: all tokens without padding, document after document.

        A packed document longer than a row may have its last piece, which fills gaps, before the others.
        """
        pieces = self._pieces_Px4[np.lexsort((self._pieces_Px4[:, packing.ROW], self._pieces_Px4[:, packing.DOCUMENT]))]
        starts = pieces[:, packing.ROW].astype(np.int64) * self.length + pieces[:, packing.START]
        return self._tokens_RxL.reshape(-1)[packing.expand_ranges(starts, pieces[:, packing.LENGTH])].astype(np.int32)

    def _places(self, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces of the rows, where each starts in the flattened result, and its index in its row."""
        row_ids = np.asarray(row_ids)
        first = self._first_piece[row_ids]
        count = self._first_piece[row_ids + 1] - first
        chosen = self._pieces_Px4[packing.expand_ranges(first, count)]
        target = np.repeat(np.arange(len(row_ids)) * self.length, count) + chosen[:, packing.START]
        return chosen, target, packing.expand_ranges(np.zeros_like(count), count)

    def _fill_pieces(self, num: int, chosen, target, value, step: int, padding: int) -> np.ndarray:
        """[num, L] with value, value + step, value + 2 step, ... in each piece."""
        size = chosen[:, packing.LENGTH]
        result = np.full(num * self.length, padding, np.int32)
        within = packing.expand_ranges(np.zeros_like(target), size)
        result[np.repeat(target, size) + within] = np.repeat(value, size) + step * within
        return result.reshape(num, self.length)


def cache_directory(cache_dir: str) -> Path:
    """`data.cache_dir`, or for "" `paths.default_cache`; created if missing."""
    path = Path(paths.local(cache_dir)) if cache_dir else paths.default_cache()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the cache directory {path}: {error.strerror}; set data.cache_dir or "
                        "$BD3LM_CACHE to a directory that can be written") from None
    return path


def prepare_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of `data.tokenizer`; one trained on the corpus is kept in the cache directory.

    A kept file that is not what was written (or without a seal, as earlier versions wrote) is made again, with a
    warning. RunError if it cannot be written.
    """
    if not data.tokenizer.startswith("bpe:"):
        return get_tokenizer(data.tokenizer, tuple)
    corpus = corpora.open_corpus(data, "train")
    identity = manifest.digest([FORMAT, data.tokenizer, corpus.fingerprint()])
    path = cache_directory(data.cache_dir) / f"tokenizer-{identity}.json"
    if _is_sealed(path):
        return load_tokenizer(path)
    with _disk_errors(path.parent), lock.hold_waiting(workspace.lock_file(path), "trains the same tokenizer"):
        if _is_sealed(path):  # another process was faster
            return load_tokenizer(path)
        if path.exists():
            warnings.warn(f"the tokenizer in {path} is damaged or of an earlier version: training it again",
                          stacklevel=2)
        tokenizer = get_tokenizer(data.tokenizer, corpus.documents)
        content = json.loads(tokenizer.to_bytes())
        files.write(path, json.dumps(content | {manifest.CHECKSUM_KEY: manifest.digest(content)}).encode())
    return tokenizer


def _is_sealed(path: Path) -> bool:
    """Whether a JSON object is what was written, by the hash in it."""
    try:
        content = json.loads(path.read_bytes())
        return content.pop(manifest.CHECKSUM_KEY) == manifest.digest(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def prepare(data: DataConfig, split: str, block_size: int, tokenizer: Tokenizer,
            progress: Progress | None = None, workers: int = 1) -> Rows | mixture.MixedRows:
    """Rows of a split, from the cache if they are there and whole, else built now.

    The train split of a mixture are the rows of its sources, each prepared by itself; its other splits are prepared as
    one text. Only the "pack" layout depends on `block_size`. With `data.density` the rows have a density.
    workers: processes that tokenise; the result does not depend on them. Raises UserError for input that cannot be read
    or an empty split, RunError when the disk is full or a worker is killed; what was done is found by the next call.
    """
    if data.source == mixture.SOURCE and split == "train":
        sources = {name: prepare(section, split, block_size, tokenizer, progress, workers)
                   for name, section in mixture.sections(data).items()}
        return mixture.MixedRows(sources, [weight for _, weight in data.mixture])
    density = None
    if data.density:
        context = Context(corpora.open_corpus(data, "train").fingerprint,
                          lambda: _train_counts(data, block_size, tokenizer, progress))
        density = open_density(data.density, data.density_fraction, context)
    return prepare_corpus(corpora.open_corpus(data, split), data.source, split, data, block_size, tokenizer, progress,
                          density, workers)


def _train_counts(data: DataConfig, block_size: int, tokenizer: Tokenizer, progress: Progress | None) -> np.ndarray:
    """How often every id occurs in the training split, int64 [V]."""
    rows = prepare(dataclasses.replace(data, density="", density_fraction=1.0), "train", block_size, tokenizer,
                   progress)
    counts_V, step = np.zeros(tokenizer.vocab_size, np.int64), max(1, CHUNK_TOKENS // rows.length)
    for first in range(0, len(rows), step):
        ids = np.arange(first, min(first + step, len(rows)))
        counts_V += np.bincount(rows.tokens(ids)[rows.documents(ids) >= 0], minlength=len(counts_V))
    return counts_V


def prepare_corpus(corpus: Corpus, source: str, split: str, data: DataConfig, block_size: int,
                   tokenizer: Tokenizer, progress: Progress | None = None, density: Annotation | None = None,
                   workers: int = 1) -> Rows:
    """As `prepare`, for the documents of `corpus`, which `source` and `split` name; `data` tells the layout."""
    identity = {"format": FORMAT, "source": source, "split": split, "corpus": corpus.fingerprint(),
                "tokenizer": tokenizer.identity, "layout": data.packing, "length": data.seq_len,
                "block_size": block_size if data.packing == "pack" else 0}
    if density is not None:
        identity["density"] = density.identity
    path = cache_directory(data.cache_dir) / f"{source}-{split}-{manifest.digest(identity)}"
    while (damage := _damage(path, identity)) is not None:
        with _disk_errors(path.parent), workspace.directory(path, "prepares the same rows") as work:
            if path.exists() and (damage == ABSENT or not _discard_damaged(path, identity, work)):
                continue  # another process was faster
            parts_directory = workspace.parts(path)
            try:
                _build(work, corpus.documents(), identity,
                       _Tokenising(tokenizer, density, parts_directory, workers, progress))
            except UserError as error:
                if not isinstance(error, RunError):  # another text has to be given, which these parts are not of
                    shutil.rmtree(parts_directory, ignore_errors=True)
                raise
            _rename_into_place(work, path, identity)
            shutil.rmtree(parts_directory, ignore_errors=True)
    workspace.remove_leftovers(path)
    return Rows(path, manifest.read(path))


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write in the cache directory {directory}: {error.strerror or error}; free some space "
                       "or set data.cache_dir to another disk") from error


def _damage(path: Path, identity: dict) -> str | None:
    """What is wrong with prepared rows; None if nothing."""
    return manifest.damage(path, identity) if path.exists() else ABSENT


def _discard_damaged(path: Path, identity: dict, work: Path) -> bool:
    """Remove damaged rows; False if they are whole: another process, which saw the damage too, has built them anew."""
    damage = manifest.damage(path, identity)
    if damage is None:
        return False
    with contextlib.suppress(FileNotFoundError):
        path.rename(work / DAMAGED)
        shutil.rmtree(work / DAMAGED)
        warnings.warn(f"prepared rows in {path} are damaged ({damage}): building them again", stacklevel=3)
    return True


@dataclasses.dataclass(frozen=True)
class _Tokenising:
    """How documents become arrays of tokens, and where finished parts are kept."""

    tokenizer: Tokenizer
    density: Annotation | None
    parts_directory: Path
    workers: int
    progress: Progress | None


def _build(work: Path, documents: Iterable[str], identity: dict, tokenising: _Tokenising) -> dict:
    """Write tokens.npy, density.npy, pieces.npy and meta.json of a split in the directory `work`."""
    tokenizer, density = tokenising.tokenizer, tokenising.density
    id_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    flat: dict[str, tuple[np.dtype, int]] = {"tokens.npy": (np.dtype(id_type), tokenizer.end_id)}  # and the padding
    if density is not None:
        flat["density.npy"] = np.dtype(np.uint8), 0
    dialogues = identity["source"] == "sft"
    if dialogues:
        flat["prompt.npy"] = np.dtype(np.uint8), 0
    array_spec = parts.ArraySpec(flat["tokens.npy"][0].str, dialogues)
    lengths, num_bytes = _tokenise(work, documents, array_spec, tokenising)
    if not len(lengths):
        raise UserError(f"the {identity['split']} split of '{identity['source']}' holds no documents")
    found = {}
    if density is not None:
        if identity["split"] == "train":
            density.on_end()
        stored = np.memmap(_flat(work / "density.npy"), np.uint8, "r")
        found["density_mean"] = float(stored.mean()) / parts.DENSITY_STEPS
    layout = packing.place_documents(identity["layout"], lengths, identity["length"], identity["block_size"])
    for name, (dtype, padding) in flat.items():
        _write_rows(work / name, dtype, layout, identity["length"], padding)
    pieces = io.BytesIO()  # np.save to a file says not why it could not write
    np.save(pieces, layout.pieces_Px4)
    (work / "pieces.npy").write_bytes(pieces.getbuffer())
    counts = {"rows": layout.num_rows, "tokens": int(lengths.sum()), "documents": len(lengths), "bytes": num_bytes}
    return manifest.write(work, identity, found | counts, [*flat, "pieces.npy"])


def _write_rows(path: Path, dtype: np.dtype, layout: packing.Layout, length: int, padding: int) -> None:
    """An array `[R, L]` as .npy, from the concatenated documents in the file `_flat(path)`, which goes."""
    flat = np.memmap(_flat(path), dtype, "r")
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                  "shape": (layout.num_rows, length)}
        np.lib.format.write_array_header_1_0(file, header)
        rows = max(1, CHUNK_TOKENS // length)
        for first in range(0, layout.num_rows, rows):
            last = min(first + rows, layout.num_rows)
            file.write(packing.fill_rows(flat, layout, first, last, length, padding).tobytes())
    del flat
    _flat(path).unlink()


def _flat(path: Path) -> Path:
    return path.with_suffix(".flat")


def _tokenise(work: Path, documents: Iterable[str], array_spec: parts.ArraySpec,
              how: _Tokenising) -> tuple[np.ndarray, int]:
    """Write the ids of all documents, each with its end token, their densities and which tokens are prompts. Returns
    lengths [D] and bytes."""
    lengths, num_bytes, num_tokens, num_documents = [], 0, 0, 0
    with contextlib.ExitStack() as stack:
        files = {}
        for arrays in parts.encode_all(documents, how.tokenizer, array_spec, how.density, how.parts_directory, work,
                                       how.workers):
            for name in TOKEN_ARRAYS & arrays.keys():
                if name not in files:
                    files[name] = stack.enter_context(open(_flat(work / f"{name}.npy"), "wb"))
                files[name].write(arrays[name].tobytes())
            lengths.append(arrays["lengths"])
            num_bytes += int(arrays["bytes"])
            num_documents += len(lengths[-1])
            num_tokens += len(arrays["tokens"])
            if how.progress is not None:
                how.progress(num_documents, num_tokens)
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int64), num_bytes


def _rename_into_place(work: Path, path: Path, identity: dict) -> None:
    """Rename into place; where files cannot be locked another process may have been faster with the same content."""
    try:
        workspace.rename_into_place(work, path)
    except OSError:
        if _damage(path, identity) is not None:
            raise
