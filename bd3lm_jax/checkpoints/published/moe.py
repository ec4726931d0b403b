"""The layout of LLaDA2 (arXiv 2512.15745), a mixture of experts with the names of Ling's code."""

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
from bd3lm_jax.checkpoints.published.llama import head_dim_of, partial_of, rope_of, swiglu
from bd3lm_jax.checkpoints.published.mapping import (
    ModelSpec,
    ParamMapping,
    check_keys,
    linear,
    padded,
    require,
    unchanged,
    vector,
)
from bd3lm_jax.models.moe import MoEConfig

MODEL_TYPES = ("llada2_moe",)
CONFIG_KEYS = {
    "vocab_size": int, "hidden_size": int, "intermediate_size": int, "num_hidden_layers": int,
    "num_attention_heads": int, "max_position_embeddings": int, "rms_norm_eps": float, "first_k_dense_replace": int,
    "num_experts": int, "num_experts_per_tok": int, "moe_intermediate_size": int, "num_shared_experts": int,
    "n_group": int, "topk_group": int, "routed_scaling_factor": float,
}
CHOICES = {
    "hidden_act": ("silu",), "use_bias": (False,), "use_qkv_bias": (False,), "norm_head": (False,),
    "use_sliding_window": (False,), "norm_topk_prob": (True,), "score_function": ("sigmoid",),
    "moe_router_enable_expert_bias": (True,), "use_rmsnorm": (True,),
}
READ = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
        "rotary_dim", "moe_shared_expert_intermediate_size", "use_qk_norm", "tie_word_embeddings", "sliding_window",
        "load_balance_coefficient", BLOCK_SIZE)
BALANCE = "load_balance_coefficient"  # our own key, for a network that goes on training
EMBED, HEAD = "model.word_embeddings.weight", "lm_head.weight"


def from_hf_config(path, published: dict, scalars: dict[str, float]) -> ModelSpec:
    """What config.json says."""
    check_keys(path, published, CONFIG_KEYS)
    check_choices(path, published, CHOICES)
    theta, scaling = rope_of(path, published)
    require(not scaling, f"{path}: rope scaling is not supported for model_type 'llada2_moe'")
    heads, head_dim = published["num_attention_heads"], head_dim_of(path, published)
    length, expert_hidden = published["max_position_embeddings"], published["moe_intermediate_size"]
    shared = published.get("moe_shared_expert_intermediate_size") or expert_hidden
    model = MoEConfig(
        vocab_size=published["vocab_size"], num_layers=published["num_hidden_layers"],
        dense_layers=published["first_k_dense_replace"], hidden_size=published["hidden_size"], num_heads=heads,
        num_kv_heads=published.get("num_key_value_heads") or heads, head_dim=head_dim,
        rotary_dim=_rotary_dim(path, published, head_dim), intermediate_size=published["intermediate_size"],
        num_experts=published["num_experts"], expert_intermediate_size=expert_hidden,
        shared_intermediate_size=shared * published["num_shared_experts"], top_k=published["num_experts_per_tok"],
        groups=published["n_group"], top_groups=published["topk_group"],
        routed_scale=float(published["routed_scaling_factor"]), load_balancing=float(published.get(BALANCE, 0.0)),
        dropout=0.0, rope_theta=theta, norm_eps=float(published["rms_norm_eps"]),
        qk_norm=published.get("use_qk_norm", True), tie_embeddings=published.get("tie_word_embeddings", False))
    objective = read_objective(path, published, length, causal=False)
    return ModelSpec(model, objective, length, mask_id(path, published))


def _rotary_dim(path, published: dict, head_dim: int) -> int:
    rotary_dim_from_factor = int(head_dim * partial_of(path, published))
    named = published.get("rotary_dim")
    require(
        named in (None, rotary_dim_from_factor),
        f"{path}: 'rotary_dim' is {named!r} and partial_rotary_factor makes it {rotary_dim_from_factor}: "
        "remove the one that is wrong")
    return rotary_dim_from_factor


