"""BPE vocabularies of SentencePiece (Llama 2, Mistral, TinyLlama) as the JSON form of the library `tokenizers`.

SentencePiece joins the two neighbours whose joint piece has the best score; as an ordered list of merges that
is every pair of pieces whose joint is a piece, best scores first.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.untrusted_files import read_bytes

BPE = 2  # trainer_spec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces, also those of GGUF
SPACE = "▁"


class Unsupported(UserError):
    """A tokenizer of a kind that is not read; without texts the model can be used all the same."""


class Pieces(NamedTuple):
    """A vocabulary. prefix: a space before the first word. legacy: also behind every special token. exact: also where
    there is a space already, as SentencePiece does it (LlamaTokenizer of transformers does not). byte_fallback: unknown
    characters become their bytes."""

    tokens: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    prefix: bool
    legacy: bool
    exact: bool
    byte_fallback: bool


def read(path: Path, legacy: bool, exact: bool, add_prefix_space: Any) -> dict:
    """The JSON form of a tokenizer.model; see `Pieces` for its options. UserError for another file; Unsupported for
    other types, and without the package sentencepiece."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Unsupported(f"{path} is a SentencePiece vocabulary, which needs the packages sentencepiece and protobuf: "
                          "pip install sentencepiece protobuf, or put a tokenizer.json beside it") from None
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(read_bytes(path))
    except (OSError, DecodeError) as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error}") from None
    kind, normal = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind != BPE or normal.precompiled_charsmap or normal.remove_extra_whitespaces or not proto.pieces:
        raise Unsupported(f"{path} is a SentencePiece vocabulary of type {kind} with normalisation '{normal.name}', "
                          f"supported: type {BPE} (BPE) without any, as of Llama 2: put a tokenizer.json beside it")
    prefix = normal.add_dummy_prefix if add_prefix_space is None else bool(add_prefix_space)
    pieces = ([getattr(piece, field) for piece in proto.pieces] for field in ("piece", "score", "type"))
    return as_json(Pieces(*pieces, prefix=prefix, legacy=legacy, exact=exact,
                          byte_fallback=proto.trainer_spec.byte_fallback))


def as_json(pieces: Pieces) -> dict:
    """What a tokenizer.json would say."""
    unknown = next((i for i, kind in enumerate(pieces.kinds) if kind == UNKNOWN), None)
    added = [{"id": i, "content": token, "special": kind != USER_DEFINED, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False}
             for i, (token, kind) in enumerate(zip(pieces.tokens, pieces.kinds))
             if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    model = {"type": "BPE", "dropout": None, "unk_token": None if unknown is None else pieces.tokens[unknown],
             "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
             "byte_fallback": pieces.byte_fallback, "ignore_merges": False,
             "vocab": {token: i for i, token in enumerate(pieces.tokens)}, "merges": merges(pieces)}
    scheme = ("always" if pieces.legacy else "first") if pieces.prefix else "never"
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}]
    if pieces.prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    one_more = {"type": "Replace", "pattern": {"Regex": r"\A "}, "content": "  "}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": one_more if pieces.prefix and pieces.exact else None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
            "post_processor": None, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}


def merges(pieces: Pieces) -> list[tuple[str, str]]:
    """The pairs that a BPE joins, in the order of the scores of what they become."""
    ranks = {token: (-score, i) for i, (token, score, kind)
             in enumerate(zip(pieces.tokens, pieces.scores, pieces.kinds)) if kind == NORMAL and not math.isnan(score)}
    found = [(rank, len(token[:cut]), token[:cut], token[cut:]) for token, rank in ranks.items()
             for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
    return [(left, right) for *_, left, right in sorted(found)]
