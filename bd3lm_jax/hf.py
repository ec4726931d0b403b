"""Published checkpoints in Hugging Face layout (config.json + model.safetensors), read strictly.

Which architectures: `published.FORMATS`. Every tensor of a file is used exactly once; anything missing, left over or
misshapen is an error.
"""

import json
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bd3lm_jax.errors import UserError
from bd3lm_jax.published import FORMATS, Described, Leaf
from bd3lm_jax.published.leaf import require

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
COMPILED = "_orig_mod."  # left in tensor names by torch.compile
NAMED = 6  # tensors named in an error, of each kind


def read_model(directory: str | Path) -> tuple[Described, dict]:
    """A published network: what it is, and its float32 parameters.

    The parameters have the tree and shapes of `trunk.init`: layers stacked, vocabulary padded with zeros.

    Raises:
        UserError: unreadable files, an unsupported architecture, or tensors that are not exactly the expected ones.
    """
    config_path, weights_path = Path(directory) / CONFIG_FILE, Path(directory) / WEIGHTS_FILE
    published, form = read_config(config_path)
    tensors = _read_tensors(weights_path)
    described = form.describe(config_path, published, {name: x for name, x in tensors.items() if not x.shape})
    leaves = form.layout(described.model)
    held = form.held(described.model, set(tensors))
    _check_tensors(weights_path, tensors, held | {name: leaf.shape for leaf in leaves.values()
                                                  for name in leaf.sources()})
    form.check_held(weights_path, described.model, tensors)
    return described, unflatten_dict({tuple(path.split(".")): _stacked(leaf, tensors)
                                      for path, leaf in leaves.items()})


def describe(directory: str | Path) -> Described:
    """What a published checkpoint is by its config.json alone: what its tensors say of the objective is left out."""
    path = Path(directory) / CONFIG_FILE
    published, form = read_config(path)
    return form.describe(path, published, {})


def read_config(path: Path) -> tuple[dict, ModuleType]:
    """The content of a config.json and the format that it names."""
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): expected the config.json of a published checkpoint") from None
    kind = published.get("model_type") if isinstance(published, dict) else None
    require(kind in FORMATS, f"{path}: model_type is {kind!r}, supported: {', '.join(FORMATS)}")
    return published, FORMATS[kind]


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32 under its published name."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}): download it again; expected one safetensors file") from None
    tensors = {}
    for name, value in loaded.items():
        plain = name.replace(COMPILED, "")
        require(plain not in tensors, f"{path}: tensor {plain} is there twice, with and without '{COMPILED}'")
        tensors[plain] = value.astype(np.float32, copy=False)
    return tensors


def _check_tensors(path: Path, tensors: dict, expected: dict) -> None:
    misshapen = [f"{name} (is {list(tensors[name].shape)}, expected {list(shape)})"
                 for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    problems = {"missing": sorted(expected.keys() - tensors.keys()),
                "unexpected": sorted(tensors.keys() - expected.keys()), "misshapen": misshapen}
    found = [f"{kind}: {_named(names)}" for kind, names in problems.items() if names]
    require(not found, f"{path} does not fit its {CONFIG_FILE}. Tensors {'; '.join(found)}")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _stacked(leaf: Leaf, tensors: dict[str, np.ndarray]) -> jnp.ndarray:
    parts = [leaf.read(tensors[name]) for name in leaf.sources()]
    return jnp.asarray(np.stack(parts).reshape(leaf.stacked + parts[0].shape))
