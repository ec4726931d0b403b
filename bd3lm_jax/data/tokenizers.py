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

import numpy as np

from bd3lm_jax.errors import UserError, nearest
from bd3lm_jax.typed import check_characters, from_json

PRESETS = ("gpt2", "bert-base-uncased")
SPECS = ("bytes", *PRESETS, "bpe:N", "a path to a tokenizer.json, or to the directory of a published model")
END_TOKEN = "<|endoftext|>"
# Names in use for the two special tokens, most telling first.
END_TOKENS = (END_TOKEN, "</s>", "[SEP]", "<|end_of_text|>", "<eos>", "<|im_end|>")
USUAL_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<pad>", "<unk>", "<mask>", END_TOKEN)
MASK_TOKENS = ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>")
NUM_BYTES = 256


class Tokenizer:
    """Ids 0..size-1 are the vocabulary, `vocab_size` counts the mask as well."""

    unknown_id = -1  # what text outside the vocabulary becomes; -1: there is none, or it is left out

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

    def check_ids(self, ids, what: str) -> None:
        """UserError unless all ids are in 0..vocab_size-1; `what` names them in the message."""
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"{what} hold id {bad}, expected 0..{self.vocab_size - 1} (tokenizer '{self.kind}'): "
                            "was the text encoded with another tokenizer?")

    def with_mask(self, mask_id: int) -> "Tokenizer":
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
        Path(path).write_bytes(self.to_bytes())

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
    """A Hugging Face tokenizer, kept as the JSON text it came from. A mask_id of None puts the mask on top."""

    def __init__(self, kind: str, model: str, end_id: int, mask_id: int | None):
        self._model = model
        self._tokenizer = _parse(kind, model)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "[MASK]" in a document is text, not the mask
        size = max(self._tokenizer.get_vocab().values()) + 1
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        if unknown is not None:
            self.unknown_id = self._tokenizer.token_to_id(unknown)
        super().__init__(kind, size, end_id, size if mask_id is None else mask_id)

    @cached_property
    def _reads_special(self):
        library_tokenizer = _parse(self.kind, self._model)
        library_tokenizer.no_padding()
        library_tokenizer.no_truncation()
        return library_tokenizer

    def encode_special(self, text: str) -> np.ndarray:
        check_characters(text, "the text")
        return np.asarray(self._reads_special.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(np.asarray(encoding.ids, np.int32), np.asarray(encoding.offsets, np.int64).reshape(-1, 2))
                for encoding in encodings]

    def _decode_plain(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def token_bytes(self) -> tuple[list[bytes], list[bytes]]:
        decoder = json.dumps(json.loads(self._model).get("decoder"))
        special = {*self._tokenizer.get_added_tokens_decoder(), self.end_id, self.mask_id}
        tokens = [self._tokenizer.id_to_token(i) if i not in special else None for i in range(self.size)]
        if '"ByteLevel"' in decoder:
            pieces = [bytes(map(BYTE_OF.get, token)) if token and BYTE_OF.keys() >= set(token) else b""
                      for token in tokens]
            return pieces, pieces
        first, later = _decoded_pieces(self._tokenizer, [i for i, token in enumerate(tokens) if token], self.size)
        if '"ByteFallback"' in decoder:
            for i, token in enumerate(tokens):
                if token and re.fullmatch("<0x[89A-F][0-9A-F]>", token):  # a part of a character: no text alone
                    first[i] = later[i] = bytes([int(token[3:5], 16)])
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
    alone = library_tokenizer.decode_batch([[i] for i in ids])
    other, text = next(((i, text) for i, text in zip(ids, alone) if text.isalnum()), (None, ""))
    if other is None:
        raise UserError(f"none of the {len(ids)} tokens is a word: what each adds to a text cannot be told")
    for i, own, pair in zip(ids, alone, library_tokenizer.decode_batch([[other, i] for i in ids])):
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
    if spec.endswith(".gguf"):
        from bd3lm_jax.published.gguf import read_tokenizer

        found = read_tokenizer(Path(spec))
        if found is None:
            raise UserError(f"data.tokenizer='{spec}' holds no tokenizer that can be read: give a tokenizer.json")
        return found
    if Path(spec).is_dir():
        found = tokenizer_of(spec)
        if found is None:
            raise UserError(f"data.tokenizer='{spec}' is a directory without tokenizer.json, vocab.txt or vocab.json")
        return found
    if spec.endswith(".json") or Path(spec).exists():
        return load_tokenizer(spec)
    raise UserError(f"unknown data.tokenizer '{spec}': {nearest(spec, SPECS)}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A file written by `Tokenizer.save`, or a Hugging Face tokenizer.json (and tokenizer_config.json beside it)."""
    path = Path(path)
    content = _read_json(path)
    if "kind" not in content:
        config = path.with_name("tokenizer_config.json")
        return _from_model(path.name, path.read_text(encoding="utf-8"), _read_json(config) if config.exists() else {})
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
    """The tokenizer that lies beside published weights; None if there is none.

    It is read from tokenizer.json, else from vocab.txt (WordPiece), else from vocab.json and merges.txt (byte-level
    BPE; without the latter every token is a character). tokenizer_config.json and special_tokens_map.json name its
    special tokens. Raises UserError for files that cannot be read and for a vocabulary without end token.
    """
    directory = Path(directory)
    found = [name for name in ("tokenizer.json", "vocab.txt", "vocab.json") if (directory / name).exists()]
    if not found:
        return None
    path = directory / found[0]
    named = [directory / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    config = {key: value for file in named if file.exists() for key, value in _read_json(file).items()}
    if path.name == "tokenizer.json":
        if "kind" in _read_json(path):
            return load_tokenizer(path)
        return _from_model(path.name, path.read_text(encoding="utf-8"), config)
    build = _word_piece if path.name == "vocab.txt" else _byte_level
    return _from_model(path.name, build(path, config), config)


def _word_piece(path: Path, config: dict) -> str:
    """The JSON form of a BERT tokenizer whose vocabulary is one token a line."""
    library, tokens = _library(), _read_text(path).split("\n")
    vocab = {token.rstrip("\r"): i for i, token in enumerate(tokens[:-1] if tokens[-1] == "" else tokens)}
    tokenizer = library.Tokenizer(library.models.WordPiece(vocab, unk_token=_content_of(config.get("unk_token"))
                                                           or "[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True), strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True))
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    return _with_special_tokens(library, tokenizer, vocab, config)


def _byte_level(path: Path, config: dict) -> str:
    """The JSON form of a GPT-2 or RoBERTa tokenizer."""
    library, vocab, merges = _library(), _read_json(path), path.with_name("merges.txt")
    lines = _read_text(merges).splitlines() if merges.exists() else []
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    unknown = _content_of(config.get("unk_token")) or "<unk>"
    try:
        model = library.models.BPE(vocab, pairs, unk_token=unknown if unknown in vocab else None)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} and {merges.name} are no BPE vocabulary: {error}") from None
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    tokenizer.decoder = library.decoders.ByteLevel()
    return _with_special_tokens(library, tokenizer, vocab, config)


def _with_special_tokens(library, tokenizer, vocab: dict[str, int], config: dict) -> str:
    """Its JSON form, with the tokens that are never text: those that the config names, and the usual ones."""
    named = [_content_of(value) for key, value in config.items() if key.endswith("_token")]
    special = [name for name in dict.fromkeys((*named, *USUAL_SPECIAL)) if name in vocab]
    tokenizer.add_special_tokens([library.AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer.to_str()


def _content_of(token) -> str | None:
    """A special token as configs name it: a string, or an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error}") from None


def _read_json(path: Path) -> dict:
    try:
        content = from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"tokenizer file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"tokenizer file {path} holds a JSON {type(content).__name__}, expected an object")
    return content


def train_bpe(spec: str, documents: Iterable[str]) -> Tokenizer:
    """Byte-level BPE "bpe:N" of exactly N ids: the end token (id 0), 256 bytes and N - 257 merges. Deterministic."""
    size = _bpe_size(spec)
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(vocab_size=size, special_tokens=[END_TOKEN], initial_alphabet=alphabet,
                                          show_progress=False)
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
    vocab = _parse(kind, model).get_vocab()

    def find(keys: tuple, usual: tuple) -> int | None:
        named = [_content_of(config.get(key)) for key in keys]
        return next((vocab[name] for name in (*named, *usual) if name in vocab), None)

    end_id = find(("eos_token", "sep_token"), END_TOKENS)
    if end_id is None:
        raise UserError(f"tokenizer '{kind}' has no end token: expected one of {', '.join(END_TOKENS)}, or eos_token "
                        "in a tokenizer_config.json beside it")
    return SubwordTokenizer(kind, model, end_id, find(("mask_token",), MASK_TOKENS))


def _parse(kind: str, model: str):
    library = _library()
    try:
        return library.Tokenizer.from_str(model)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer '{kind}' is not a Hugging Face tokenizer.json: {error}") from None


def _library():
    try:
        import tokenizers
    except ImportError:
        raise UserError("sub-word tokenizers need the package tokenizers: pip install tokenizers") from None
    return tokenizers
