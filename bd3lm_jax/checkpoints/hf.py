"""The door for published checkpoints (Hugging Face layout, GGUF): in and out, strictly.

Which architectures: `published.FORMATS`. Every tensor of a checkpoint is used exactly once; anything missing, left
over or misshapen is an error. What is written is whole or not there.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bd3lm_jax import models
from bd3lm_jax.checkpoints.published import FORMATS, NETWORKS, OWN_MODEL_TYPES, ModelSpec, gguf, write
from bd3lm_jax.checkpoints.published.keys import check_quantised, check_unread
from bd3lm_jax.checkpoints.published.mapping import ParamMapping, require
from bd3lm_jax.checkpoints.published.read import (
    check_averages,
    check_tensors,
    match_prefix,
    normalized_names,
    read_params,
)
from bd3lm_jax.checkpoints.published.tensors import LazyTensor, is_gguf
from bd3lm_jax.checkpoints.published.weights import open_directory
from bd3lm_jax.core import compile_cache, jax_settings, paths
from bd3lm_jax.core.errors import UserError, lookup
from bd3lm_jax.core.typed import from_json
from bd3lm_jax.core.untrusted_files import read_text
from bd3lm_jax.data.chat_template import CONFIG_READERS
from bd3lm_jax.data.tokenizers import FINDERS, READERS, Tokenizer, tokenizer_of
from bd3lm_jax.models import trunk
from bd3lm_jax.parallel import sharding

CONFIG_FILE = "config.json"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
OWN_PREFIX = "bd3lm_"  # begins the model_type of a network that sees other tokens than its architecture elsewhere
FILES = (".gguf", ".json", ".jsonl", ".safetensors", ".bin", ".pt", ".ckpt", ".txt", ".py", ".zip")  # no model's name
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
RUNS = "runs"  # where run directories usually are
DTYPES = ("float32", "bfloat16")  # that parameters may have
LAYER_KEYS, MAX_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "n_blocks"), 10_000
MAX_CONTEXT = 1 << 27  # tokens
MAX_MISSING = 10_000  # tensors that a config.json may name beyond those that are there, to be named in an error


def is_published(path: str | os.PathLike) -> bool:
    """Whether `path` is a published checkpoint: a GGUF file, or a directory whose config.json has a model_type.

    UserError if its config.json is not JSON.
    """
    path = Path(path)
    if is_gguf(path):
        return True
    config = path / CONFIG_FILE
    if not config.is_file():
        return False
    try:
        content = from_json(read_text(config))
    except OSError as error:
        raise UserError(f"{config} cannot be read ({error})") from None
    except ValueError as error:
        raise UserError(f"{config} is not valid JSON ({error})") from None
    return isinstance(content, dict) and "model_type" in content


def read_model(path: str | os.PathLike, *, dtype: str = "float32", weights: str = "ema",
               mesh: jax.sharding.Mesh | None = None, allow_pickle: bool = False) -> tuple[ModelSpec, dict]:
    """A published network: what it is, and its parameters.

    The parameters have the tree and shapes of `trunk.init`: layers stacked, vocabulary padded with zeros. They are read
    one after the other, each device its own part.

    path: a directory, or a GGUF file. dtype: of the parameters, one of DTYPES. weights: "ema" or "params", where both
    are there. mesh: where the parameters lie, by `models.sharding_rules`; None for the first device. allow_pickle: read
    the tensors of pickled files as well.

    Raises:
        UserError: unreadable files, an unsupported architecture, or tensors that are not exactly the expected ones.
    """
    compile_cache.enable()
    require(dtype in DTYPES, f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    require(weights in ("ema", "params"), f"weights are {weights!r}, expected 'ema' or 'params'")
    config_path, published, form, weights_path, stored = _open(Path(path), allow_pickle)
    tensors, averaged = normalized_names(weights_path, stored, weights, getattr(form, "rename", str))
    described = _model_spec(config_path, published, form, tensors)
    with _plausible_config(config_path, published):
        require(described.length <= MAX_CONTEXT, f"{config_path}: the context is {described.length:,} tokens, "
                f"expected at most {MAX_CONTEXT:,}")
        leaves = form.layout(described.model)
        _check_counts(config_path, leaves, len(tensors))
        expected = {name for leaf in leaves.values() for name in leaf.sources()}
        tensors, averaged = match_prefix(tensors, averaged, expected)
        buffer_shapes = form.buffer_shapes(described.model, set(tensors))
        check_tensors(weights_path, tensors, buffer_shapes | {name: leaf.shape for leaf in leaves.values()
                                                              for name in leaf.sources()})
    check_averages(weights_path, averaged, leaves)
    form.check_buffers(weights_path, described.model, {name: tensors[name].read() for name in buffer_shapes})
    shardings = None if mesh is None else _shardings(described.model, mesh)
    params = read_params(weights_path, leaves, tensors, jnp.dtype(dtype), shardings)
    return described, unflatten_dict({tuple(at.split(".")): x for at, x in params.items()})


def read_tokenizer(path: str | os.PathLike, described: ModelSpec) -> Tokenizer | None:
    """The tokenizer that a published checkpoint brings, None if there is none.

    Its mask is that of `with_network_mask`. UserError if it has ids beyond the vocabulary of the network.
    """
    path = Path(path)
    if is_gguf(path):
        tokenizer = gguf.read_tokenizer(path)
    else:
        tokenizer = tokenizer_of(path)
    vocab = described.model.vocab_size
    require(tokenizer is None or tokenizer.size <= vocab, f"{path}: the vocabulary of the network has {vocab} ids, "
            f"fewer than the {tokenizer and tokenizer.size} of its tokenizer: use the one that it was trained with")
    return tokenizer and with_network_mask(tokenizer, described)


def with_network_mask(tokenizer: Tokenizer, described: ModelSpec) -> Tokenizer:
    """The tokenizer with the mask of a network: what that names, else one that is in the vocabulary of the tokenizer,
    else -1. A row behind that vocabulary is padding that the network never read: only one that masks nothing may have
    its id, which no text has."""
    own_names = vocabulary_mask_id(tokenizer) if described.objective.uses_mask_token else tokenizer.mask_id
    mask_id = described.mask_id if described.mask_id >= 0 else own_names
    return tokenizer.with_mask(mask_id if mask_id < described.model.vocab_size else -1)


def vocabulary_mask_id(tokenizer: Tokenizer) -> int:
    """The mask token in the vocabulary of a tokenizer; -1 where it has none and would get one on top."""
    return tokenizer.mask_id if tokenizer.mask_id < tokenizer.size else -1


def local(path: str | os.PathLike) -> str:
    """`path`, of a directory that holds a GGUF file this one; or, where it does not exist, the local copy of the model
    of this name ("organisation/name", "gpt2") on the Hugging Face Hub. What would be in RUNS is never looked for there.
    """
    path = paths.local(path)
    if not Path(path).exists() and _is_hub_name(path):
        path = download(path)
        require(is_published(path) or bool(gguf_files(path)), f"the model in {path} has no {CONFIG_FILE}: download the "
                "GGUF file or the directory that you want, and give its path")
    return gguf_in(path)


def _is_hub_name(name: str) -> bool:
    """Whether a path that does not exist can be the name of a model on the Hub: "organisation/name" where there is no
    directory "organisation", or one of the first models, whose names have one part ("gpt2")."""
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", name) or name.lower().endswith(FILES):
        return False
    parent = Path(name).parent
    return "/" not in name or not parent.exists() and parent.name != RUNS


def gguf_in(path: str) -> str:
    """`path`, or the GGUF file in a directory that holds no config.json. UserError where there are several."""
    if not Path(path).is_dir() or (Path(path) / CONFIG_FILE).exists():
        return path
    found = gguf.first_parts(gguf_files(path))
    require(len(found) < 2, f"{path} holds several GGUF files ({', '.join(file.name for file in found[:4])}): give the "
            "path of one")
    return str(found[0]) if found else path


def gguf_files(directory: str) -> list[Path]:
    """Those of a directory, in order."""
    return sorted(path for path in Path(directory).iterdir() if is_gguf(path))


def download(name: str) -> str:
    """The local directory of "organisation/name" on the Hugging Face Hub, fetched if it is not there yet.

    UserError if huggingface_hub is not installed, or the model cannot be had.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"no run directory {name}; to take it from the Hugging Face Hub: pip install huggingface_hub, "
                        "or download the model there and give its directory") from None
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES), etag_timeout=10)
    except Exception as error:  # the network and the Hub raise many kinds; all of them mean: not fetched
        first = f"{error}\n".strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(f"no run directory {name}, and the Hugging Face Hub did not give a model of this name "
                        f"({type(error).__name__}: {first}): check name and network, or give the directory of a "
                        "downloaded model") from None


