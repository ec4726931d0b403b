"""Layouts of published checkpoints, one file a family of architectures; `hf.py` reads and writes them.

A format module offers
    MODEL_TYPES: what "model_type" in config.json may be
    describe(path, published, scalars) -> Described     what config.json says
    layout(model config) -> {path of our parameter: Leaf}
    held(model config, names) -> {name: shape}          tensors beside parameters that must be there
    check_held(path, model config, tensors)             ... and what they must say
    publish(model config, objective, length) -> dict    the config.json of such a network
and, where there is something to say,
    constants(model config, objective) -> {name: array} tensors beside parameters that are written
    rename(name) -> name                                of a tensor that had another name once
and is one more line here, in NETWORKS as well if it is how networks of a kind are written.
"""

from bd3lm_jax.checkpoints.published import bd3lm, bert, gpt2, llada, llama, modernbert, moe
from bd3lm_jax.checkpoints.published.mapping import ModelSpec, ParamMapping

FORMATS = {kind: module for module in (bd3lm, llama, llada, bert, gpt2, modernbert, moe) for kind in module.MODEL_TYPES}
NETWORKS = {"dit": bd3lm, "llama": llama, "bert": bert, "gpt2": gpt2, "modernbert": modernbert, "moe": moe}
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")  # model types whose other implementations see the tokens so far
OWN_MODEL_TYPES = bd3lm.MODEL_TYPES  # ... whose published code reads the objective from config.json

__all__ = ["CAUSAL", "FORMATS", "NETWORKS", "OWN_MODEL_TYPES", "ModelSpec", "ParamMapping"]
