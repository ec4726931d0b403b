"""GGUF files, quantised or not, as the published checkpoint that they were made from (needs the package gguf).

Queries and keys of a Llama are stored with the two halves of every head interleaved; here they are as published.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bd3lm_jax.checkpoints.published.llama import EMBED, HEAD, LLAMA3_KEYS, THETA
from bd3lm_jax.checkpoints.published.mapping import require
from bd3lm_jax.checkpoints.published.tensors import DOWNLOAD_AGAIN, LazyTensor
from bd3lm_jax.core import log
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.untrusted_files import open_regular
from bd3lm_jax.data import sentence_pieces
from bd3lm_jax.data.tokenizer_files import SPLITS
from bd3lm_jax.data.tokenizers import SubwordTokenizer, Tokenizer
from bd3lm_jax.models.llama import llama3_frequencies, rope_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
NAMES = {  # of GGUF -> published
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
TENSOR = re.compile(r"(?:blk\.([0-9]+)\.)?(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1 and later divide the frequencies of RoPE by
LLAMA3_VALUES = (1.0, 4.0, 8192)  # of LLAMA3_KEYS but the first, in all releases; a GGUF file does not say them
SIZES = {  # keys of config.json and of GGUF, behind the architecture
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
READ = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base",
        "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned", "vocab_size",
        "rope.scaling.original_context_length", "tensor_data_layout")  # behind the architecture, beside SIZES
PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # kinds of tokens
PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> key of SPLITS, in families that llama.cpp treats alike
    **dict.fromkeys(("default", "gpt-2", "phi-2", "gigachat", "mellum"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "gpt2"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), "qwen2"),
}
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls",
                  "mask": "mask"}  # of a tokenizer_config.json -> tokenizer.ggml, as it is spelt there
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
WITHOUT_PRE = {"qwen2": "qwen2", "qwen3": "qwen2"}  # architecture -> what old files, which do not name it, have
SUPPORTED = f"llama with scores, and gpt2 with {', '.join(PRE_TOKENIZERS)}"


def open_gguf(path: Path) -> tuple[dict, dict[str, LazyTensor]]:
    """What a config.json would say, and the tensors by their published names, dequantised to float32 when read.

    Raises UserError for unreadable files, other architectures, missing keys and tensors of unknown meaning.
    """
    path = parts_of(path)[0]
    reader, value = _read(path)
    kind = value("general.architecture", str, "")
    require(kind in ARCHITECTURES, f"{path}: general.architecture is {kind!r}, supported: {', '.join(ARCHITECTURES)}")
    published = {key: value(f"{kind}.{name}", float if key.endswith("eps") else int) for key, name in SIZES.items()}
    heads = published["num_attention_heads"]
    kv_heads = value(f"{kind}.attention.head_count_kv", int, heads)
    require(heads > 0 and kv_heads > 0, f"{path}: {kind}.attention.head_count is {heads}, head_count_kv {kv_heads}, "
            "expected at least 1")
    _check_keys(path, kind, reader)
    tensors = _tensors_of(path)
    factors = tensors.pop(ROPE_FACTORS, None)
    stored = {}
    for name, (shape, tensor) in tensors.items():
        published_name, part = _published_name(path, name)
        interleaved_heads = {"attn_q": heads, "attn_k": kv_heads}.get(part) if kind == "llama" else None
        stored[published_name] = LazyTensor(shape, np.dtype(np.float32),
                                            functools.partial(_dequantised, path, tensor, shape, interleaved_heads))
    require(EMBED in stored and len(stored[EMBED].shape) == 2,
            f"{path}: tensor token_embd.weight {'is no matrix' if EMBED in stored else 'is missing'}: "
            f"{DOWNLOAD_AGAIN}; expected the embeddings of its tokens")
    published |= {
        "model_type": kind, "vocab_size": stored[EMBED].shape[0], "num_key_value_heads": kv_heads,
        "head_dim": value(f"{kind}.attention.key_length", int, published["hidden_size"] // heads),
        "rope_theta": value(f"{kind}.rope.freq_base", float, THETA), "tie_word_embeddings": HEAD not in stored,
    }
    _check_head(path, kind, published["head_dim"], value)
    published["rope_scaling"] = _rope_scaling(path, kind, value, published, factors and _dequantised(
        path, factors[1], factors[0], None))
    return published, stored


def _rope_scaling(path: Path, kind: str, value: Callable, published: dict, factors: np.ndarray | None) -> dict | None:
    """`rope_scaling` of config.json. factors: of ROPE_FACTORS, None if the file has none."""
    scaling = value(f"{kind}.rope.scaling.type", str, "none")
    require(scaling in ("none", "linear"), f"{path}: rope scaling {scaling!r}, supported: none, linear")
    if scaling == "linear":
        require(factors is None, f"{path} has both a linear rope scaling and {ROPE_FACTORS}, expected one of them")
        return {"rope_type": "linear", "factor": value(f"{kind}.rope.scaling.factor", float)}
    if factors is None:
        return None
    head_dim, theta = published["head_dim"], published["rope_theta"]
    is_llama3 = head_dim % 2 == 0 and factors.shape == (head_dim // 2,) and np.all(factors >= 1) and theta > 1
    scaled = {}
    if is_llama3:
        scaled = {"rope_type": "llama3", **dict(zip(LLAMA3_KEYS, (float(factors.max()), *LLAMA3_VALUES)))}
        plain = rope_frequencies(head_dim, theta)
        expected = plain / llama3_frequencies(plain, *(scaled[key] for key in LLAMA3_KEYS))
        is_llama3 = np.allclose(factors, expected, rtol=1e-4)
    require(
        is_llama3, f"{path}: {ROPE_FACTORS} is not the frequency scaling of Llama 3.1 to 3.3: take the safetensors of "
        "this model, whose config.json says what its scaling is")
    return scaled


def first_parts(files: Sequence[Path]) -> list[Path]:
    """The files that are no later part of a split one."""
    return [file for file in files if (found := PART.fullmatch(file.name)) is None or int(found[2]) == 1]


def parts_of(path: Path) -> list[Path]:
    """All files of a split GGUF (`name-00001-of-00003.gguf`), given one of them, in order; else the one.

    UserError naming those that are not there.
    """
    found = PART.fullmatch(path.name)
    if found is None:
        return [path]
    names = [f"{found[1]}-{number:05}-of-{found[3]}{path.suffix}" for number in range(1, int(found[3]) + 1)]
    missing = [name for name in names if not path.with_name(name).is_file()]
    require(not missing, f"{path} is one of {len(names)} parts, and {', '.join(missing[:6])} "
            f"{'is' if len(missing) == 1 else 'are'} not there: download all of them")
    return [path.with_name(name) for name in names]


def _tensors_of(path: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name -> shape and tensor of a file or of all its parts."""
    found = {}
    for part in parts_of(path):
        reader, value = _read(part)
        split = value("split.count", int, 1)
        require(split < 2 or PART.fullmatch(part.name) is not None, f"{part} is one of {split} parts and has lost its "
                "name: call them NAME-00001-of-0000N.gguf, all in one directory")
        for tensor in reader.tensors:
            require(tensor.name not in found, f"{part}: tensor {tensor.name} is in another part as well")
            found[tensor.name] = tuple(int(n) for n in reversed(tensor.shape)), tensor
    return found