def from_hf_config(path: str | os.PathLike) -> ModelSpec:
    """What a published checkpoint is, without its weights. UserError as for `read_model`."""
    config_path, published, form, weights_path, stored = _open(Path(path), False)
    tensors, _ = normalized_names(weights_path, stored, "ema", getattr(form, "rename", str))
    return _model_spec(config_path, published, form, tensors)


def _model_spec(config_path: Path, published: dict, form: ModuleType, tensors: dict[str, LazyTensor]) -> ModelSpec:
    with _plausible_config(config_path, published):
        described = form.from_hf_config(config_path, published,
                                        {name: x.read() for name, x in tensors.items() if not x.shape})
        check_unread(config_path, published, (*form.CONFIG_KEYS, *getattr(form, "CHOICES", ()), *form.READ))
    return described


def _check_counts(path: Path, leaves: dict[str, ParamMapping], stored: int) -> None:
    """UserError, before any name is made, where layers times experts are far more than the tensors that are there."""
    count = sum(math.prod(leaf.stacked) for leaf in leaves.values())
    require(count <= stored + MAX_MISSING, f"{path} describes a network of {count:,} tensors (layers, experts), and "
            f"the files hold {stored:,}: it is not the config.json of these weights")


@contextlib.contextmanager
def _plausible_config(path: Path, published: dict) -> Iterator[None]:
    """UserError in place of what arithmetic on an absurd config.json raises; formats check only what is often wrong."""
    layers = [published[key] for key in LAYER_KEYS if key in published]
    require(all(type(number) is int and 0 <= number <= MAX_LAYERS for number in layers),
            f"{path}: the number of layers is {layers}, expected 0 to {MAX_LAYERS}")
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes no '{published['model_type']}' network ({type(error).__name__}: {error}): "
                        "the value of a key is of a kind or size that published ones never are") from error


