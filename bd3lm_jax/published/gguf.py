"""GGUF files, quantised or not, as the published checkpoint that they were made from (needs the package gguf).

Queries and keys of a Llama are stored with the two halves of every head interleaved; here they are as published.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bd3lm_jax import log
from bd3lm_jax.data.tokenizers import SubwordTokenizer, Tokenizer
from bd3lm_jax.errors import UserError
from bd3lm_jax.published.leaf import require
from bd3lm_jax.published.tensors import Stored

ARCHITECTURES = ("llama", "qwen2", "qwen3")
NAMES = {  # of GGUF -> published
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
SIZES = {  # keys of config.json and of GGUF, behind the architecture
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens
SPLITS = {  # regular expressions that cut a text into words, by the name of the tokenizer; None: those of GPT-2
    "default": None, "gpt-2": None, "smollm": None,
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SINGLE_DIGITS = ("smollm",)


def open_gguf(path: Path) -> tuple[dict, dict[str, Stored]]:
    """What a config.json would say, and the tensors by their published names, dequantised to float32 when read.

    Raises UserError for unreadable files, other architectures and tensors of unknown meaning.
    """
    reader, values = _read(path)
    kind = values("general.architecture", "")
    require(kind in ARCHITECTURES, f"{path}: general.architecture is {kind!r}, supported: {', '.join(ARCHITECTURES)}")
    published = {key: values(f"{kind}.{name}") for key, name in SIZES.items()}
    missing = [SIZES[key] for key, value in published.items() if value is None]
    require(not missing, f"{path}: the key {kind}.{missing[0] if missing else ''} is missing")
    heads = published["num_attention_heads"]
    kv_heads = values(f"{kind}.attention.head_count_kv", heads)
    scaling = values(f"{kind}.rope.scaling.type", "none")
    require(scaling in ("none", "linear"), f"{path}: rope scaling {scaling!r}, supported: none, linear")
    stored = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        turn = {"attn_q": heads, "attn_k": kv_heads}.get(tensor.name.split(".")[-2]) if kind == "llama" else None
        stored[_published_name(path, tensor.name)] = Stored(
            shape, np.dtype(np.float32), functools.partial(_dequantised, tensor, shape, turn))
    published |= {
        "model_type": kind, "vocab_size": stored["model.embed_tokens.weight"].shape[0], "num_key_value_heads": kv_heads,
        "head_dim": values(f"{kind}.attention.key_length", published["hidden_size"] // heads),
        "rope_theta": values(f"{kind}.rope.freq_base", 1e4), "tie_word_embeddings": "lm_head.weight" not in stored,
        "rope_scaling": {"rope_type": "linear", "factor": values(f"{kind}.rope.scaling.factor")}
        if scaling == "linear" else None,
    }
    return published, stored


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The byte-level BPE in the file; None, with a note why, for a tokenizer of another kind."""
    _, values = _read(path)
    model, pre = values("tokenizer.ggml.model", ""), values("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in SPLITS:
        log.note(f"{path}: a tokenizer of kind {model!r}, {pre!r} is not read (supported: gpt2 with "
                 f"{', '.join(SPLITS)}): texts need a tokenizer.json")
        return None
    tokens, kinds = values("tokenizer.ggml.tokens"), values("tokenizer.ggml.token_type", [])
    content = _tokenizer_json(tokens, kinds, values("tokenizer.ggml.merges"), pre)
    end = values("tokenizer.ggml.eos_token_id", values("tokenizer.ggml.bos_token_id"))
    require(end is not None, f"{path} names no end token (tokenizer.ggml.eos_token_id)")
    return SubwordTokenizer(path.name, json.dumps(content), int(end), None)


def _tokenizer_json(tokens: list[str], kinds: list[int], merges: list[str], pre: str) -> dict:
    """What a Hugging Face tokenizer.json would say."""
    split = SPLITS[pre]
    steps = [{"type": "Digits", "individual_digits": True}] if pre in SINGLE_DIGITS else []
    if split is not None:
        steps.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split is None}
    added = [{"id": i, "content": token, "special": kind == CONTROL, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False}
             for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind in (CONTROL, USER_DEFINED)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, bytes_]}, "post_processor": None,
        "decoder": {**bytes_, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }


def _read(path: Path) -> tuple[Any, Callable]:
    """The reader of the package gguf, and `values(key, default)`."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path} is a GGUF file, which needs the package gguf: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"cannot read {path} ({error}): download it again; expected a GGUF file") from None

    def values(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()
    return reader, values


def _published_name(path: Path, name: str) -> str:
    *front, plain, part = name.split(".")
    known = plain in NAMES and part in ("weight", "bias") and (not front or front[0] == "blk" and len(front) == 2)
    require(known, f"{path}: tensor {name} is not known")
    return f"model.layers.{front[1]}.{NAMES[plain]}.{part}" if front else f"{NAMES[plain]}.{part}"


def _dequantised(tensor: Any, shape: tuple[int, ...], heads: int | None) -> np.ndarray:
    from gguf.quants import dequantize

    x = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
    if heads is None:
        return x
    return x.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
