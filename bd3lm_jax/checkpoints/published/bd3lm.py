"""The layout of the BD3-LM release (arXiv 2503.09573), which also carries its AR, MDLM and SEDD baselines, and that of
the MDLM release (arXiv 2406.07524): the same tensors, and a config.json without the switches."""

from typing import Any

import numpy as np

from bd3lm_jax.checkpoints.published.language import SHIFTED, read_shifted
from bd3lm_jax.checkpoints.published.mapping import (
    ModelSpec,
    ParamMapping,
    bias,
    check_keys,
    linear,
    objective_from_config,
    objective_to_config,
    padded,
    require,
    unchanged,
    vector,
)
from bd3lm_jax.diffusion import AR, SEDD, Masked
from bd3lm_jax.models.dit import LEVEL_FEATURES, DiTConfig

MODEL_TYPES = ("bd3lm", "mdlm")
FORMS = ("bd3lm", "mdlm", "ar", "sedd")  # what a config may name as its `algo`
CONFIG_KEYS = {
    "vocab_size": int, "model_length": int, "block_size": int, "hidden_dim": int, "cond_dim": int, "n_blocks": int,
    "n_heads": int, "dropout": float, "adaln": bool, "causal": bool, "cross_attn": bool, "time_conditioning": bool,
}
ROPE_BASE, MLP_RATIO, TRAINING_EPS = 1e4, 4, 1e-3  # constants of the published code, absent from its config
INV_FREQ = "backbone.rotary_emb.inv_freq"  # what the published code rotates by, whatever its own base
ROPE_KEY = "rope_base"  # our own key in config.json, for another base than theirs
READ = ("algo", "attn_backend", "var_min", "sampling_eps_min", "sampling_eps_max", "mlp_ratio", ROPE_KEY, SHIFTED)
CLIP = ("sampling_eps_min", "sampling_eps_max")


def from_hf_config(path, published: dict, scalars: dict[str, float]) -> ModelSpec:
    """What config.json says. scalars: the tensors of the checkpoint that hold a single number."""
    if published["model_type"] == "mdlm":
        published = {**published, "block_size": published.get("model_length"), "adaln": True, "causal": False,
                     "cross_attn": False}
    check_keys(path, published, CONFIG_KEYS)
    algo, length, block_size = published.get("algo"), published["model_length"], published["block_size"]
    require(algo in (None, *FORMS), f"{path}: algo is {algo!r}, supported: {', '.join(FORMS)}")
    require(algo is None or published["causal"] == (algo == "ar"),
            f"{path}: algo {algo!r} does not go with causal={published['causal']}")
    require(length > 0 and block_size > 0 and length % block_size == 0,
            f"{path}: block_size={block_size} must divide model_length={length}")
    rope_base = published.get(ROPE_KEY, ROPE_BASE)
    require(type(rope_base) in (int, float) and rope_base > 0,
            f"{path}: '{ROPE_KEY}' is {rope_base!r}, expected a positive number")
    model = DiTConfig(
        vocab_size=published["vocab_size"], num_layers=published["n_blocks"], hidden_size=published["hidden_dim"],
        num_heads=published["n_heads"], mlp_ratio=MLP_RATIO, dropout=float(published["dropout"]),
        adaln=published["adaln"], cond_dim=published["cond_dim"], time_conditioning=published["time_conditioning"],
        rope_theta=float(rope_base), target_shift=read_shifted(path, published, ""))
    objective = objective_from_config(path, published, _objective(published, scalars))
    return ModelSpec(model, objective, length, model.vocab_size - 1)


def to_hf_config(model: DiTConfig, objective, length: int) -> dict:
    """The config.json of such a network. Raises UserError for one that the published code does not compute."""
    require(
        objective.predicts_unseen_tokens,
        f"diffusion.kind='{objective.kind}' does not mask tokens, as all "
        "models in the layout of BD3-LM do: keep the run directory")
    model_values = {"mlp_ratio": model.mlp_ratio, "decoder_layers": model.decoder_layers}
    supported_values = {"mlp_ratio": MLP_RATIO, "decoder_layers": 0}
    unsupported = [
        f"model.{key}={model_values[key]:g} (expected {supported_values[key]:g})" for key in model_values
        if model_values[key] != supported_values[key]
    ]
    require(not unsupported, f"the layout of BD3-LM has no {', '.join(unsupported)}: keep the run directory")
    algo = {"ar": {"algo": "ar"}, "sedd": {"algo": "sedd"}}.get(objective.kind, {})
    limits = constants(model, objective)
    config = {
        "model_type": "bd3lm", "architectures": ["BD3LM"], **algo, "vocab_size": model.vocab_size,
        "model_length": length, "block_size": objective.block_size, "hidden_dim": model.hidden_size,
        "cond_dim": model.cond_dim, "n_blocks": model.num_layers, "n_heads": model.num_heads, "dropout": model.dropout,
        "adaln": model.adaln, "causal": objective.causal, "cross_attn": not algo, "attn_backend": "sdpa",
        "time_conditioning": model.time_conditioning, "var_min": CLIP[0] in limits,
        **{name: round(float(limits[name]), 6) for name in CLIP if name in limits},
    }
    own_keys: dict[str, Any] = {SHIFTED: model.target_shift} if model.target_shift else {}
    if model.rope_theta != ROPE_BASE:
        own_keys[ROPE_KEY] = model.rope_theta
    return config | own_keys | objective_to_config(objective, _objective(config, limits))


