"""Published checkpoints in Hugging Face layout (config.json + model.safetensors): names and layouts, read strictly.

Supported: model_type "bd3lm", the layout of the BD3-LM release (arXiv 2503.09573), which also carries its AR, MDLM and
SEDD baselines. Every tensor of a file is used exactly once; anything missing, left over or misshapen is an error.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bd3lm_jax.diffusion import AR, SEDD, Masked
from bd3lm_jax.errors import UserError
from bd3lm_jax.models.dit import LEVEL_FEATURES, DiTConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MODEL_TYPES = ("bd3lm",)
FORMS = ("bd3lm", "mdlm", "ar", "sedd")  # what a config may name as its `algo`
CONFIG_KEYS = {
    "vocab_size": int, "model_length": int, "block_size": int, "hidden_dim": int, "cond_dim": int, "n_blocks": int,
    "n_heads": int, "dropout": float, "adaln": bool, "causal": bool, "cross_attn": bool, "time_conditioning": bool,
}
ROPE_BASE, MLP_RATIO, TRAINING_EPS = 1e4, 4, 1e-3  # constants of the published code, absent from its config
COMPILED = "_orig_mod."  # left in tensor names by torch.compile
INV_FREQ = "backbone.rotary_emb.inv_freq"
CLIP = ("sampling_eps_min", "sampling_eps_max")
NAMED = 6  # tensors named in an error, of each kind


def read_model(directory: str | Path) -> tuple[DiTConfig, Masked | AR | SEDD, int, dict]:
    """A published network: (model config, objective, context length in tokens, float32 parameters).

    The parameters have the tree and shapes of `trunk.init`: layers stacked, vocabulary padded with zeros.

    Raises:
        UserError: unreadable files, an unsupported architecture, or tensors that are not exactly the expected ones.
    """
    config_path, weights_path = Path(directory) / CONFIG_FILE, Path(directory) / WEIGHTS_FILE
    published = _read_config(config_path)
    config = _model_config(published)
    tensors = _read_tensors(weights_path)
    layout = _layout(config)
    _check_tensors(weights_path, tensors, _expected_shapes(config, layout, tensors))
    _check_rope(weights_path, tensors[INV_FREQ])
    return config, _objective(published, tensors), published["model_length"], _params(config, layout, tensors)


def _read_config(path: Path) -> dict:
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): expected the config.json of a published checkpoint") from None
    kind = published.get("model_type") if isinstance(published, dict) else None
    _check(kind in MODEL_TYPES, f"{path}: model_type is {kind!r}, supported: {', '.join(MODEL_TYPES)}")
    for key, wanted in CONFIG_KEYS.items():
        _check(key in published, f"{path}: key '{key}' is missing, expected {wanted.__name__}")
        value = published[key]
        right = type(value) is wanted or (wanted is float and type(value) is int)
        _check(right, f"{path}: '{key}' is {value!r}, expected {wanted.__name__}")
    form = published.get("algo")
    _check(form in (None, *FORMS), f"{path}: algo is {form!r}, supported: {', '.join(FORMS)}")
    _check(form is None or published["causal"] == (form == "ar"),
           f"{path}: algo {form!r} does not go with causal={published['causal']}")
    length, block_size = published["model_length"], published["block_size"]
    _check(length > 0 and block_size > 0 and length % block_size == 0,
           f"{path}: block_size={block_size} must divide model_length={length}")
    return published


def _model_config(published: dict) -> DiTConfig:
    return DiTConfig(
        vocab_size=published["vocab_size"], layers=published["n_blocks"], width=published["hidden_dim"],
        heads=published["n_heads"], mlp_ratio=MLP_RATIO, dropout=float(published["dropout"]),
        adaln=published["adaln"], cond_dim=published["cond_dim"], time_conditioning=published["time_conditioning"],
        rope_base=ROPE_BASE)


def _objective(published: dict, tensors: dict) -> Masked | AR | SEDD:
    if published["causal"]:
        return AR(bos=False)
    # Without cross attention to a clean stream the row is one block.
    block_size = published["block_size"] if published["cross_attn"] else published["model_length"]
    low, high = (round(float(tensors[name]), 6) for name in CLIP) if CLIP[0] in tensors else (0.0, 1.0)
    if published.get("algo") == SEDD.kind:
        return SEDD(block_size=block_size, corruption="bernoulli", eps=TRAINING_EPS)
    return Masked(block_size=block_size, schedule="loglinear", corruption="bernoulli", count_probs=(), complement=False,
                  clip_low=low if low > TRAINING_EPS else 0.0, clip_high=high, eps=TRAINING_EPS)


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
        _check(plain not in tensors, f"{path}: tensor {plain} is there twice, with and without '{COMPILED}'")
        tensors[plain] = value.astype(np.float32, copy=False)
    return tensors


class _Leaf(NamedTuple):
    """Where one of our parameters comes from; "{}" in the name: one tensor a layer, to be stacked."""

    name: str
    shape: tuple[int, ...]  # as published: PyTorch's linear weights are [out, in]
    convert: Callable  # published array -> ours


def _layout(config: DiTConfig) -> dict[tuple[str, ...], _Leaf]:
    """Path of each of our parameters -> its published source."""
    width, cond, hidden, vocab = config.width, config.cond_dim, config.mlp_ratio * config.width, config.vocab_size
    heads, size, unused = config.heads, config.width // config.heads, config.padded_vocab - config.vocab_size

    def linear(*shape):
        return lambda w: w.T.reshape(shape)

    def same(w):
        return w

    layout = {
        "embed.embedding": _Leaf("vocab_embed.embedding", (vocab, width), lambda w: np.pad(w, ((0, unused), (0, 0)))),
        "blocks.norm1.scale": _Leaf("blocks.{}.norm1.weight", (width,), same),
        "blocks.norm2.scale": _Leaf("blocks.{}.norm2.weight", (width,), same),
        "blocks.qkv.kernel": _Leaf("blocks.{}.attn_qkv.weight", (3 * width, width), linear(width, 3, heads, size)),
        "blocks.out.kernel": _Leaf("blocks.{}.attn_out.weight", (width, width), linear(heads, size, width)),
        "blocks.mlp_in.kernel": _Leaf("blocks.{}.mlp.0.weight", (hidden, width), linear(width, hidden)),
        "blocks.mlp_in.bias": _Leaf("blocks.{}.mlp.0.bias", (hidden,), same),
        "blocks.mlp_out.kernel": _Leaf("blocks.{}.mlp.2.weight", (width, hidden), linear(hidden, width)),
        "blocks.mlp_out.bias": _Leaf("blocks.{}.mlp.2.bias", (width,), same),
        "head.norm.scale": _Leaf("output_layer.norm_final.weight", (width,), same),
        "head.linear.kernel": _Leaf("output_layer.linear.weight", (vocab, width),
                                    lambda w: np.pad(w.T, ((0, 0), (0, unused)))),
        "head.linear.bias": _Leaf("output_layer.linear.bias", (vocab,), lambda w: np.pad(w, (0, unused))),
    }
    if config.adaln:
        modulation = "adaLN_modulation"
        layout |= {
            "condition.fc1.kernel": _Leaf("sigma_map.mlp.0.weight", (cond, LEVEL_FEATURES), np.transpose),
            "condition.fc1.bias": _Leaf("sigma_map.mlp.0.bias", (cond,), same),
            "condition.fc2.kernel": _Leaf("sigma_map.mlp.2.weight", (cond, cond), np.transpose),
            "condition.fc2.bias": _Leaf("sigma_map.mlp.2.bias", (cond,), same),
            "blocks.modulation.kernel": _Leaf(f"blocks.{{}}.{modulation}.weight", (6 * width, cond),
                                              linear(cond, 6, width)),
            "blocks.modulation.bias": _Leaf(f"blocks.{{}}.{modulation}.bias", (6 * width,), linear(6, width)),
            "head.modulation.kernel": _Leaf(f"output_layer.{modulation}.weight", (2 * width, cond),
                                            linear(cond, 2, width)),
            "head.modulation.bias": _Leaf(f"output_layer.{modulation}.bias", (2 * width,), linear(2, width)),
        }
    return {tuple(path.split(".")): leaf._replace(name="backbone." + leaf.name) for path, leaf in layout.items()}


def _sources(config: DiTConfig, leaf: _Leaf) -> list[str]:
    """Published names of the tensors behind one parameter."""
    return [leaf.name.format(layer) for layer in range(config.layers)] if "{}" in leaf.name else [leaf.name]


def _expected_shapes(config: DiTConfig, layout: dict, tensors: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor the file must hold. The clip is optional, but whole."""
    shapes = {name: leaf.shape for leaf in layout.values() for name in _sources(config, leaf)}
    shapes[INV_FREQ] = (config.width // config.heads // 2,)
    if any(name in tensors for name in CLIP):
        shapes |= {name: () for name in CLIP}
    return shapes


def _check_tensors(path: Path, tensors: dict, expected: dict) -> None:
    misshapen = [f"{name} (is {list(tensors[name].shape)}, expected {list(shape)})"
                 for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    problems = {"missing": sorted(expected.keys() - tensors.keys()),
                "unexpected": sorted(tensors.keys() - expected.keys()), "misshapen": misshapen}
    found = [f"{kind}: {_named(names)}" for kind, names in problems.items() if names]
    _check(not found, f"{path} does not fit its {CONFIG_FILE}. Tensors {'; '.join(found)}")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _check_rope(path: Path, inv_freq: np.ndarray) -> None:
    expected = ROPE_BASE ** (-np.arange(inv_freq.size) / inv_freq.size)
    _check(np.allclose(inv_freq, expected, rtol=1e-5, atol=0),
           f"{path}: {INV_FREQ} is not that of RoPE base {ROPE_BASE:g}, the only one supported: entry 1 of "
           f"{inv_freq.size} is {inv_freq[1:2]}, expected {expected[1:2]}")


def _params(config: DiTConfig, layout: dict, tensors: dict) -> dict:
    params = {}
    for path, leaf in layout.items():
        parts = [leaf.convert(tensors[name]) for name in _sources(config, leaf)]
        params[path] = jnp.asarray(np.stack(parts) if "{}" in leaf.name else parts[0])
    return unflatten_dict(params)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
