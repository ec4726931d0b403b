"""The layout of Llama, Mistral, Qwen2, Qwen3, SmolLM2 (a Llama) and Dream (arXiv 2508.15487, a Qwen2 that sees all)."""

import numpy as np

from bd3lm_jax.checkpoints.published import keys
from bd3lm_jax.checkpoints.published.language import (
    BLOCK_SIZE,
    SHIFTED,
    check_choices,
    check_tied,
    mask_id,
    read_objective,
    read_shifted,
    tied_table,
    write_objective,
)
from bd3lm_jax.checkpoints.published.mapping import (
    ModelSpec,
    ParamMapping,
    bias,
    check_keys,
    linear,
    padded,
    require,
    unchanged,
    vector,
)
from bd3lm_jax.diffusion import Masked
from bd3lm_jax.models.llama import LINEAR, LLAMA3, LlamaConfig, rope_frequencies

CAUSAL = ("llama", "mistral", "qwen2", "qwen3")
MODEL_TYPES = (*CAUSAL, "Dream")
CONFIG_KEYS = {
    "vocab_size": int, "hidden_size": int, "intermediate_size": int, "num_hidden_layers": int,
    "num_attention_heads": int, "max_position_embeddings": int, "rms_norm_eps": float,
}
CHOICES = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
READ = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
        "sliding_window", "use_sliding_window", "layer_types", "partial_rotary_factor", BLOCK_SIZE, SHIFTED)
PARTIAL = "partial_rotary_factor"  # of the numbers of a head, those that RoPE turns
LAYERS = ("full_attention", "sliding_attention")
THETA = 1e4  # of configs that name none
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
EMBED, HEAD, INV_FREQ = "model.embed_tokens.weight", "lm_head.weight", "rotary_emb.inv_freq"


def from_hf_config(path, published: dict, scalars: dict[str, float]) -> ModelSpec:
    """What config.json says; a sliding window shorter than the context is the context, where it changes nothing."""
    check_keys(path, published, CONFIG_KEYS)
    kind, heads = published["model_type"], published["num_attention_heads"]
    check_choices(path, published, CHOICES)
    theta, scaling = rope_of(path, published)
    part = partial_of(path, published)
    require(part == 1, f"{path}: '{PARTIAL}' is {part}, expected 1 for model_type '{kind}'")
    model = LlamaConfig(
        vocab_size=published["vocab_size"], num_layers=published["num_hidden_layers"],
        hidden_size=published["hidden_size"],
        num_heads=heads, num_kv_heads=published.get("num_key_value_heads") or heads,
        head_dim=head_dim_of(path, published),
        intermediate_size=published["intermediate_size"], dropout=0.0, rope_theta=theta, rope_scaling=scaling,
        norm_eps=float(published["rms_norm_eps"]), qkv_bias=kind in ("qwen2", "Dream"), qk_norm=kind == "qwen3",
        tie_embeddings=published.get("tie_word_embeddings", False),
        target_shift=read_shifted(path, published, "row" if kind == "Dream" else ""))
    length = published["max_position_embeddings"]
    length = window_of(path, published, length)
    objective = read_objective(path, published, length, causal=kind != "Dream")
    return ModelSpec(model, objective, length, mask_id(path, published))


def to_hf_config(model: LlamaConfig, objective, length: int) -> dict:
    """The config.json of such a network. Raises UserError for one that no published architecture computes."""
    require(not (model.qkv_bias and model.qk_norm), "no published architecture has both model.qkv_bias and "
            "model.qk_norm: use one of them")
    kind = "qwen3" if model.qk_norm else "llama"
    if model.qkv_bias:
        require(model.head_dim * model.num_heads == model.hidden_size,
                f"model.qkv_bias=True is published as Qwen2, whose "
                f"heads fill the width: model.head_dim is {model.head_dim}, expected "
                f"{model.hidden_size / model.num_heads:g}")
        dream = objective == Masked.uniform_counts(length) and model.target_shift == "row"
        kind = "Dream" if dream else "qwen2"
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
             "Dream": "DreamModel"}
    return {
        "model_type": kind, "architectures": [names[kind]], "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
        "max_position_embeddings": length, "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_theta,
        "rope_scaling": _published_scaling(model.rope_scaling), "hidden_act": "silu", "attention_bias": False,
        "attention_dropout": 0.0, "tie_word_embeddings": model.tie_embeddings,
        **({"mlp_bias": False} if kind == "llama" else {"use_sliding_window": False, "sliding_window": None}),
        **write_objective(kind, objective, length, causal=kind != "Dream"),
        **({SHIFTED: model.target_shift} if model.target_shift and kind != "Dream" else {}),
    }