def read_config(path: Path) -> tuple[dict, ModuleType]:
    """The content of a config.json and the format that it names."""
    try:
        published = from_json(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): expected the config.json of a published checkpoint") from None
    kind = published.get("model_type") if isinstance(published, dict) else None
    kind = kind.removeprefix(OWN_PREFIX) if isinstance(kind, str) else kind
    inner = published.get("text_config") if isinstance(published, dict) else None
    hint = " (its text_config is that of a model for text: take that model alone)" if isinstance(inner, dict) else ""
    if not isinstance(kind, str) or kind not in FORMATS:
        raise UserError(f"{path}: model_type is {kind!r}{hint}, supported: {', '.join(FORMATS)}")
    return published | {"model_type": kind}, FORMATS[kind]


def _open(path: Path, allow_pickle: bool) -> tuple[Path, dict, ModuleType, Path, dict[str, LazyTensor]]:
    """Where the config is, what it says, its format; where the tensors are, and these by name."""
    if is_gguf(path):
        published, tensors = gguf.open_gguf(path)
        return path, published, FORMATS[published["model_type"]], path, tensors
    published, form = read_config(path / CONFIG_FILE)
    check_quantised(path, published, ())
    weights_path, tensors = open_directory(path, allow_pickle)
    check_quantised(weights_path, published, tensors)
    return path / CONFIG_FILE, published, form, weights_path, tensors


def _shardings(config, mesh: jax.sharding.Mesh) -> dict[str, jax.sharding.NamedSharding]:
    abstract = jax.eval_shape(lambda: trunk.init(models.build(config, jnp.float32), jax_settings.key(0)))
    return cast(dict, flatten_dict(sharding.param_shardings(abstract, mesh, models.sharding_rules(config)), sep="."))


