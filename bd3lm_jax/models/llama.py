"""The transformer of Llama, Qwen2, Qwen3, Mistral, SmolLM2, LLaDA and Dream.

RMSNorm, RoPE, grouped queries (arXiv 2305.13245), SwiGLU (arXiv 2002.05202). What tells these families apart are sizes
and a few switches; whether a token sees later ones is for the objective to say.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.models.dit import rotate
from bd3lm_jax.models.shared import Layer, ModelConfig, OutputHead, check_ranges, embed_tokens, row_dropout, tied_kernel
from bd3lm_jax.models.trunk import Backbone

INIT = nn.initializers.normal(0.02)  # of every matrix, as in the published training codes
NORMAL, LINEAR, LLAMA3 = 0, 1, 4  # numbers in rope_scaling: none, a factor, the form of Llama 3.1


@dataclasses.dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Sizes and switches of the network."""

    kind: ClassVar[str] = "llama"
    num_kv_heads: int = 4  # heads of keys and values, each shared by heads / kv_heads queries
    head_dim: int = 64
    intermediate_size: int = 2048  # of the MLP
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()  # (): none; (factor,): all wavelengths longer; Llama 3.1: `llama3_frequencies`
    norm_eps: float = 1e-5
    qkv_bias: bool = False  # Qwen2, Dream
    qk_norm: bool = False  # RMSNorm of every query and key before RoPE (Qwen3)
    tie_embeddings: bool = False  # the output layer is the embedding table
    target_shift: str = ""  # whether outputs are one token ahead (scoring/target_shift.py)

    def __post_init__(self):
        check_sizes(self, ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"))
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}, expected an even number (RoPE)")
        if len(self.rope_scaling) not in (NORMAL, LINEAR, LLAMA3) or not all(x > 0 for x in self.rope_scaling):
            raise UserError(f"model.rope_scaling is {self.rope_scaling}, expected (), (factor,) or (factor, low, high, "
                            "original context), all above 0")


def check_sizes(config: Any, positive: tuple[str, ...]) -> None:
    """UserError unless these fields are positive and what all networks of this kind have is in order."""
    check_ranges(config, positive)
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"model.num_kv_heads={config.num_kv_heads} does not divide model.num_heads={config.num_heads}")
    if not (config.norm_eps > 0 and config.rope_theta > 1):
        raise UserError(f"model.norm_eps is {config.norm_eps} and model.rope_theta {config.rope_theta}, expected "
                        "above 0 and above 1")


def build(config: LlamaConfig, dtype: Any) -> Backbone:
    """The backbone that computes in `dtype`; parameters are float32."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta)
    if len(config.rope_scaling) == LINEAR:
        frequencies = frequencies / config.rope_scaling[0]
    elif len(config.rope_scaling) == LLAMA3:
        frequencies = llama3_frequencies(frequencies, *config.rope_scaling)
    return Backbone(config=config, embed=Embed(config, dtype), condition=None, rotary=make_rotary(frequencies),
                    groups=(("blocks", Block(config, dtype), config.num_layers),), head=Head(config, dtype),
                    dtype=dtype,
                    tied=config.tie_embeddings)


def rope_frequencies(rotary_dims: int, base: float) -> np.ndarray:
    """Radians a position of each pair among the `rotary_dims` numbers of a head (arXiv 2104.09864): float64
    `[rotary_dims / 2]`.
    """
    return base ** (-np.arange(0, rotary_dims, 2) / rotary_dims)


def llama3_frequencies(frequencies, factor: float, low: float, high: float, context: float) -> np.ndarray:
    """Frequencies for a longer context (Llama 3.1, arXiv 2407.21783): those that turn less than `low` times in the
    original context are divided by `factor`, those above `high` times kept, and between them both are mixed."""
    high_frequency_weight = np.clip((context * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    return (high_frequency_weight + (1 - high_frequency_weight) / factor) * frequencies


def make_rotary(frequencies: np.ndarray):
    """positions -> what `parts.rotate` takes."""
    frequency = jnp.asarray(frequencies, jnp.float32)

    def rotary(position):
        """cos and sin `[..., T, 1, R / 2]`, float32."""
        angle = position[..., None, None].astype(jnp.float32) * frequency
        return jnp.cos(angle), jnp.sin(angle)
    return rotary


class Embed(nn.Module):
    config: Any
    dtype: Any

    @nn.compact
    def __call__(self, ids, position=None):
        """int32 `[..., T]`, or weights of the vocabulary's tokens float `[..., T, V]` -> `[..., T, D]`."""
        del position  # enters by RoPE
        table = self.param("embedding", INIT, (self.config.padded_vocab, self.config.hidden_size), jnp.float32)
        return embed_tokens(table, ids, self.dtype)