def _check_keys(path: Path, kind: str, reader: Any) -> None:
    """UserError for a key of the architecture that is not read and switches something on."""
    for key in reader.fields:
        name = key.removeprefix(f"{kind}.")
        if name == key or name in (*SIZES.values(), *READ):
            continue
        found = reader.get_field(key).contents()
        require(found in (0, None, False, "", []), f"{path}: the key {key} is {found!r:.60}, which may change what the "
                "network computes and is not known: take the safetensors of this model")


def _check_head(path: Path, kind: str, head_dim: int, value: Callable) -> None:
    """UserError for values of another size than keys, and for a RoPE that turns a part of a head."""
    for name in ("attention.value_length", "rope.dimension_count"):
        other = value(f"{kind}.{name}", int, head_dim)
        require(other == head_dim, f"{path}: {kind}.{name} is {other}, expected {head_dim}, the numbers of a head: "
                "take the safetensors of this model")


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The byte-level BPE or SentencePiece vocabulary in the file; None, with a note why, for one of another kind."""
    path = parts_of(path)[0]
    _, value = _read(path)
    model, pre = value("tokenizer.ggml.model", str, ""), value("tokenizer.ggml.pre", str, "default")
    scores = value("tokenizer.ggml.scores", [float], [])
    if not (model == "gpt2" and pre in PRE_TOKENIZERS or model == "llama" and scores):
        log.note(f"{path}: a tokenizer of kind {model!r}, {pre!r} is not read (supported: {SUPPORTED}): texts need a "
                 "tokenizer.json")
        return None
    if model == "gpt2" and pre == "default":
        pre = WITHOUT_PRE.get(value("general.architecture", str, ""), pre)
        if pre == "default":
            log.note(f"{path} does not name how its tokenizer splits words (tokenizer.ggml.pre): taken to be that of "
                     "GPT-2; where the model's differs, texts get other tokens than it was trained on")
    tokens, kinds = value("tokenizer.ggml.tokens", [str]), value("tokenizer.ggml.token_type", [int], [])
    if model == "llama":
        require(len(tokens) == len(scores) == len(kinds), f"{path} has {len(tokens)} tokens, {len(scores)} scores and "
                f"{len(kinds)} kinds of them (tokenizer.ggml.tokens, scores, token_type), expected as many of each")
        content = sentence_pieces.as_json(sentence_pieces.Pieces(
            tokens, scores, kinds, prefix=value("tokenizer.ggml.add_space_prefix", bool, True),
            legacy=True, exact=True, byte_fallback=BYTE in kinds))
    else:
        content = _tokenizer_json(tokens, kinds, value("tokenizer.ggml.merges", [str]), pre)
    end = value("tokenizer.ggml.eos_token_id", int, value("tokenizer.ggml.bos_token_id", int, None))
    require(end is not None, f"{path} names no end token (tokenizer.ggml.eos_token_id)")
    mask = value("tokenizer.ggml.mask_token_id", int, None)
    for name, i in (("end", end), ("mask", mask)):
        require(i is None or 0 <= i < len(tokens), f"{path}: the {name} token is {i} (tokenizer.ggml."
                f"{'eos' if name == 'end' else 'mask'}_token_id), expected one of the {len(tokens)} ids of "
                "tokenizer.ggml.tokens")
    return SubwordTokenizer(path.name, json.dumps(content), end, mask)


def token_ids(path: Path) -> dict[str, int]:
    """Begin, end and padding token of the file, by the keys of a config.json."""
    _, value = _read(parts_of(path)[0])
    found = {f"{key}_token_id": value(f"tokenizer.ggml.{name}_token_id", int, None)
             for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    return {key: i for key, i in found.items() if i is not None}


def chat_config(path: Path) -> dict[str, Any]:
    """What a tokenizer_config.json would say of dialogues: the chat templates, and the tokens that they may write."""
    _, value = _read(parts_of(path)[0])
    tokens = value("tokenizer.ggml.tokens", [str], [])
    ids = {key: value(f"tokenizer.ggml.{name}_token_id", int, -1) for key, name in SPECIAL_TOKENS.items()}
    found: dict[str, Any] = {f"{key}_token": tokens[i] for key, i in ids.items() if 0 <= i < len(tokens)}
    usual = value("tokenizer.chat_template", str, None)
    names = value("tokenizer.chat_templates", [str], [])
    named = {name: value(f"tokenizer.chat_template.{name}", str) for name in names}
    if named:
        named = ({} if usual is None else {"default": usual}) | named
        return found | {"chat_template": [{"name": name, "template": text} for name, text in named.items()]}
    return found if usual is None else found | {"chat_template": usual}


def _tokenizer_json(tokens: list[str], kinds: list[int], merges: list[str], pre: str) -> dict:
    """What a Hugging Face tokenizer.json would say."""
    family = PRE_TOKENIZERS[pre]
    split = SPLITS[family]
    steps = [{"type": "Digits", "individual_digits": True}] if pre in SINGLE_DIGITS else []
    if split is not None:
        steps.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split is None}
    added = [{"id": i, "content": token, "special": kind == CONTROL, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False}
             for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind in (CONTROL, USER_DEFINED)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if family == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, bytes_]}, "post_processor": None,
        "decoder": {**bytes_, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
                  **({"ignore_merges": True} if family == "llama3" else {})},  # a word that is a token is that token
    }


def _read(path: Path) -> tuple[Any, Callable]:
    """The reader of the package gguf, and `value(key, kind, default)`: of that type ([type]: a list of them), an error
    if it is another, or missing and no default is given."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path} is a GGUF file, which needs the package gguf: pip install gguf") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, *args, **kwargs):  # theirs goes on with less than it asked for
            if int(offset) + np.dtype(dtype).itemsize * int(count) > self.data.size:
                raise ValueError(f"it ends after {self.data.size} bytes, before its content does")
            return super()._get(offset, dtype, count, *args, **kwargs)

    try:
        with open_regular(path), np.errstate(over="raise"):
            reader = Reader(path)
    except (ArithmeticError, LookupError, MemoryError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}): {DOWNLOAD_AGAIN}; expected a GGUF file"
                        ) from None

    def value(key: str, kind: Any, *default: Any) -> Any:
        field = reader.get_field(key)
        require(field is not None or default, f"{path}: the key {key} is missing")
        try:
            found = default[0] if field is None else field.contents()
        except (LookupError, ValueError) as error:
            raise UserError(f"{path}: the key {key} cannot be read ({error}): {DOWNLOAD_AGAIN}") from None
        if field is not None and not _has_type(found, kind):
            type_name = f"a list of {kind[0].__name__}" if isinstance(kind, list) else kind.__name__
            raise UserError(f"{path}: the key {key} is {found!r:.60}, expected {type_name}")
        return found
    return reader, value


def _has_type(x: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(x, list) and all(type(item) is kind[0] for item in x)
    return type(x) is kind or kind is float and type(x) is int


def _published_name(path: Path, name: str) -> tuple[str, str]:
    """The published name of a tensor, and what it is."""
    found = TENSOR.fullmatch(name)
    if found is None or found[2] not in NAMES:
        raise UserError(f"{path}: tensor {name!r:.100} is not known: take the safetensors of this model")
    layer, part, kind = found.groups()
    return f"{'' if layer is None else f'model.layers.{layer}.'}{NAMES[part]}.{kind}", part


def _dequantised(path: Path, tensor: Any, shape: tuple[int, ...], heads: int | None) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        x = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
    except NotImplementedError:
        raise UserError(f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}, which the package gguf "
                        "cannot read: take another file of this model") from None
    if heads is None:
        return x
    return x.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