def to_hf_config(model: MoEConfig, objective, length: int) -> dict:
    """The config.json of such a network. Raises UserError if its shared experts are no whole number of experts."""
    shared, rest = divmod(model.shared_intermediate_size, model.expert_intermediate_size)
    require(rest == 0, f"model.shared_intermediate_size={model.shared_intermediate_size} is no multiple of "
                       "model.expert_intermediate_size="
            f"{model.expert_intermediate_size}, which LLaDA2's layout needs")
    own = {BALANCE: model.load_balancing} if model.load_balancing else {}
    return own | {
        "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "first_k_dense_replace": model.dense_layers, "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
        "partial_rotary_factor": model.rotary_dim / model.head_dim, "rotary_dim": model.rotary_dim,
        "max_position_embeddings": length, "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_theta,
        "rope_scaling": None, "num_experts": model.num_experts, "num_experts_per_tok": model.top_k,
        "moe_intermediate_size": model.expert_intermediate_size, "num_shared_experts": shared, "n_group": model.groups,
        "topk_group": model.top_groups, "routed_scaling_factor": model.routed_scale, "use_qk_norm": model.qk_norm,
        "attention_dropout": 0.0, "tie_word_embeddings": model.tie_embeddings,
        **{key: value for key, (value,) in CHOICES.items()}, **write_objective("llada2_moe", objective, length, False),
    }


def layout(config: MoEConfig) -> dict[str, ParamMapping]:
    """Path of each of our parameters -> its published source."""
    width, vocab = config.hidden_size, config.vocab_size
    leaves = {
        "embed.embedding": padded(ParamMapping(EMBED, (vocab, width), unchanged, unchanged), 0, config.padded_vocab),
        "head.norm.scale": vector("model.norm.weight", width),
    }
    if not config.tie_embeddings:
        leaves["head.linear.kernel"] = padded(linear(HEAD, width, vocab), 1, config.padded_vocab)
    dense, sparse = range(config.dense_layers), range(config.dense_layers, config.num_layers)
    if dense:
        leaves |= _attention("blocks0", config, dense)
        leaves |= swiglu("blocks0.mlp", "model.layers.{layer}.mlp.", width, config.intermediate_size, dense)
    leaves |= _attention("blocks1", config, sparse)
    mlp = "model.layers.{layer}.mlp."
    leaves["blocks1.router.kernel"] = linear(f"{mlp}gate.weight", width, config.num_experts, sparse)
    leaves["blocks1.router.bias"] = vector(f"{mlp}gate.expert_bias", config.num_experts, sparse)
    leaves |= swiglu("blocks1.experts", mlp + "experts.{expert}.", width, config.expert_intermediate_size, sparse,
                     config.num_experts)
    if config.shared_intermediate_size:
        leaves |= swiglu("blocks1.shared", f"{mlp}shared_experts.", width, config.shared_intermediate_size, sparse)
    return leaves


def _attention(group: str, config: MoEConfig, layers: range) -> dict[str, ParamMapping]:
    """All of a layer but its MLP."""
    block, width, heads = "model.layers.{layer}.", config.hidden_size, (config.num_heads, config.head_dim)
    leaves = {
        f"{group}.norm1.scale": vector(f"{block}input_layernorm.weight", width, layers),
        f"{group}.norm2.scale": vector(f"{block}post_attention_layernorm.weight", width, layers),
        f"{group}.grouped_qkv.kernel": _grouped(f"{block}attention.query_key_value.weight", config, layers),
        f"{group}.out.kernel": linear(f"{block}attention.dense.weight", heads, width, layers),
    }
    if config.qk_norm:
        leaves |= {
            f"{group}.{own_name}_norm.scale": vector(f"{block}attention.{hf_name}_layernorm.weight", config.head_dim,
                                                     layers)
            for own_name, hf_name in (("q", "query"), ("k", "key"))
        }
    return leaves


def _grouped(name: str, config: MoEConfig, layers: range) -> ParamMapping:
    """All queries, all keys, all values as published; by key head its queries, the key and the value in ours."""
    width, size = config.hidden_size, config.head_dim
    pairs, share = config.num_kv_heads, config.num_heads // config.num_kv_heads
    shape = ((config.num_heads + 2 * pairs) * size, width)

    def read(w):
        q, k, v = np.split(w.T.reshape(width, -1, size), (config.num_heads, config.num_heads + pairs), axis=1)
        parts = q.reshape(width, pairs, share, size), k[:, :, None], v[:, :, None]
        return np.concatenate(parts, axis=2)

    def write(w):
        q, k, v = np.split(w, (share, share + 1), axis=2)
        parts = [x.reshape(width, -1, size) for x in (q, k, v)]
        return np.concatenate(parts, axis=1).reshape(width, -1).T

    return ParamMapping(name, shape, read, write, layers)


def buffer_shapes(config: MoEConfig, names: set[str]) -> dict[str, tuple[int, ...]]:
    """An output layer that repeats a tied embedding (which is then read as well) may be there."""
    return tied_table(config, names, (HEAD, EMBED))


def check_buffers(path, config: MoEConfig, tensors: dict[str, np.ndarray]) -> None:
    """UserError unless the tensors of `buffer_shapes` say what the network computes."""
    if config.tie_embeddings:
        check_tied(path, tensors, HEAD, EMBED)
