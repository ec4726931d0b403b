"""The layout of LLaDA (arXiv 2502.09992), which has the names of OLMo's code."""

import numpy as np

from bd3lm_jax.checkpoints.published.language import (
    BLOCK_SIZE,
    check_choices,
    check_tied,
    mask_id,
    read_objective,
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
from bd3lm_jax.models.llama import LlamaConfig

MODEL_TYPES = ("llada",)
CONFIG_KEYS = {
    "vocab_size": int, "d_model": int, "n_layers": int, "n_heads": int, "max_sequence_length": int,
    "rms_norm_eps": float, "rope_theta": float, "weight_tying": bool,
}
COMPUTED = {
    "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "rope": True, "alibi": False,
    "attention_layer_norm": False, "bias_for_layer_norm": False, "block_group_size": 1, "include_bias": False,
    "input_emb_norm": False, "layer_norm_with_affine": True, "scale_logits": False, "clip_qkv": None,
}
CHOICES = {key: (value,) for key, value in COMPUTED.items()}
READ = ("embedding_size", "n_kv_heads", "mlp_hidden_size", "mlp_ratio", "multi_query_attention", "include_qkv_bias",
        BLOCK_SIZE)
EMBED, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


def from_hf_config(path, published: dict, scalars: dict[str, float]) -> ModelSpec:
    """What config.json says."""
    check_keys(path, published, CONFIG_KEYS)
    check_choices(path, published, CHOICES)
    width, heads, length = published["d_model"], published["n_heads"], published["max_sequence_length"]
    require(heads > 0 and width % heads == 0, f"{path}: d_model={width} is no multiple of n_heads={heads}")
    single = 1 if published.get("multi_query_attention") else heads
    model = LlamaConfig(
        vocab_size=published.get("embedding_size") or published["vocab_size"], num_layers=published["n_layers"],
        hidden_size=width, num_heads=heads, num_kv_heads=published.get("n_kv_heads") or single, head_dim=width // heads,
        intermediate_size=published.get("mlp_hidden_size") or published.get("mlp_ratio", 4) * width, dropout=0.0,
        rope_theta=float(published["rope_theta"]), rope_scaling=(), norm_eps=float(published["rms_norm_eps"]),
        qkv_bias=published.get("include_qkv_bias", False), qk_norm=False, tie_embeddings=published["weight_tying"])
    objective = read_objective(path, published, length, causal=False)
    return ModelSpec(model, objective, length, mask_id(path, published))


def to_hf_config(model: LlamaConfig, objective, length: int) -> dict:
    """The config.json of such a network. Raises UserError for one that LLaDA's code does not compute."""
    require(not model.qk_norm and not model.rope_scaling and model.head_dim * model.num_heads == model.hidden_size,
            "LLaDA's layout has no model.qk_norm, no model.rope_scaling, and heads that fill the width: publish this "
            "network as a Llama")
    return {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "vocab_size": model.vocab_size,
        "embedding_size": model.vocab_size, "d_model": model.hidden_size, "n_layers": model.num_layers,
        "n_heads": model.num_heads,
        "n_kv_heads": model.num_kv_heads, "mlp_hidden_size": model.intermediate_size, "max_sequence_length": length,
        "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_theta, "weight_tying": model.tie_embeddings,
        "include_qkv_bias": model.qkv_bias, **COMPUTED, **write_objective("llada", objective, length, causal=False),
    }


def layout(config: LlamaConfig) -> dict[str, ParamMapping]:
    """Path of each of our parameters -> its published source."""
    width, hidden = config.hidden_size, config.intermediate_size
    vocab, layers = config.vocab_size, range(config.num_layers)
    block = "model.transformer.blocks.{layer}."
    leaves = {
        "embed.embedding": padded(ParamMapping(EMBED, (vocab, width), unchanged, unchanged), 0, config.padded_vocab),
        "blocks.norm1.scale": vector(f"{block}attn_norm.weight", width, layers),
        "blocks.norm2.scale": vector(f"{block}ff_norm.weight", width, layers),
        "head.norm.scale": vector("model.transformer.ln_f.weight", width),
        "blocks.out.kernel": linear(f"{block}attn_out.weight", (config.num_heads, config.head_dim), width, layers),
        "blocks.gate.kernel": linear(f"{block}ff_proj.weight", width, hidden, layers),
        "blocks.up.kernel": linear(f"{block}up_proj.weight", width, hidden, layers),
        "blocks.down.kernel": linear(f"{block}ff_out.weight", hidden, width, layers),
    }
    for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
        sizes = (heads, config.head_dim)
        leaves[f"blocks.{name}.kernel"] = linear(f"{block}{name}_proj.weight", width, sizes, layers)
        if config.qkv_bias:
            leaves[f"blocks.{name}.bias"] = bias(f"{block}{name}_proj.bias", sizes, layers)
    if not config.tie_embeddings:
        leaves["head.linear.kernel"] = padded(linear(HEAD, width, vocab), 1, config.padded_vocab)
    return leaves


def buffer_shapes(config: LlamaConfig, names: set[str]) -> dict[str, tuple[int, ...]]:
    """An output layer that repeats a tied embedding (which is then read as well) may be there."""
    return tied_table(config, names, (HEAD, EMBED))


def check_buffers(path, config: LlamaConfig, tensors: dict[str, np.ndarray]) -> None:
    """UserError unless the tensors of `buffer_shapes` say what the network computes."""
    if config.tie_embeddings:
        check_tied(path, tensors, HEAD, EMBED)
