"""Layouts of published checkpoints, one file a family of architectures; `hf.py` reads and writes them.

A family is a module that offers
    MODEL_TYPES: what "model_type" in config.json may be
    CONFIG_KEYS: {key of config.json: type}             keys that must be there; READ: others that it reads
    from_hf_config(path, published, scalars) -> ModelSpec    what config.json says; scalars: tensors without axes
    to_hf_config(model config, objective, length) -> dict    its inverse, with "model_type" and "architectures"
    layout(model config) -> {path of our parameter: ParamMapping}
    buffer_shapes(model config, names) -> {name: shape}      tensors beside parameters that must be there
    check_buffers(path, model config, tensors)               ... and what they must say
and, where there is something to say,
    CHOICES: {key of config.json: values that are computed}
    CAUSAL: those of MODEL_TYPES whose other implementations see the tokens so far
    constants(model config, objective) -> {name: array}      tensors beside parameters that are written
    rename(name) -> name                                     of a tensor that had another name once
and is one more line here, in NETWORKS as well if it is how networks of a kind are written. From outside the package the
line is `FORMATS["my_type"] = sys.modules[__name__]`.
"""

from types import ModuleType

from bd3lm_jax.checkpoints.published import bd3lm, bert, gpt2, llada, llama, modernbert, moe
from bd3lm_jax.checkpoints.published.mapping import ModelSpec, ParamMapping

FORMATS: dict[str, ModuleType] = {
    kind: module for module in (bd3lm, llama, llada, bert, gpt2, modernbert, moe) for kind in module.MODEL_TYPES}
NETWORKS: dict[str, ModuleType] = {
    "dit": bd3lm, "llama": llama, "bert": bert, "gpt2": gpt2, "modernbert": modernbert, "moe": moe}
OWN_MODEL_TYPES = bd3lm.MODEL_TYPES  # whose published code reads the objective from config.json

__all__ = ["FORMATS", "NETWORKS", "OWN_MODEL_TYPES", "ModelSpec", "ParamMapping"]
