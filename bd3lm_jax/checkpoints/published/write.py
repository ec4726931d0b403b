"""A directory in Hugging Face layout: written beside its place and renamed into it when it is whole."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from bd3lm_jax.checkpoints.published.mapping import ParamMapping, require
from bd3lm_jax.checkpoints.published.tensors import INDEX_FILE, WEIGHTS_FILE, cast_or_raise, write_file
from bd3lm_jax.core import files, workspace
from bd3lm_jax.data.tokenizers import MASK_TOKENS

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
PLAIN = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token: it is taken as it is written
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Tensor(NamedTuple):
    """A tensor to be written: what it takes in its file, and how to have it."""

    name: str
    num_bytes: int
    make: Callable[[], np.ndarray]


def parse_size(text: str) -> int:
    """"5GB" -> bytes."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = round(float(number) * UNITS[unit])
    except (KeyError, ValueError):
        size = 0
    require(size > 0, f"{text!r} is no size, expected a number and {', '.join(UNITS)}, e.g. 5GB")
    return size


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` if nothing fails and is gone otherwise, with the parents made for it.

    Raises UserError if `target` exists, RunError if the disk is full or cannot be written.
    """
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        with files.errors(target, "choose another directory"):
            _require_absent(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            with workspace.directory(target, "writes the same directory") as work:
                _require_absent(target)  # another process may have been faster
                yield work
                workspace.rename_into_place(work, target)
    finally:
        for parent in new_parents:
            with contextlib.suppress(OSError):  # not empty, as after a success
                parent.rmdir()


def _require_absent(target: Path) -> None:
    require(not target.exists(), f"{target} exists and is never overwritten: choose another directory")


def tensors_of(leaves: dict[str, ParamMapping], params: Mapping[str, jax.Array], dtype: np.dtype) -> list[Tensor]:
    """The published tensors of our parameters, in `dtype`. Each is cut out of its stack when it is made."""
    require(leaves.keys() == params.keys(), "the network has parameters that its published layout does not know: "
            f"{', '.join(sorted(params.keys() ^ leaves.keys())[:6])}")
    tensors = []
    for path, leaf in leaves.items():
        for place, name in zip(np.ndindex(*leaf.stacked), leaf.sources(), strict=True):
            def make(path=path, leaf=leaf, place=place, name=name):
                return cast_or_raise(name, leaf.write(np.asarray(params[path][place])), dtype)
            tensors.append(Tensor(name, math.prod(leaf.shape) * dtype.itemsize, make))
    return tensors


def constant_tensors(constants: Mapping[str, np.ndarray]) -> list[Tensor]:
    """Tensors that keep their own dtype: rounded ones would say something else."""
    return [Tensor(name, x.nbytes, lambda x=x: x) for name, x in constants.items()]


def write_tensors(directory: Path, tensors: list[Tensor], max_shard: int) -> None:
    """Files of at most `max_shard` bytes of tensors, or of one tensor; with an index if there are several.

    One file's tensors are in memory at a time. Raises UserError for a value that overflows.
    """
    shards = [[]]
    for tensor in tensors:
        if shards[-1] and sum(x.num_bytes for x in shards[-1]) + tensor.num_bytes > max_shard:
            shards.append([])
        shards[-1].append(tensor)
    count, stem = len(shards), WEIGHTS_FILE.partition(".")[0]
    names = [WEIGHTS_FILE] if count == 1 else [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards):
        write_file(directory / name, {tensor.name: tensor.make() for tensor in shard})
    if count > 1:
        places = {tensor.name: name for name, shard in zip(names, shards) for tensor in shard}
        index = {"metadata": {"total_size": sum(x.num_bytes for x in tensors)}, "weight_map": places}
        write_json(directory / INDEX_FILE, index)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tokenizer_files(tokenizer: Any, masks: bool) -> dict[str, bytes]:
    """Name -> content of the files that bring a tokenizer: Hugging Face's where it is one of theirs, else our own.

    masks: the network fills in masks, so that the mask is one of its tokens, under a name where it has none.
    """
    content = json.loads(tokenizer.to_bytes())
    if "model" not in content:
        return {"tokenizer.json": tokenizer.to_bytes()}
    vocabulary = json.loads(content["model"])
    tokens = {i: token for token, i in _vocab(vocabulary).items()}
    added = _mask_tokens(tokens, tokenizer.mask_id) if masks else {}
    if added:
        vocabulary["added_tokens"] = [*(vocabulary.get("added_tokens") or ()), *(
            {"id": i, "content": token, "special": True, **dict.fromkeys(PLAIN, False)} for i, token in added.items())]
        tokens |= added
    special_names = {"eos_token": tokens.get(tokenizer.end_id), "pad_token": tokens.get(tokenizer.end_id),
                     "mask_token": tokens.get(tokenizer.mask_id)}
    special = {key: token for key, token in special_names.items() if token}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    model = json.dumps(vocabulary, ensure_ascii=False) if added else content["model"]
    return {"tokenizer.json": model.encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            "special_tokens_map.json": json.dumps(special, indent=2).encode()}


def _mask_tokens(tokens: dict[int, str], mask_id: int) -> dict[int, str]:
    """Ids and names that a vocabulary lacks up to the mask: added tokens are numbered without holes."""
    if mask_id < 0 or mask_id in tokens:
        return {}
    mask = next(name for name in reversed(MASK_TOKENS) if name not in tokens.values())
    return {i: mask if i == mask_id else f"<|unused_{i}|>" for i in range(max(tokens, default=-1) + 1, mask_id + 1)}


def _vocab(model: dict) -> dict[str, int]:
    inner = model["model"]["vocab"]
    plain = inner if isinstance(inner, dict) else {token: i for i, (token, _) in enumerate(inner)}
    return plain | {token["content"]: token["id"] for token in model.get("added_tokens", ())}
