"""A network: transformer layers without norms, with a ReLU and learned positions.

    python -m launch train --import=examples.plugins.network --config=my_config.py --workdir=runs/relu

where my_config.py holds

    from configs import common, tiny

    def get_config():
        config = tiny.get_config()
        common.set_model(config, "relu")
        return config
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
from jax.sharding import PartitionSpec as P

from bd3lm_jax.models import BACKBONES, Backbone, Entry, ModelConfig, gpt2, shared


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """The keys of `model` with their defaults. FLOPs are counted from the layers themselves."""

    kind: ClassVar[str] = "relu"
    num_layers: int = 2
    hidden_size: int = 32
    num_heads: int = 4
    intermediate_size: int = 48
    positions: int = 256
    norm_eps: float = 1e-5


class Block(nn.Module):
    """A layer in two parts, between which the library computes attention (bd3lm_jax/models/trunk.py, `Backbone`)."""

    config: Config
    dtype: Any

    def setup(self):
        width, heads = self.config.hidden_size, self.config.num_heads
        self.qkv = nn.DenseGeneral((3, heads, width // heads), dtype=self.dtype)
        self.out = nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype)
        self.widen = nn.Dense(self.config.intermediate_size, use_bias=False, dtype=self.dtype)
        self.narrow = nn.Dense(width, use_bias=False, dtype=self.dtype)

    def __call__(self, h, cond, rotary):
        """All parameters once, for `init`."""
        *_, v = self.project_qkv(h, cond, rotary, True)
        return self.attention_output_and_mlp(h, v, cond, None)

    def project_qkv(self, h, cond, rotary, queries):
        return shared.queries_keys_values(self.qkv, h, queries, self.dtype)

    def attention_output_and_mlp(self, h, attended, cond, dropout_keys):
        h = h + self.out(attended)
        return h + self.narrow(nn.relu(self.widen(h))), 0.0


def build(config, dtype):
    return Backbone(config=config, embed=gpt2.Embed(config, dtype), condition=None, rotary=lambda position: (),
                    groups=(("blocks", Block(config, dtype), config.num_layers),), head=gpt2.Head(config, dtype),
                    dtype=dtype, tied=True)


SHARDING = (*shared.SHARDING, (r"blocks/widen/kernel", P(None, "fsdp", "tensor")),
            (r"blocks/narrow/kernel", P(None, "tensor", "fsdp")))
BACKBONES["relu"] = Entry(Config, build, SHARDING, {"tiny": {"num_layers": 1}})
