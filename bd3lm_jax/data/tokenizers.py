"""Text to token ids and back: bytes, GPT-2 BPE, BERT WordPiece, a BPE trained on the corpus, any tokenizer.json.

Besides its own `size` ids every tokenizer has an end-of-document id and a mask id; the mask comes on top of `size`
unless the vocabulary has one of its own ([MASK]).
"""

import copy
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Self

import numpy as np

from bd3lm_jax.core import files, log
from bd3lm_jax.core.errors import UserError, nearest
from bd3lm_jax.core.typed import check_characters
from bd3lm_jax.data import tokenizer_files
from bd3lm_jax.data.tokenizer_files import END_TOKEN, Unsupported, library_errors, library_form, load_library

PRESETS = ("gpt2", "bert-base-uncased")
SPECS = ("bytes", *PRESETS, "bpe:N", "a path to a tokenizer.json, or to the directory of a published model")
# Names in use for the two special tokens, most telling first.
END_TOKENS = (END_TOKEN, "</s>", "[SEP]", "<|end_of_text|>", "<eos>", "<|im_end|>")
MASK_TOKENS = ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>")
MAX_IDS = 1 << 24  # no vocabulary in use has as many
NUM_BYTES = 256
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# For what is read elsewhere: hf.py registers here, which every command that opens tokenizers of others imports.
READERS: dict[str, Callable[[Path], "Tokenizer | None"]] = {}  # by the ending of a file
FINDERS: list[Callable[[str], str]] = []  # name -> path, the same for a name that they do not know


