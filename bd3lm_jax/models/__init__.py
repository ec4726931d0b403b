"""Networks by name: one file each, with everything that is said of the network, and one line here.

A module outside the package adds a network by the same line, `BACKBONES[name] = Entry(...)`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from bd3lm_jax.core.typed import default_values
from bd3lm_jax.models import bert, dit, gpt2, llama, modernbert, moe, shared, trunk
from bd3lm_jax.models.shared import ModelConfig
from bd3lm_jax.models.trunk import Backbone
from bd3lm_jax.parallel.sharding import Rules


class Entry(NamedTuple):
    """A network: its config, `build(config, dtype)`, where its parameters lie, and other sizes than its config's
    defaults (name -> fields)."""

    Config: type[ModelConfig]
    build: Any
    sharding: Rules = shared.SHARDING
    sizes: Mapping[str, Mapping[str, Any]] = MappingProxyType(shared.SIZES)


BACKBONES = {
    "dit": Entry(dit.DiTConfig, dit.build, dit.SHARDING),
    "bert": Entry(bert.BertConfig, bert.build, bert.SHARDING),
    "gpt2": Entry(gpt2.GPT2Config, gpt2.build),
    "modernbert": Entry(modernbert.ModernBertConfig, modernbert.build, modernbert.SHARDING),
    "llama": Entry(llama.LlamaConfig, llama.build),
    "moe": Entry(moe.MoEConfig, moe.build, moe.SHARDING),
}

__all__ = ["BACKBONES", "Backbone", "Entry", "ModelConfig", "build", "default_section", "sharding_rules",
           "trunk"]


def build(config, dtype) -> Backbone:
    """The backbone of a model config, computing in `dtype`."""
    return BACKBONES[config.kind].build(config, dtype)


def default_section(kind: str) -> dict[str, Any]:
    """The section `model` of a config with a network, all of its keys at their defaults."""
    return {"kind": kind} | default_values(BACKBONES[kind].Config)


def sharding_rules(config) -> Rules:
    """Where the parameters of a network lie, by their paths (`parallel.sharding.param_specs`)."""
    return BACKBONES[config.kind].sharding
