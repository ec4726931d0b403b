"""The layout of ModernBERT with its masked-token head (`ModernBertForMaskedLM`), with the keys of config.json before
and since transformers 5 (`layer_types`, `rope_parameters`)."""

import numpy as np

from bd3lm_jax.checkpoints.published import keys, language
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
from bd3lm_jax.models.modernbert import ModernBertConfig

MODEL_TYPES = (ModernBertConfig.kind,)
CONFIG_KEYS = {"vocab_size": int, "max_position_embeddings": int, "hidden_size": int, "num_hidden_layers": int,
               "num_attention_heads": int, "intermediate_size": int, "norm_eps": float, "local_attention": int}
CHOICES = {
    "hidden_activation": ("gelu",), "classifier_activation": ("gelu",), "attention_bias": (False,),
    "mlp_bias": (False,), "norm_bias": (False,), "classifier_bias": (False,), "decoder_bias": (True,),
    "tie_word_embeddings": (True,),
}
READ = ("global_attn_every_n_layers", "layer_types", "global_rope_theta", "local_rope_theta", "rope_parameters",
        "mlp_dropout", "layer_norm_eps", "position_embedding_type", language.BLOCK_SIZE)  # two are never used
FULL, LOCAL = "full_attention", "sliding_attention"
TABLE, OUTPUT = "model.embeddings.tok_embeddings.weight", "decoder.weight"


def from_hf_config(path, published: dict, scalars: dict[str, float]) -> ModelSpec:
    """What config.json says."""
    del scalars
    check_keys(path, published, CONFIG_KEYS)
    language.check_choices(path, published, CHOICES)
    length = published["max_position_embeddings"]
    full_base, local_base = _rope_bases(path, published)
    model = ModernBertConfig(
        vocab_size=published["vocab_size"], num_layers=published["num_hidden_layers"],
        hidden_size=published["hidden_size"],
        num_heads=published["num_attention_heads"], intermediate_size=published["intermediate_size"],
        dropout=float(published.get("mlp_dropout", 0.0)), window=published["local_attention"] // 2,
        local_layers=_local_layers(path, published), rope_theta=full_base, local_rope_theta=local_base,
        norm_eps=float(published["norm_eps"]))
    return ModelSpec(model, language.read_objective(path, published, length, causal=False), length,
                     language.mask_id(path, published))


def _local_layers(path, published: dict) -> tuple[int, ...]:
    layers, types = published["num_hidden_layers"], published.get("layer_types")
    if types is None:
        check_keys(path, published, {"global_attn_every_n_layers": int})
        return tuple(layer for layer in range(layers) if layer % published["global_attn_every_n_layers"])
    require(isinstance(types, list) and len(types) == layers and set(types) <= {FULL, LOCAL},
            f"{path}: 'layer_types' is {types!r}, expected {layers} of {FULL!r} and {LOCAL!r}")
    return tuple(layer for layer, kind in enumerate(types) if kind == LOCAL)


def _rope_bases(path, published: dict) -> tuple[float, float]:
    """Of layers that see everything, and of local ones."""
    parameters = published.get("rope_parameters")
    if parameters is None:
        check_keys(path, published, {"global_rope_theta": float})
        full = float(published["global_rope_theta"])
        return full, float(published.get("local_rope_theta") or full)
    bases = []
    for kind, key in ((FULL, "global_rope_theta"), (LOCAL, "local_rope_theta")):
        part, place = parameters.get(kind, parameters), f"{path}: rope_parameters"
        check_keys(place, part, {"rope_theta": float})
        language.check_choices(place, part, {"rope_type": ("default",), "partial_rotary_factor": (1, None)})
        keys.check_unread(place, part | {"model_type": ModernBertConfig.kind}, ("rope_theta", "rope_type", "type",
                                                                                "partial_rotary_factor"))
        old_value = published.get(key)
        require(
            old_value is None or old_value == part["rope_theta"],
            f"{path}: '{key}' is {old_value!r} and rope_parameters says "
            f"{part['rope_theta']!r} of '{kind}': remove the one that is wrong")
        bases.append(float(part["rope_theta"]))
    return bases[0], bases[1]


def to_hf_config(model: ModernBertConfig, objective, length: int) -> dict:
    """Content of config.json, the inverse of `from_hf_config`, with the keys of all versions. Raises UserError for an
    objective that it cannot say."""
    types = [LOCAL if layer in model.local_layers else FULL for layer in range(model.num_layers)]
    bases = {FULL: model.rope_theta, LOCAL: model.local_rope_theta}
    period = next((n for n in range(1, model.num_layers + 1)
                   if all((kind == LOCAL) == (layer % n > 0) for layer, kind in enumerate(types))), None)
    return {
        "model_type": ModernBertConfig.kind, "architectures": ["ModernBertForMaskedLM"],
        "vocab_size": model.vocab_size, "max_position_embeddings": length, "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "mlp_dropout": model.dropout, "embedding_dropout": 0.0, "attention_dropout": 0.0, "norm_eps": model.norm_eps,
        "local_attention": 2 * model.window, "layer_types": types,
        **({} if period is None else {"global_attn_every_n_layers": period}),
        "global_rope_theta": model.rope_theta, "local_rope_theta": model.local_rope_theta,
        "rope_parameters": {kind: {"rope_theta": base, "rope_type": "default"} for kind, base in bases.items()},
        **{key: values[0] for key, values in CHOICES.items()},
        **language.write_objective(ModernBertConfig.kind, objective, length, causal=False),
    }


def layout(config: ModernBertConfig) -> dict[str, ParamMapping]:
    """Path of each of our parameters -> its published source."""
    width, hidden = config.hidden_size, config.intermediate_size
    heads, size = config.num_heads, config.hidden_size // config.num_heads
    table = ParamMapping(TABLE, (config.vocab_size, width), unchanged, unchanged)
    leaves = {
        "embed.embedding": padded(table, 0, config.padded_vocab),
        "embed.norm.scale": vector("model.embeddings.norm.weight", width),
        "head.norm1.scale": vector("model.final_norm.weight", width),
        "head.dense.kernel": linear("head.dense.weight", width, width),
        "head.norm2.scale": vector("head.norm.weight", width),
        "head.bias": padded(vector("decoder.bias", config.vocab_size), 0, config.padded_vocab),
    }
    block = "model.layers.{layer}."
    for group, layers, _ in config.runs():
        leaves |= {
            f"{group}.qkv.kernel": linear(f"{block}attn.Wqkv.weight", width, (3, heads, size), layers),
            f"{group}.out.kernel": linear(f"{block}attn.Wo.weight", (heads, size), width, layers),
            f"{group}.norm2.scale": vector(f"{block}mlp_norm.weight", width, layers),
            f"{group}.gated_in.kernel": linear(f"{block}mlp.Wi.weight", width, (2, hidden), layers),
            f"{group}.mlp_out.kernel": linear(f"{block}mlp.Wo.weight", hidden, width, layers),
        }
        if layers[0]:
            leaves[f"{group}.norm1.scale"] = vector(f"{block}attn_norm.weight", width, layers)
    return leaves


def buffer_shapes(config: ModernBertConfig, names: set[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of tensors that may be there beside parameters: the output layer, which is the token table."""
    return dict.fromkeys((OUTPUT, TABLE), (config.vocab_size, config.hidden_size)) if OUTPUT in names else {}


def check_buffers(path, config: ModernBertConfig, tensors: dict[str, np.ndarray]) -> None:
    """UserError unless the output layer, where it is written, is the token table."""
    del config
    language.check_tied(path, tensors, OUTPUT, TABLE)
