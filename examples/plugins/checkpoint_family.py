"""A family of published checkpoints: GPT-2's network as a PyTorch script of one's own may save it, with its own names
and linear matrices [out, in].

    python -m launch convert --import=examples.plugins.checkpoint_family --from=my_checkpoint --to=runs/mine \
        --format=native

where my_checkpoint holds model.safetensors and a config.json with "model_type": "my_gpt".
"""

import sys

from bd3lm_jax.checkpoints.published import FORMATS, language
from bd3lm_jax.checkpoints.published.mapping import (
    ModelSpec,
    ParamMapping,
    bias,
    check_keys,
    linear,
    objective_from_config,
    objective_to_config,
    padded,
    unchanged,
    vector,
)
from bd3lm_jax.diffusion import AR
from bd3lm_jax.models.gpt2 import GPT2Config

MODEL_TYPES = CAUSAL = ("my_gpt",)
CONFIG_KEYS = {"vocab": int, "context": int, "width": int, "layers": int, "heads": int, "hidden": int}
READ = ()
USUAL = AR(bos=False)  # what config.json need not name


def from_hf_config(path, published, scalars):
    """The network, objective, context and mask token that config.json says."""
    del scalars
    check_keys(path, published, CONFIG_KEYS)
    model = GPT2Config(vocab_size=published["vocab"], num_layers=published["layers"], hidden_size=published["width"],
                       num_heads=published["heads"], intermediate_size=published["hidden"], dropout=0.0,
                       positions=published["context"])
    return ModelSpec(model, objective_from_config(path, published, USUAL), model.positions,
                     language.mask_id(path, published))


def to_hf_config(model, objective, length):
    """Its inverse; what it cannot say is found by reading it back."""
    del length
    return {"model_type": "my_gpt", "architectures": ["MyGPTModel"], "vocab": model.vocab_size,
            "context": model.positions, "width": model.hidden_size, "layers": model.num_layers,
            "heads": model.num_heads, "hidden": model.intermediate_size, **objective_to_config(objective, USUAL)}


def layout(config):
    """Path of each parameter of the network -> its tensors."""
    width, hidden, layers = config.hidden_size, config.intermediate_size, range(config.num_layers)
    heads, block = (config.num_heads, config.hidden_size // config.num_heads), "layers.{layer}."
    tokens = ParamMapping("tokens.weight", (config.vocab_size, width), unchanged, unchanged)
    norms = {"blocks.norm1": (f"{block}norm1", layers), "blocks.norm2": (f"{block}norm2", layers),
             "head.norm": ("norm", ())}
    return {
        "embed.embedding": padded(tokens, 0, config.padded_vocab),
        "embed.position": ParamMapping("positions.weight", (config.positions, width), unchanged, unchanged),
        **{f"{ours}.scale": vector(f"{name}.weight", width, where) for ours, (name, where) in norms.items()},
        **{f"{ours}.bias": vector(f"{name}.bias", width, where) for ours, (name, where) in norms.items()},
        "blocks.qkv.kernel": linear(f"{block}qkv.weight", width, (3, *heads), layers),
        "blocks.qkv.bias": bias(f"{block}qkv.bias", (3, *heads), layers),
        "blocks.out.kernel": linear(f"{block}out.weight", heads, width, layers),
        "blocks.out.bias": vector(f"{block}out.bias", width, layers),
        "blocks.mlp_in.kernel": linear(f"{block}widen.weight", width, hidden, layers),
        "blocks.mlp_in.bias": vector(f"{block}widen.bias", hidden, layers),
        "blocks.mlp_out.kernel": linear(f"{block}narrow.weight", hidden, width, layers),
        "blocks.mlp_out.bias": vector(f"{block}narrow.bias", width, layers),
    }


def buffer_shapes(config, names):
    """No tensors beside parameters."""
    del config, names
    return {}


def check_buffers(path, config, tensors):
    """Nothing to check of them."""


FORMATS["my_gpt"] = sys.modules[__name__]
