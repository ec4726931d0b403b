"""Networks by name. A backbone module offers `Config` (frozen dataclass with `kind`) and `build(config, dtype)`."""

from typing import Any, NamedTuple

from bd3lm_jax.models import bert, dit, gpt2, llama, modernbert, moe, trunk
from bd3lm_jax.models.trunk import Backbone


class Entry(NamedTuple):
    Config: type
    build: Any


BACKBONES = {
    "dit": Entry(dit.DiTConfig, dit.build),
    "bert": Entry(bert.BertConfig, bert.build),
    "gpt2": Entry(gpt2.GPT2Config, gpt2.build),
    "modernbert": Entry(modernbert.ModernBertConfig, modernbert.build),
    "llama": Entry(llama.LlamaConfig, llama.build),
    "moe": Entry(moe.MoEConfig, moe.build),
}

__all__ = ["BACKBONES", "Backbone", "build", "trunk"]


def build(config, dtype) -> Backbone:
    """The backbone of a model config, computing in `dtype`."""
    return BACKBONES[config.kind].build(config, dtype)