def _published_scaling(scaling: tuple[float, ...]) -> dict | None:
    if len(scaling) == LINEAR:
        return {"rope_type": "linear", "factor": scaling[0]}
    if len(scaling) == LLAMA3:
        return {"rope_type": "llama3", **dict(zip(LLAMA3_KEYS, (*scaling[:3], int(scaling[3]))))}
    return None


def rope_of(path, published: dict) -> tuple[float, tuple[float, ...]]:
    """Base of RoPE and `LlamaConfig.rope_scaling`; UserError for a kind of scaling that we do not compute, and for two
    places of a config that contradict each other."""
    scaling = _same_for_all_layers(path, published)
    theta = float(scaling.get("rope_theta") or published.get("rope_theta") or THETA)
    require(theta == float(published.get("rope_theta") or theta), f"{path}: 'rope_theta' is "
            f"{published.get('rope_theta')!r} and rope_parameters says {theta!r}: remove the one that is wrong")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    keys_by_type = {"default": (), "linear": LLAMA3_KEYS[:1], "llama3": LLAMA3_KEYS}
    require(kind in keys_by_type, f"{path}: rope_type is {kind!r}, supported: {', '.join(keys_by_type)}")
    keys.check_unread(f"{path}: rope parameters", scaling | {"model_type": published["model_type"]},
                      ("rope_theta", "rope_type", "type", PARTIAL, *keys_by_type[kind]))
    missing = [key for key in keys_by_type[kind] if not isinstance(scaling.get(key), int | float)]
    require(not missing, f"{path}: rope_type {kind!r} needs the number {', '.join(missing)}")
    return theta, tuple(float(scaling[key]) for key in keys_by_type[kind])


