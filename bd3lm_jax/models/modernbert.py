"""ModernBERT (arXiv 2412.13663): RoPE, LayerNorm without bias before each half of a layer, GeGLU, and layers that see a
window between layers that see everything, each with a RoPE base of its own.

The first layer has no norm before its attention: the embedding has just had one.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.models import shared
from bd3lm_jax.models.dit import rotate
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
class ModernBertConfig(ModelConfig):
    """Sizes and switches of the network."""

    kind: ClassVar[str] = "modernbert"
    intermediate_size: int = 1152  # of the MLP, which has as many gates
    dropout: float = 0.0  # of what the MLP adds
    window: int = 64  # local layers see so many tokens to either side
    # numbers of the layers with a window; the others see everything
    local_layers: tuple[int, ...] = (1, 2, 4, 5, 7, 8, 10, 11)
    rope_theta: float = 160_000.0  # of the layers that see everything
    local_rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        check_config(self, ("num_layers", "hidden_size", "num_heads", "intermediate_size", "window"))
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(f"model.hidden_size={self.hidden_size} must be a multiple of 2 * "
                            f"model.num_heads={2 * self.num_heads} (RoPE)")
        if not set(self.local_layers) <= set(range(self.num_layers)):
            raise UserError(f"model.local_layers is {self.local_layers}, expected numbers from 0 to "
                            f"model.num_layers-1={self.num_layers - 1}")

    def runs(self) -> tuple[tuple[str, range, bool], ...]:
        """Neighbouring layers that are alike, which are stacked: name, their numbers, whether they see a window."""
        local = [layer in self.local_layers for layer in range(self.num_layers)]
        starts = [layer for layer in range(self.num_layers) if layer < 2 or local[layer] != local[layer - 1]]
        return tuple((f"blocks{i}", range(start, stop), local[start])
                     for i, (start, stop) in enumerate(zip(starts, [*starts[1:], self.num_layers])))


SHARDING = (*shared.SHARDING, (r"blocks\d*/gated_in/kernel", P(None, "fsdp", None, "tensor")))


def build(config: ModernBertConfig, dtype: Any) -> Backbone:
    """The backbone that computes in `dtype`; parameters are float32."""
    size = config.hidden_size // config.num_heads
    frequencies = [base ** (-jnp.arange(0, size, 2) / size) for base in (config.rope_theta, config.local_rope_theta)]

    def rotary(position):
        """cos and sin `[..., T, 1, Dh / 2]`, float32: of layers that see everything, and of local ones."""
        angles = [position[..., None, None].astype(jnp.float32) * x for x in frequencies]
        return tuple((jnp.cos(angle), jnp.sin(angle)) for angle in angles)

    groups = tuple((name, Block(config, dtype, layers[0] == 0, config.window if local else None), len(layers))
                   for name, layers, local in config.runs())
    return Backbone(config=config, embed=Embed(config, dtype), condition=None, rotary=rotary, groups=groups,
                    head=Head(config, dtype), dtype=dtype, tied=True)


class Embed(nn.Module):
    config: ModernBertConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids, position):
        """Tokens as `shared.embed_tokens` takes them -> `[..., T, D]`."""
        del position  # enters by RoPE
        tokens = self.param("embedding", NORMAL, (self.config.padded_vocab, self.config.hidden_size))
        return _norm(self.config, self.dtype, name="norm")(embed_tokens(tokens, ids, self.dtype))


class Block(Layer):
    """A transformer layer in two halves, around the attention that the trunk does; window: None for everything."""

    config: ModernBertConfig
    dtype: Any
    first: bool  # of all layers
    window: int | None

    def setup(self):
        config, dtype = self.config, self.dtype
        size = config.hidden_size // config.num_heads
        scaled_init = nn.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
        if not self.first:
            self.norm1 = _norm(config, dtype)
        self.norm2 = _norm(config, dtype)
        self.qkv = nn.DenseGeneral((3, config.num_heads, size), use_bias=False, dtype=dtype, kernel_init=NORMAL)
        self.out = nn.DenseGeneral(config.hidden_size, axis=(-2, -1), use_bias=False, dtype=dtype,
                                   kernel_init=scaled_init)
        self.gated_in = nn.DenseGeneral((2, config.intermediate_size), use_bias=False, dtype=dtype, kernel_init=NORMAL)
        self.mlp_out = nn.Dense(config.hidden_size, use_bias=False, dtype=dtype, kernel_init=scaled_init)

    def project_qkv(self, h, cond, rotary, queries: bool):
        """h `[..., T, D]` -> q (None without `queries`), k, v `[..., T, H, Dh]`, rotated."""
        del cond
        rotary = rotary[self.window is not None]
        q, k, v = queries_keys_values(self.qkv, h if self.first else self.norm1(h), queries, self.dtype)
        return rotate(q, rotary) if queries else None, rotate(k, rotary), v

    def attention_output_and_mlp(self, h, attended, cond, dropout_keys):
        """h and attention output `[..., T, H, Dh]` -> the next h, auxiliary loss (none)."""
        del cond
        h = h + self.out(attended)
        x, gate = jnp.moveaxis(self.gated_in(self.norm2(h)), -2, 0)
        inner = nn.gelu(x, approximate=False) * gate
        return h + self.mlp_out(row_dropout(inner, dropout_keys, 0, self.config.dropout)), 0.0


class Head(OutputHead):
    """Final norm, then the masked-token head: dense layer, GELU and norm, the token table with a bias."""

    config: ModernBertConfig
    dtype: Any

    def setup(self):
        self.norm1, self.norm2 = _norm(self.config, self.dtype), _norm(self.config, self.dtype)
        self.dense = nn.Dense(self.config.hidden_size, use_bias=False, dtype=self.dtype, kernel_init=NORMAL)
        self.bias = self.param("bias", nn.initializers.zeros, (self.config.padded_vocab,))

    def features(self, h, cond):
        """h `[..., T, D]` -> what the output layer multiplies, `[..., T, D]`."""
        del cond
        return self.norm2(nn.gelu(self.dense(self.norm1(h)), approximate=False))

    def output_layer(self):
        """Its float32 kernel `[D, V']` and bias `[V']`, V' = config.padded_vocab."""
        return tied_kernel(self), self.bias


def _norm(config, dtype, name=None):
    return nn.LayerNorm(epsilon=config.norm_eps, use_bias=False, dtype=dtype, name=name)