def write_model(target: str | os.PathLike, described: ModelSpec, params: dict, *, dtype: str, max_shard: int,
                model_type: str | None, files: dict[str, bytes],
                token_ids: Mapping[str, int | list[int] | None] = MappingProxyType({})) -> dict[str, int | str]:
    """Write a network as a directory in Hugging Face layout: config.json, safetensors and `files`.

    params: the tree of `trunk.init`, on any mesh. dtype: of the written parameters, one of `write.DTYPES`. max_shard:
    bytes a file. model_type: the layout, None for the usual one of such a network. files: name -> content of what else
    belongs there. token_ids: keys of config.json like "eos_token_id". Nothing is there before all of it is.

    A network that sees other tokens than its architecture does elsewhere gets a model_type of ours, so that no other
    software takes it for what it is not.

    Returns tensors (how many), bytes (theirs) and path. Raises UserError if the target exists, the layout cannot say
    what the network is, or a value overflows; RunError if the disk is full.
    """
    require(dtype in write.DTYPES, f"dtype is {dtype!r}, expected one of {', '.join(write.DTYPES)}")
    published, form = _published(described, model_type)
    own_names = _own_model_type(published) if _computes_other_logits(published, form, described) else {}
    published = {**token_ids, **published, **own_names}
    leaves = form.layout(described.model)
    flat: dict[str, Any] = {".".join(path): x for path, x in flatten_dict(params).items()}
    constants = form.constants(described.model, described.objective) if hasattr(form, "constants") else {}
    tensors = write.tensors_of(leaves, flat, write.DTYPES[dtype]) + write.constant_tensors(constants)
    with write.atomic_directory(Path(target)) as work:
        write.write_tensors(work, tensors, max_shard)
        write.write_json(work / CONFIG_FILE, published | {"torch_dtype": dtype})
        for name, content in files.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(content)
    return {"tensors": len(tensors), "bytes": sum(tensor.num_bytes for tensor in tensors), "path": str(target)}


def _computes_other_logits(published: dict, form: ModuleType, described: ModelSpec) -> bool:
    """Whether other implementations of this model_type would compute other logits: by who sees whom, or shifted."""
    kind, objective = published["model_type"], described.objective
    if kind in OWN_MODEL_TYPES:
        return False
    if kind in getattr(form, "CAUSAL", ()):
        return not objective.causal or bool(described.model.target_shift)
    return not objective.causal and objective.block_size < described.length


def _own_model_type(published: dict) -> dict:
    stem = re.split("For|LMHead|Model", published["architectures"][0])[0]
    return {"model_type": OWN_PREFIX + published["model_type"], "architectures": [f"{stem}ForBlockDiffusion"]}


def token_ids(source: Path) -> Mapping[str, int | list[int]]:
    """The end, begin and padding tokens of a published checkpoint, each an id or a list of ids, by their keys."""
    if is_gguf(source):
        return gguf.token_ids(source)
    published = read_config(source / CONFIG_FILE)[0]
    return {key: published[key] for key in TOKEN_IDS if _are_ids(published.get(key))}


def _are_ids(x: Any) -> bool:
    return type(x) is int and x >= 0 or isinstance(x, list) and bool(x) and all(type(i) is int and i >= 0 for i in x)


def layout_name(directory: Path) -> str:
    """The layout of a published directory, as `write_model` takes it."""
    return read_config(directory / CONFIG_FILE)[0]["model_type"]


def _published(described: ModelSpec, model_type: str | None) -> tuple[dict, ModuleType]:
    """config.json and format of a network. UserError if reading it back would give another network or objective."""
    model, objective, length, mask_id = described
    form = FORMATS[model_type] if model_type else lookup(NETWORKS, model.kind, "published layout of a network of kind")
    published = form.to_hf_config(model, objective, length)
    scalars = {name: x for name, x in (form.constants(model, objective) if hasattr(form, "constants") else {}).items()
               if not x.shape}
    if mask_id >= 0 and form.from_hf_config(CONFIG_FILE, published, scalars).mask_id != mask_id:
        published["mask_token_id"] = mask_id
    back = form.from_hf_config(CONFIG_FILE, published, scalars)
    if back.model.dropout == 0:  # only for training, and most layouts do not name it
        described = described._replace(model=dataclasses.replace(model, dropout=0.0))
    lossy_fields = [
        f"{name} {before!r} would be read back as {after!r}"
        for name, before, after in zip(ModelSpec._fields, described, back)
        if before != after and not (name == "mask_id" and before < 0)
    ]
    require(not lossy_fields,
            f"the layout '{published['model_type']}' cannot say what this model is: {'; '.join(lossy_fields)}")
    return published, form


READERS[".gguf"] = gguf.read_tokenizer
CONFIG_READERS[".gguf"] = gguf.chat_config
FINDERS.append(local)