class Tokenizer:
    """Ids 0..size-1 are the vocabulary, `vocab_size` counts the mask as well."""

    unknown_id = -1  # what text outside the vocabulary becomes; -1: there is none, or it is left out
    adds_space_prefix = False  # whether the same words have other ids at the beginning of a text, as if after a space
    byte_ids: frozenset[int] = frozenset()  # tokens that are single bytes among others that are whole characters

    def __init__(self, kind: str, size: int, end_id: int, mask_id: int):
        self.kind, self.size, self.end_id, self.mask_id = kind, size, end_id, mask_id
        self.vocab_size = max(size, mask_id + 1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind!r}, size={self.size}, end_id={self.end_id}, mask_id={self.mask_id})"

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]; no special token is ever added or read from the text. UserError for what UTF-8 cannot say."""
        check_characters(text, "the text")
        return self.encode_batch([text])[0]

    def encode_special(self, text: str) -> np.ndarray:
        """As `encode`, but the names of special tokens in the text are these tokens (chat templates write them)."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_batch`, with the characters of each token: first, and the one behind the last, int [n, 2].

        Tokens that are parts of one character have that character. White space before a word may belong to its token.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; an end token becomes a newline, masks and ids >= size are left out."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        ids = ids[(ids >= 0) & (ids < self.size) & (ids != self.mask_id)]
        documents = np.split(ids, np.flatnonzero(ids == self.end_id) + 1)
        parts = [self._decode_plain(document[document != self.end_id].tolist()) for document in documents]
        return "\n".join(parts)

    def _decode_plain(self, ids: list[int]) -> str:
        raise NotImplementedError

    def token_bytes(self) -> tuple[list[bytes], list[bytes]]:
        """What each id below `size` adds to a decoded text, as its first token and behind others; b"" for ids that add
        nothing (special tokens). Joined they are the UTF-8 form of the text, if they are valid UTF-8."""
        raise NotImplementedError

    def with_mask(self, mask_id: int) -> Self:
        """The same with another mask id; -1: no mask."""
        other = copy.copy(self)
        other.mask_id, other.vocab_size = mask_id, max(self.size, mask_id + 1)
        other.__dict__.pop("identity", None)
        return other

    def _content(self) -> dict:
        return {"kind": self.kind, "end_id": self.end_id, "mask_id": self.mask_id}

    def to_bytes(self) -> bytes:
        """Everything that `load_tokenizer` needs, as canonical JSON."""
        return json.dumps(self._content(), sort_keys=True).encode()

    def save(self, path: str | Path) -> None:
        files.write(path, self.to_bytes())

    @cached_property
    def identity(self) -> str:
        """Two tokenizers with the same identity give the same ids."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, end 256, mask 257."""

    def __init__(self):
        super().__init__("bytes", NUM_BYTES + 1, NUM_BYTES, NUM_BYTES + 1)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        encoded = self.encode_batch(texts)
        characters = [np.cumsum(ids & 0xC0 != 0x80) - 1 for ids in encoded]  # 0b10......: inside a character
        return [(ids, np.stack([first, first + 1], axis=1)) for ids, first in zip(encoded, characters)]

    def _decode_plain(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def token_bytes(self) -> tuple[list[bytes], list[bytes]]:
        pieces = [bytes([byte]) for byte in range(NUM_BYTES)] + [b""]
        return pieces, pieces


class SubwordTokenizer(Tokenizer):
    """A Hugging Face tokenizer, kept as the JSON text it came from. A mask_id of None puts the mask on top.

    No random merges: two encodings of a text are the same, whatever dropout the file asks for.
    """

    def __init__(self, kind: str, model: str, end_id: int, mask_id: int | None):
        self.kind, self._model, self.end_id, self.mask_id = kind, model, end_id, -1 if mask_id is None else mask_id
        self._tokenizer = self._text_tokenizer()
        size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        if not 0 < size <= MAX_IDS:
            raise UserError(f"tokenizer '{kind}' has ids up to {size - 1}, expected 0 to {MAX_IDS - 1}")
        super().__init__(kind, size, end_id, size if mask_id is None else mask_id)
        self.unknown_id = _unknown_id(self._tokenizer, model)

    def _text_tokenizer(self):
        """The library's form for documents: "[MASK]" in them is text, not the mask, nor is the end one.

        The library leaves tokens alone that are marked as special; a file may not mark these two.
        """
        library_tokenizer = library_form(self.kind, self._model)
        added = library_tokenizer.get_added_tokens_decoder()
        if any(i in added and not added[i].special for i in (self.end_id, self.mask_id)):
            content = json.loads(self._model)
            for token in content["added_tokens"]:
                token["special"] |= token["id"] in (self.end_id, self.mask_id)
            library_tokenizer = library_form(self.kind, json.dumps(content))
        library_tokenizer.encode_special_tokens = True
        return library_tokenizer

    def with_mask(self, mask_id: int) -> Self:
        other = super().with_mask(mask_id)
        if mask_id != self.mask_id:
            other._tokenizer = other._text_tokenizer()
        return other

    @cached_property
    def _special_tokenizer(self):
        return library_form(self.kind, self._model)

    @cached_property
    def adds_space_prefix(self) -> bool:
        first, break_ = self.encode("a").tolist(), self.encode("\n").tolist()
        return self.encode("\na").tolist() != break_ + first

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        if '"ByteFallback"' not in json.dumps(json.loads(self._model).get("decoder")):
            return frozenset()
        return frozenset(i for token, i in self._tokenizer.get_vocab().items() if BYTE_TOKEN.fullmatch(token))

    def encode_special(self, text: str) -> np.ndarray:
        check_characters(text, "the text")
        mask = self._tokenizer.id_to_token(self.mask_id) if 0 <= self.mask_id < self.size else None
        first, *others = text.split(mask) if mask else [text]
        parts = [self._read_special(first)]
        for part in others:  # the mask is never part of a text
            parts += [self.encode(mask or ""), self._read_special(part)]
        return np.concatenate(parts)

    def _read_special(self, text: str) -> np.ndarray:
        with library_errors(self.kind, "cannot encode a text"):
            return np.asarray(self._special_tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with library_errors(self.kind, "cannot encode a text"):
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self._unmasked(encoding.ids) for encoding in encodings]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        with library_errors(self.kind, "cannot encode a text"):
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(self._unmasked(encoding.ids), np.asarray(encoding.offsets, np.int64).reshape(-1, 2))
                for encoding in encodings]

    def _unmasked(self, ids: list[int]) -> np.ndarray:
        """Without the mask, which a vocabulary may hold as a word like any other: there it is an unknown one."""
        ids_N = np.asarray(ids, np.int32)
        masked = ids_N == self.mask_id
        if masked.any() and self.unknown_id < 0:
            raise UserError(f"a text spells the mask token {self._tokenizer.id_to_token(self.mask_id)!r}, which is a "
                            f"word of tokenizer '{self.kind}', and that has no unknown token: take it out of the text")
        return np.where(masked, np.int32(self.unknown_id), ids_N) if masked.any() else ids_N

    def _decode_plain(self, ids: list[int]) -> str:
        with library_errors(self.kind, "cannot decode its ids"):
            return self._tokenizer.decode(ids)

    def token_bytes(self) -> tuple[list[bytes], list[bytes]]:
        decoder = json.dumps(json.loads(self._model).get("decoder"))
        special = {*self._tokenizer.get_added_tokens_decoder(), self.end_id, self.mask_id}
        tokens = [self._tokenizer.id_to_token(i) if i not in special else None for i in range(self.size)]
        if '"ByteLevel"' in decoder:
            pieces = [bytes(map(BYTE_OF.__getitem__, token)) if token and BYTE_OF.keys() >= set(token) else b""
                      for token in tokens]
            return pieces, pieces
        with library_errors(self.kind, "cannot decode its ids"):
            first, later = _decoded_pieces(self._tokenizer, [i for i, token in enumerate(tokens) if token], self.size)
        for i in self.byte_ids - special:
            token = tokens[i]
            if token and (byte := int(token[3:5], 16)) > 127:  # a part of a character: no text alone
                first[i] = later[i] = bytes([byte])
        return first, later

    def _content(self) -> dict:
        return super()._content() | {"model": self._model}


