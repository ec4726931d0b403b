"""GPT-2: learned positions, LayerNorm before each half of a layer, GELU MLP, tied output layer.

Radford et al. 2019, "Language models are unsupervised multitask learners"; the published implementation's GELU is the
tanh approximation (arXiv 1606.08415).
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from bd3lm_jax.models.shared import (
    Layer,
    ModelConfig,
    OutputHead,
    check_config,
    embed_tokens,
    queries_keys_values,
    row_dropout,
    tied_kernel,
)
from bd3lm_jax.models.trunk import Backbone

NORMAL = nn.initializers.normal(0.02)  # the published recipe's


@dataclasses.dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """Sizes and switches of the network."""

    kind: ClassVar[str] = "gpt2"
    intermediate_size: int = 3072  # of the MLP
    dropout: float = 0.1  # of what each half of a layer adds
    positions: int = 256  # learned ones: the most tokens a document may have
    norm_eps: float = 1e-5
    target_shift: str = ""  # whether outputs are one token ahead (scoring/target_shift.py)

    def __post_init__(self):
        check_config(self, ("num_layers", "hidden_size", "num_heads", "intermediate_size", "positions"))


def build(config: GPT2Config, dtype: Any) -> Backbone:
    """The backbone that computes in `dtype`; parameters are float32."""
    return Backbone(config=config, embed=Embed(config, dtype), condition=None, rotary=lambda position: (),
                    groups=(("blocks", Block(config, dtype), config.num_layers),), head=Head(config, dtype),
                    dtype=dtype,
                    tied=True)


class Embed(nn.Module):
    """Tokens and their positions."""

    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, ids, position):
        """Tokens as `shared.embed_tokens` takes them, int32 positions `[..., T]` -> `[..., T, D]`."""
        config = self.config
        tokens = self.param("embedding", NORMAL, (config.padded_vocab, config.hidden_size))
        places = self.param("position", NORMAL, (config.positions, config.hidden_size))
        return embed_tokens(tokens, ids, self.dtype) + embed_tokens(places, position, self.dtype)


class Block(Layer):
    """A transformer layer in two halves, around the attention that the trunk does."""

    config: GPT2Config
    dtype: Any

    def setup(self):
        config, dtype = self.config, self.dtype
        size = config.hidden_size // config.num_heads
        narrow = nn.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
        self.norm1, self.norm2 = _norm(config, dtype), _norm(config, dtype)
        self.qkv = nn.DenseGeneral((3, config.num_heads, size), dtype=dtype, kernel_init=NORMAL)
        self.out = nn.DenseGeneral(config.hidden_size, axis=(-2, -1), dtype=dtype, kernel_init=narrow)
        self.mlp_in = nn.Dense(config.intermediate_size, dtype=dtype, kernel_init=NORMAL)
        self.mlp_out = nn.Dense(config.hidden_size, dtype=dtype, kernel_init=narrow)

    def project_qkv(self, h, cond, rotary, queries: bool):
        """h `[..., T, D]` -> q (None without `queries`), k, v `[..., T, H, Dh]`."""
        del cond, rotary
        return queries_keys_values(self.qkv, self.norm1(h), queries, self.dtype)

    def attention_output_and_mlp(self, h, attended, cond, dropout_keys):
        """h and attention output `[..., T, H, Dh]` -> the next h, auxiliary loss (none)."""
        del cond
        rate = self.config.dropout
        h = h + row_dropout(self.out(attended), dropout_keys, 0, rate)
        inner = nn.gelu(self.mlp_in(self.norm2(h)), approximate=True)
        return h + row_dropout(self.mlp_out(inner), dropout_keys, 1, rate), 0.0


class Head(OutputHead):
    """Final norm and the token table as output layer, without bias."""

    config: GPT2Config
    dtype: Any

    def setup(self):
        self.norm = _norm(self.config, self.dtype)

    def features(self, h, cond):
        """h `[..., T, D]` -> what the output layer multiplies, `[..., T, D]`."""
        del cond
        return self.norm(h)

    def output_layer(self):
        """Its float32 kernel `[D, V']` and bias `[V']` (zeros), V' = config.padded_vocab."""
        return tied_kernel(self), jnp.zeros(self.config.padded_vocab)


def _norm(config, dtype):
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=dtype)