def _same_for_all_layers(path, published: dict) -> dict:
    """What is said of RoPE under either name, which newer files may say of each kind of layer."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        parameters = published.get(name) or {}
        require(isinstance(parameters, dict), f"{path}: {name} is {parameters!r}, expected an object")
        if parameters and all(isinstance(part, dict) for part in parameters.values()):
            used = set(published.get("layer_types") or parameters)
            missing = sorted(used - parameters.keys())
            require(not missing, f"{path}: {name} says nothing of '{''.join(missing[:1])}' layers")
            parts = [parameters[kind] for kind in sorted(used)]
            require(all(part == parts[0] for part in parts), f"{path}: {name} differs between kinds of layers, "
                    "expected one RoPE for all")
            parameters = parts[0]
        found += [parameters] if parameters else []
    for key in {key for parameters in found for key in parameters}:
        values = [parameters[key] for parameters in found if key in parameters]
        require(all(value == values[0] for value in values), f"{path}: rope_parameters and rope_scaling contradict "
                f"each other: '{key}' is {values[0]!r} and {values[-1]!r}")
    return {key: value for parameters in found for key, value in parameters.items()}


def partial_of(path, published: dict) -> float:
    """The part of a head that RoPE turns, wherever a config says it; 1 where none does."""
    inner = _same_for_all_layers(path, published).get(PARTIAL)
    outer = published.get(PARTIAL)
    require(None in (inner, outer) or inner == outer, f"{path}: '{PARTIAL}' is {outer!r} and rope_parameters says "
            f"{inner!r}: remove the one that is wrong")
    return float(next((x for x in (inner, outer) if x is not None), 1.0))


def window_of(path, published: dict, length: int) -> int:
    """The context within which a sliding window of some layers changes nothing."""
    types = published.get("layer_types")
    is_valid = types is None or isinstance(types, list) and set(types) <= set(LAYERS)
    require(is_valid and (types is None or len(types) == published["num_hidden_layers"]), f"{path}: 'layer_types' is "
            f"{types!r:.80}, expected {published['num_hidden_layers']} of {', '.join(LAYERS)}")
    window = published.get("sliding_window")
    is_enabled = published.get("use_sliding_window", published["model_type"] in ("llama", "mistral") or bool(types))
    if not window or not is_enabled or types is not None and "sliding_attention" not in types:
        require(types is None or "sliding_attention" not in types or not is_enabled, f"{path}: 'layer_types' names "
                "sliding_attention, and 'sliding_window' says no size")
        return length
    return min(length, window)


def head_dim_of(path, published: dict) -> int:
    """Named, or what the heads divide the width into."""
    width, heads = published["hidden_size"], published["num_attention_heads"]
    named = published.get("head_dim")
    require(named or heads > 0 and width % heads == 0,
            f"{path}: hidden_size={width} is no multiple of num_attention_heads={heads}, and no head_dim is named")
    return named or width // heads


def layout(config: LlamaConfig) -> dict[str, ParamMapping]:
    """Path of each of our parameters -> its published source."""
    width, vocab, layers = config.hidden_size, config.vocab_size, range(config.num_layers)
    block, attention = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
    leaves = {
        "embed.embedding": padded(ParamMapping(EMBED, (vocab, width), unchanged, unchanged), 0, config.padded_vocab),
        "blocks.norm1.scale": vector(f"{block}input_layernorm.weight", width, layers),
        "blocks.norm2.scale": vector(f"{block}post_attention_layernorm.weight", width, layers),
        "head.norm.scale": vector("model.norm.weight", width),
        "blocks.out.kernel": linear(f"{attention}o_proj.weight", (config.num_heads, config.head_dim), width, layers),
        **swiglu("blocks", f"{block}mlp.", width, config.intermediate_size, layers),
    }
    for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
        sizes = (heads, config.head_dim)
        leaves[f"blocks.{name}.kernel"] = linear(f"{attention}{name}_proj.weight", width, sizes, layers)
        if config.qkv_bias:
            leaves[f"blocks.{name}.bias"] = bias(f"{attention}{name}_proj.bias", sizes, layers)
        if config.qk_norm and name != "v":
            leaves[f"blocks.{name}_norm.scale"] = vector(f"{attention}{name}_norm.weight", config.head_dim, layers)
    if not config.tie_embeddings:
        leaves["head.linear.kernel"] = padded(linear(HEAD, width, vocab), 1, config.padded_vocab)
    return leaves


def swiglu(prefix: str, hf_prefix: str, width: int, hidden: int, layers, experts: int = 0) -> dict[str, ParamMapping]:
    """The three matrices of an MLP, or of each of some experts."""
    return {f"{prefix}.{name}.kernel": linear(f"{hf_prefix}{name}_proj.weight", *sizes, layers, experts)
            for name, sizes in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width)))}


def buffer_shapes(config: LlamaConfig, names: set[str]) -> dict[str, tuple[int, ...]]:
    """Tensors beside parameters that such a checkpoint may hold: an output layer that repeats a tied embedding (which
    is then read as well), frequencies of RoPE."""
    found = {name: (config.head_dim // 2,) for name in names if name.endswith(INV_FREQ)}
    return found | tied_table(config, names, (HEAD, EMBED))


def check_buffers(path, config: LlamaConfig, tensors: dict[str, np.ndarray]) -> None:
    """UserError unless the tensors of `buffer_shapes` say what the network computes."""
    if config.tie_embeddings:
        check_tied(path, tensors, HEAD, EMBED)
    expected = rope_frequencies(config.head_dim, config.rope_theta)
    for name in filter(lambda name: name.endswith(INV_FREQ), tensors):
        require(np.allclose(tensors[name], expected, rtol=1e-2), f"{path}: {name} is not that of rope_theta "
                f"{config.rope_theta:g}: entry 1 is {tensors[name][1:2]}, expected {expected[1:2]}")
