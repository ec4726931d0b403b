"""Layouts of published checkpoints, one file a family of architectures; `hf.py` reads and writes them.

A format module offers
    MODEL_TYPES: what "model_type" in config.json may be
    describe(path, published, scalars) -> Described     what config.json says
    layout(model config) -> {path of our parameter: Leaf}
    held(model config, names) -> {name: shape}          tensors beside parameters that must be there
    check_held(path, model config, tensors)             ... and what they must say
    publish(model config, objective, length) -> dict    the inverse of describe: content of config.json
    rename(name) -> name, if older files name tensors otherwise
and is one more line here.
"""

from bd3lm_jax.published import bd3lm, bert, gpt2, llada, llama, modernbert, moe
from bd3lm_jax.published.leaf import Described, Leaf

FORMATS = {kind: module for module in (bd3lm, llama, llada, moe, bert, gpt2, modernbert)
           for kind in module.MODEL_TYPES}

__all__ = ["FORMATS", "Described", "Leaf"]