def constants(model: DiTConfig, objective) -> dict[str, np.ndarray]:
    """The tensors beside parameters that are published with such a network, by name."""
    found = {INV_FREQ: _frequencies(model).astype(np.float32)}
    if not objective.causal and objective.kind != SEDD.kind:
        low, high = objective.mask_prob_range
        found |= {name: np.array(limit, np.float32) for name, limit in zip(CLIP, (max(low, TRAINING_EPS), high))}
    return found


def _objective(published: dict, scalars: dict) -> Masked | AR | SEDD:
    if published["causal"]:
        return AR(bos=False)
    # Without cross attention to a clean stream the row is one block.
    block_size = published["block_size"] if published["cross_attn"] else published["model_length"]
    low, high = (round(float(scalars[name]), 6) for name in CLIP) if CLIP[0] in scalars else (0.0, 1.0)
    if published.get("algo") == SEDD.kind:
        return SEDD(block_size=block_size, corruption="bernoulli", eps=TRAINING_EPS)
    return Masked(block_size=block_size, schedule="loglinear", corruption="bernoulli", count_probs=(), complement=False,
                  clip_low=low if low > TRAINING_EPS else 0.0, clip_high=high, eps=TRAINING_EPS)


def layout(config: DiTConfig) -> dict[str, ParamMapping]:
    """Path of each of our parameters -> its published source."""
    width, cond = config.hidden_size, config.cond_dim
    hidden, vocab = config.mlp_ratio * config.hidden_size, config.vocab_size
    heads, size, layers = config.num_heads, config.hidden_size // config.num_heads, range(config.num_layers)
    block, output = "backbone.blocks.{layer}.", "backbone.output_layer."
    table = ParamMapping("backbone.vocab_embed.embedding", (vocab, width), unchanged, unchanged)
    leaves = {
        "embed.embedding": padded(table, 0, config.padded_vocab),
        "blocks.norm1.scale": vector(f"{block}norm1.weight", width, layers),
        "blocks.norm2.scale": vector(f"{block}norm2.weight", width, layers),
        "blocks.qkv.kernel": linear(f"{block}attn_qkv.weight", width, (3, heads, size), layers),
        "blocks.out.kernel": linear(f"{block}attn_out.weight", (heads, size), width, layers),
        "blocks.mlp_in.kernel": linear(f"{block}mlp.0.weight", width, hidden, layers),
        "blocks.mlp_in.bias": vector(f"{block}mlp.0.bias", hidden, layers),
        "blocks.mlp_out.kernel": linear(f"{block}mlp.2.weight", hidden, width, layers),
        "blocks.mlp_out.bias": vector(f"{block}mlp.2.bias", width, layers),
        "head.norm.scale": vector(f"{output}norm_final.weight", width),
        "head.linear.kernel": padded(linear(f"{output}linear.weight", width, vocab), 1, config.padded_vocab),
        "head.linear.bias": padded(vector(f"{output}linear.bias", vocab), 0, config.padded_vocab),
    }
    if config.adaln:
        modulation, level = "adaLN_modulation", "backbone.sigma_map.mlp."
        leaves |= {
            "condition.fc1.kernel": linear(f"{level}0.weight", LEVEL_FEATURES, cond),
            "condition.fc1.bias": vector(f"{level}0.bias", cond),
            "condition.fc2.kernel": linear(f"{level}2.weight", cond, cond),
            "condition.fc2.bias": vector(f"{level}2.bias", cond),
            "blocks.modulation.kernel": linear(f"{block}{modulation}.weight", cond, (6, width), layers),
            "blocks.modulation.bias": bias(f"{block}{modulation}.bias", (6, width), layers),
            "head.modulation.kernel": linear(f"{output}{modulation}.weight", cond, (2, width)),
            "head.modulation.bias": bias(f"{output}{modulation}.bias", (2, width)),
        }
    return leaves


def buffer_shapes(config: DiTConfig, names: set[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors beside parameters that a checkpoint with tensors of these names must hold. The
    limits of the clip may be absent, but not one of them alone."""
    limits = dict.fromkeys(CLIP, ()) if names & set(CLIP) else {}
    return {INV_FREQ: (config.hidden_size // config.num_heads // 2,)} | limits


def check_buffers(path, config: DiTConfig, tensors: dict[str, np.ndarray]) -> None:
    """UserError unless the tensors of `buffer_shapes` say what the network computes."""
    found, expected = tensors[INV_FREQ], _frequencies(config)
    require(np.allclose(found, expected, rtol=1e-5, atol=0),
            f"{path}: {INV_FREQ} is not that of RoPE base {config.rope_theta:g} ('{ROPE_KEY}' in config.json, or else "
            f"{ROPE_BASE:g}): entry 1 of {found.size} is {found[1:2]}, expected {expected[1:2]}")


def _frequencies(config: DiTConfig) -> np.ndarray:
    half = config.hidden_size // config.num_heads // 2
    return config.rope_theta ** (-np.arange(half) / half)