class Block(Layer):
    """A transformer layer in two halves, around the attention that the trunk does."""

    config: LlamaConfig
    dtype: Any

    def setup(self):
        config, dtype = self.config, self.dtype
        self.norm1, self.norm2 = (rms_norm(config.norm_eps, dtype) for _ in range(2))
        self.q = head_projection(config.num_heads, config.head_dim, config.qkv_bias, dtype)
        self.k = head_projection(config.num_kv_heads, config.head_dim, config.qkv_bias, dtype)
        self.v = head_projection(config.num_kv_heads, config.head_dim, config.qkv_bias, dtype)
        if config.qk_norm:
            self.q_norm, self.k_norm = (rms_norm(config.norm_eps, dtype) for _ in range(2))
        self.out = output_projection(config.hidden_size, dtype)
        self.gate, self.up = (dense(config.intermediate_size, dtype) for _ in range(2))
        self.down = dense(config.hidden_size, dtype)

    def project_qkv(self, h, cond, rotary, queries: bool):
        """h `[..., T, D]` -> q `[..., T, H, Dh]` (None without `queries`), k, v `[..., T, Hkv, Dh]`, rotated."""
        x = self.norm1(h)
        q, k = self.q(x) if queries else None, self.k(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q) if queries else None, self.k_norm(k)
        return rotate(q, rotary) if queries else None, rotate(k, rotary), self.v(x)

    def attention_output_and_mlp(self, h, attended, cond, dropout_keys):
        """h and attention output `[..., T, H, Dh]` -> the next h, auxiliary loss (none)."""
        rate = self.config.dropout
        h = h + row_dropout(self.out(attended), dropout_keys, 0, rate)
        x = self.norm2(h)
        return h + row_dropout(self.down(nn.silu(self.gate(x)) * self.up(x)), dropout_keys, 1, rate), 0.0


class Head(OutputHead):
    """Final norm and the output layer without bias, tied to the embedding table or not."""

    config: Any
    dtype: Any

    def setup(self):
        self.norm = rms_norm(self.config.norm_eps, self.dtype)
        if not self.config.tie_embeddings:
            self.linear = Kernel((self.config.hidden_size, self.config.padded_vocab))

    def features(self, h, cond):
        """h `[..., T, D]` -> what the output layer multiplies, `[..., T, D]`."""
        return self.norm(h)

    def output_layer(self):
        """Its float32 kernel `[D, V']` and bias `[V']` (zeros), V' = config.padded_vocab."""
        kernel_DxV = tied_kernel(self) if self.config.tie_embeddings else self.linear()
        return kernel_DxV, jnp.zeros(kernel_DxV.shape[1], jnp.float32)


class Kernel(nn.Module):
    """A float32 parameter "kernel" by itself."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        return self.param("kernel", INIT, self.shape, jnp.float32)


def rms_norm(eps: float, dtype: Any) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467), float32 inside."""
    return nn.RMSNorm(epsilon=eps, dtype=dtype)


def dense(outputs: int, dtype: Any) -> nn.Dense:
    return nn.Dense(outputs, use_bias=False, dtype=dtype, kernel_init=INIT)


def head_projection(heads: int, size: int, bias: bool, dtype: Any) -> nn.DenseGeneral:
    """`[..., D]` -> `[..., heads, size]`."""
    return nn.DenseGeneral((heads, size), use_bias=bias, dtype=dtype, kernel_init=INIT)


def output_projection(width: int, dtype: Any) -> nn.DenseGeneral:
    """`[..., H, Dh]` -> `[..., width]`."""
    return nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, dtype=dtype, kernel_init=INIT)
