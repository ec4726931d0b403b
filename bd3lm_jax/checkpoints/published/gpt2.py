"""The layout of GPT-2 (`GPT2LMHeadModel`): matrices [in, out], names with and without the prefix "transformer."."""

import math
from collections.abc import Sequence

import numpy as np

from bd3lm_jax.checkpoints.published import language
from bd3lm_jax.checkpoints.published.mapping import (
    ModelSpec,
    ParamMapping,
    bias,
    check_keys,
    norm,
    padded,
    require,
    unchanged,
    vector,
)
from bd3lm_jax.models.gpt2 import GPT2Config

MODEL_TYPES = CAUSAL = (GPT2Config.kind,)
CONFIG_KEYS = {"vocab_size": int, "n_positions": int, "n_embd": int, "n_layer": int, "n_head": int,
               "layer_norm_epsilon": float}
CHOICES = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "tie_word_embeddings": (True,),
}
READ = ("n_inner", "resid_pdrop", language.BLOCK_SIZE, language.SHIFTED)
PREFIX, PARTS = "transformer.", ("wte.", "wpe.", "h.", "ln_f.")
TABLE, OUTPUT = f"{PREFIX}wte.weight", "lm_head.weight"
MASKED_BIAS_MAX = -1e4  # what older files write over what a token must not see


def rename(name: str) -> str:
    """The base network alone is published without the prefix."""
    return PREFIX + name if name.startswith(PARTS) else name


def from_hf_config(path, published: dict, scalars: dict[str, float]) -> ModelSpec:
    """What config.json says."""
    del scalars
    check_keys(path, published, CONFIG_KEYS)
    language.check_choices(path, published, CHOICES)
    width, hidden, length = published["n_embd"], published.get("n_inner"), published["n_positions"]
    require(hidden is None or type(hidden) is int, f"{path}: 'n_inner' is {hidden!r}, expected int or null")
    model = GPT2Config(vocab_size=published["vocab_size"], num_layers=published["n_layer"], hidden_size=width,
                       num_heads=published["n_head"], intermediate_size=hidden or 4 * width,
                       dropout=float(published.get("resid_pdrop", 0.0)), positions=length,
                       norm_eps=float(published["layer_norm_epsilon"]),
                       target_shift=language.read_shifted(path, published, ""))
    return ModelSpec(model, language.read_objective(path, published, length, causal=True), length,
                     language.mask_id(path, published))


def to_hf_config(model: GPT2Config, objective, length: int) -> dict:
    """Content of config.json, the inverse of `from_hf_config`. Raises UserError for an objective that it cannot say."""
    del length  # the context is what positions were learned for
    return {
        "model_type": GPT2Config.kind, "architectures": ["GPT2LMHeadModel"], "vocab_size": model.vocab_size,
        "n_positions": model.positions, "n_embd": model.hidden_size, "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.intermediate_size, "resid_pdrop": model.dropout, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "layer_norm_epsilon": model.norm_eps, **{key: values[0] for key, values in CHOICES.items()},
        **language.write_objective(GPT2Config.kind, objective, model.positions, causal=True),
        **({language.SHIFTED: model.target_shift} if model.target_shift else {}),
    }


def layout(config: GPT2Config) -> dict[str, ParamMapping]:
    """Path of each of our parameters -> its published source."""
    width, hidden, layers = config.hidden_size, config.intermediate_size, range(config.num_layers)
    heads, size, block = config.num_heads, config.hidden_size // config.num_heads, f"{PREFIX}h.{{layer}}."
    table = ParamMapping(TABLE, (config.vocab_size, width), unchanged, unchanged)
    return {
        "embed.embedding": padded(table, 0, config.padded_vocab),
        "embed.position": ParamMapping(f"{PREFIX}wpe.weight", (config.positions, width), unchanged, unchanged),
        **norm("blocks.norm1", f"{block}ln_1", width, layers),
        **norm("blocks.norm2", f"{block}ln_2", width, layers),
        "blocks.qkv.kernel": matrix(f"{block}attn.c_attn.weight", (width,), (3, heads, size), layers),
        "blocks.qkv.bias": bias(f"{block}attn.c_attn.bias", (3, heads, size), layers),
        "blocks.out.kernel": matrix(f"{block}attn.c_proj.weight", (heads, size), (width,), layers),
        "blocks.out.bias": vector(f"{block}attn.c_proj.bias", width, layers),
        "blocks.mlp_in.kernel": matrix(f"{block}mlp.c_fc.weight", (width,), (hidden,), layers),
        "blocks.mlp_in.bias": vector(f"{block}mlp.c_fc.bias", hidden, layers),
        "blocks.mlp_out.kernel": matrix(f"{block}mlp.c_proj.weight", (hidden,), (width,), layers),
        "blocks.mlp_out.bias": vector(f"{block}mlp.c_proj.bias", width, layers),
        **norm("head.norm", f"{PREFIX}ln_f", width),
    }


def matrix(name: str, inputs: Sequence[int], outputs: Sequence[int], layers: Sequence[int]) -> ParamMapping:
    """A matrix that is [in, out] in both."""
    target_shape, shape = (*inputs, *outputs), (math.prod(inputs), math.prod(outputs))
    return ParamMapping(name, shape, lambda w: w.reshape(target_shape), lambda w: w.reshape(shape), layers)


def buffer_shapes(config: GPT2Config, names: set[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of tensors that may be there beside parameters: the output layer, which is the token table, and
    what older versions kept for the causal mask."""
    masks: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_layers):
        masks |= {f"{PREFIX}h.{layer}.attn.bias": (1, 1, config.positions, config.positions),
                  f"{PREFIX}h.{layer}.attn.masked_bias": ()}
    tables = (OUTPUT, TABLE) if OUTPUT in names else ()
    found = {name: shape for name, shape in masks.items() if name in names}
    return {**dict.fromkeys(tables, (config.vocab_size, config.hidden_size)), **found}


def check_buffers(path, config: GPT2Config, tensors: dict[str, np.ndarray]) -> None:
    """UserError unless the tensors of `buffer_shapes` say what the network computes."""
    language.check_tied(path, tensors, OUTPUT, TABLE)
    for name in buffer_shapes(config, set(tensors)):
        if name.endswith("attn.bias"):
            causal_mask = np.tril(np.ones((config.positions, config.positions)))
            require(np.array_equal(tensors[name][0, 0], causal_mask), f"{path}: {name} is not the causal mask")
        elif name.endswith("masked_bias"):
            require(tensors[name] <= MASKED_BIAS_MAX,
                    f"{path}: {name} is {tensors[name]}, expected at most {MASKED_BIAS_MAX:g}")