def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write a byte as itself if it is printable Latin-1, else as a character from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(NUM_BYTES + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of_character()


def _decoded_pieces(library_tokenizer, ids: list[int], size: int) -> tuple[list[bytes], list[bytes]]:
    """`Tokenizer.token_bytes` of the given ids, by decoding each of them alone and behind another token."""
    first, later = [b""] * size, [b""] * size
    single_texts = library_tokenizer.decode_batch([[i] for i in ids])
    other, text = next(((i, text) for i, text in zip(ids, single_texts) if text.isalnum()), (None, ""))
    if other is None:
        raise UserError(f"none of the {len(ids)} tokens is a word: what each adds to a text cannot be told")
    for i, own, pair in zip(ids, single_texts, library_tokenizer.decode_batch([[other, i] for i in ids])):
        first[i] = own.encode()
        later[i] = pair.removeprefix(text).encode() if pair.startswith(text) else b""
    return first, later


def get_tokenizer(spec: str, train_documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer named by `data.tokenizer`; only "bpe:N" reads `train_documents()`. UserError if there is none."""
    if spec == "bytes":
        return ByteTokenizer()
    if spec in PRESETS:
        packed = resources.files("bd3lm_jax.data").joinpath("resources", f"{spec}.json.xz").read_bytes()
        return _from_model(spec, lzma.decompress(packed).decode(), {})
    if spec.startswith("bpe:"):
        return train_bpe(spec, train_documents())
    reader = next((READERS[ending] for ending in READERS if spec.lower().endswith(ending)), None)
    if reader is not None:
        found = reader(Path(spec))
        if found is None:
            raise UserError(f"data.tokenizer='{spec}' holds no tokenizer that can be read: give a tokenizer.json")
        return found
    if Path(spec).is_dir():
        found = _in_directory(Path(spec))
        if found is None:
            raise UserError(f"data.tokenizer='{spec}' is a directory without {tokenizer_files.NAMES}")
        return found
    if spec.endswith(".json") or Path(spec).exists():
        return load_tokenizer(spec)
    suggestion = nearest(spec, SPECS)
    if "/" in spec or "did you mean" not in suggestion:
        path = next((path for find in FINDERS if (path := find(spec)) != spec), None)
        if path is not None:
            return get_tokenizer(path, train_documents)
    raise UserError(f"unknown data.tokenizer '{spec}': {suggestion}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A file written by `Tokenizer.save`, or a Hugging Face tokenizer.json (with the configs beside it)."""
    path = Path(path)
    content = tokenizer_files.read_json(path)
    if "kind" not in content:
        return _from_model(path.name, *tokenizer_files.read_tokenizer_json(path))
    if content["kind"] == "bytes":
        return ByteTokenizer()
    missing = [key for key in ("model", "end_id", "mask_id") if key not in content]
    if missing:
        raise UserError(f"tokenizer file {path} has no '{missing[0]}': damaged, or not written by this library")
    kinds = {"kind": str, "model": str, "end_id": int, "mask_id": int}
    wrong = [key for key, kind in kinds.items() if type(content[key]) is not kind]
    if wrong:
        raise UserError(f"tokenizer file {path}: '{wrong[0]}' is {content[wrong[0]]!r}, expected "
                        f"{kinds[wrong[0]].__name__}: damaged, or not written by this library")
    return SubwordTokenizer(*(content[key] for key in kinds))


def tokenizer_of(directory: str | Path) -> Tokenizer | None:
    """The tokenizer that lies beside published weights; None if there is none, or, with a note, none of a known kind.

    Raises UserError for files that cannot be read and for a vocabulary without end token.
    """
    try:
        return _in_directory(Path(directory))
    except Unsupported as error:
        log.note(f"{error}; until then texts cannot be read or written, only ids")
        return None


def _in_directory(directory: Path) -> Tokenizer | None:
    path = directory / tokenizer_files.TOKENIZER_JSON
    if path.exists():
        return load_tokenizer(path)
    found = tokenizer_files.read_directory(directory)
    return found and _from_model(*found)


def train_bpe(spec: str, documents: Iterable[str]) -> Tokenizer:
    """Byte-level BPE "bpe:N" of exactly N ids: the end token (id 0), 256 bytes and N - 257 merges. Deterministic."""
    size, library = _bpe_size(spec), load_library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(vocab_size=size, special_tokens=[END_TOKEN], initial_alphabet=alphabet,
                                          show_progress=False)
    with library_errors(spec, "cannot be trained on these documents"):
        tokenizer.train_from_iterator(documents, trainer)
    found = tokenizer.get_vocab_size()
    if found != size:
        raise UserError(f"data.tokenizer='{spec}' found only {found} tokens in the train documents: "
                        f"ask for bpe:{found} or less, or give more text")
    return SubwordTokenizer(spec, tokenizer.to_str(), tokenizer.token_to_id(END_TOKEN), None)


def _bpe_size(spec: str) -> int:
    number = spec.removeprefix("bpe:")
    if not number.isdecimal() or int(number) < NUM_BYTES + 1:
        raise UserError(f"data.tokenizer='{spec}': expected bpe:N with N at least {NUM_BYTES + 1} (bytes and the end)")
    return int(number)


def _from_model(kind: str, model: str, config: dict) -> Tokenizer:
    """Reads the end and the mask from tokenizer_config.json where it names them, else from the usual names."""
    vocab = library_form(kind, model).get_vocab()

    def find(keys: tuple, default_names: tuple) -> int | None:
        configured = [tokenizer_files.content_of(config.get(key)) for key in keys]
        return next((vocab[name] for name in (*configured, *default_names) if name in vocab), None)

    end_id = find(("eos_token", "sep_token"), END_TOKENS)
    if end_id is None:
        raise UserError(f"tokenizer '{kind}' has no end token: expected one of {', '.join(END_TOKENS)}, or eos_token "
                        "in a tokenizer_config.json beside it")
    return SubwordTokenizer(kind, model, end_id, find(("mask_token",), MASK_TOKENS))


def _unknown_id(library_tokenizer, model: str) -> int:
    if type(library_tokenizer.model).__name__ == "Unigram":
        found = json.loads(model)["model"].get("unk_id")
    else:
        name = getattr(library_tokenizer.model, "unk_token", None)
        found = None if name is None else library_tokenizer.token_to_id(name)
    return -1 if found is None else found
