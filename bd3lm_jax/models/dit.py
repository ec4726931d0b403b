"""The paper's transformer: adaLN, RoPE, LayerNorm without bias, GELU MLP (DiT, arXiv 2212.09748, as in MDLM / BD3-LM).

`adaln=False` is the published autoregressive form; with `time_conditioning` it also carries SEDD.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.models import shared
from bd3lm_jax.models.shared import Layer, ModelConfig, check_ranges, embed_tokens, queries_keys_values, row_dropout
from bd3lm_jax.models.trunk import Backbone

LEVEL_FEATURES = 256  # sinusoidal features of the noise level


@dataclasses.dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """Sizes and switches of the network."""

    kind: ClassVar[str] = "dit"
    mlp_ratio: int = 4
    dropout: float = 0.1
    adaln: bool = True
    cond_dim: int = 128
    time_conditioning: bool = False  # the noise level is an input; otherwise the adaLN input is a constant
    rope_theta: float = 10_000.0
    decoder_layers: int = 0  # last layers, which alone run on noised blocks (E2D2); 0: all of them, the plain form
    target_shift: str = ""  # whether outputs are one token ahead (scoring/target_shift.py)

    def __post_init__(self):
        check_ranges(self, ("num_layers", "hidden_size", "num_heads", "mlp_ratio", "cond_dim"))
        if not 0 <= self.decoder_layers <= self.num_layers:
            raise UserError(f"model.decoder_layers is {self.decoder_layers}, expected 0 (all layers) to "
                            f"model.num_layers={self.num_layers}")
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(f"model.hidden_size={self.hidden_size} must be a multiple of 2 * "
                            f"model.num_heads={2 * self.num_heads} (RoPE)")
        if self.time_conditioning and not self.adaln:
            raise UserError("model.time_conditioning needs model.adaln=True: the noise level enters through it")

    @property
    def first_noised_layer(self) -> int:
        return self.num_layers - self.decoder_layers if self.decoder_layers else 0


SHARDING = (
    *shared.SHARDING,
    (r"condition/fc[12]/(kernel|bias)", P()),
    (r"blocks\d*/modulation/kernel", P(None, None, None, "fsdp")),
    (r"head/modulation/kernel", P(None, None, "fsdp")),
    (r"(.*/)?modulation/bias", P()),
)


def build(config: DiTConfig, dtype: Any) -> Backbone:
    """The backbone that computes in `dtype`; parameters are float32."""
    head_size = config.hidden_size // config.num_heads
    frequencies = config.rope_theta ** (-jnp.arange(0, head_size, 2) / head_size)

    def rotary(position):
        """cos and sin `[..., T, 1, Dh / 2]`, float32."""
        angle = position[..., None, None].astype(jnp.float32) * frequencies
        return jnp.cos(angle), jnp.sin(angle)

    return Backbone(config=config, embed=Embed(config, dtype), condition=Condition(config) if config.adaln else None,
                    rotary=rotary, groups=(("blocks", Block(config, dtype), config.num_layers),),
                    head=Head(config, dtype), dtype=dtype)


# PyTorch's default for linear layers, U(+-1 / sqrt(fan_in)), which the published recipe keeps.
UNIFORM_FAN_IN = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Embed(nn.Module):
    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids, position=None):
        """int32 `[..., T]`, or weights of the vocabulary's tokens float `[..., T, V]` -> `[..., T, D]`."""
        del position  # enters by RoPE
        shape = (self.config.padded_vocab, self.config.hidden_size)
        bound = 1 / math.sqrt(self.config.hidden_size)
        table = self.param("embedding", lambda key: jax.random.uniform(key, shape, jnp.float32, -bound, bound))
        return embed_tokens(table, ids, self.dtype)


class Condition(nn.Module):
    """Noise level -> the input of every adaLN: `[..., n]` -> `[..., n, cond_dim]`, float32."""

    config: DiTConfig

    def setup(self):
        self.fc1 = nn.Dense(self.config.cond_dim, kernel_init=nn.initializers.normal(0.02))
        self.fc2 = nn.Dense(self.config.cond_dim, kernel_init=nn.initializers.normal(0.02))

    def __call__(self, sigma):
        half = LEVEL_FEATURES // 2
        frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half) / half)
        angle = sigma[..., None] * frequencies
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return nn.silu(self.fc2(nn.silu(self.fc1(features))))


class Block(Layer):
    """A transformer layer in two halves, around the attention that the trunk does."""

    config: DiTConfig
    dtype: Any

    def setup(self):
        config, dtype = self.config, self.dtype
        heads, size = config.num_heads, config.hidden_size // config.num_heads
        self.norm1, self.norm2 = _norm(dtype), _norm(dtype)
        self.qkv = nn.DenseGeneral((3, heads, size), use_bias=False, dtype=dtype, kernel_init=UNIFORM_FAN_IN)
        self.out = nn.DenseGeneral(config.hidden_size, axis=(-2, -1), use_bias=False, dtype=dtype,
                                   kernel_init=UNIFORM_FAN_IN)
        self.mlp_in = nn.Dense(config.mlp_ratio * config.hidden_size, dtype=dtype, kernel_init=UNIFORM_FAN_IN)
        self.mlp_out = nn.Dense(config.hidden_size, dtype=dtype, kernel_init=UNIFORM_FAN_IN)
        if config.adaln:
            self.modulation = _modulation(6, config, dtype)

    def project_qkv(self, h, cond, rotary, queries: bool):
        """h `[..., T, D]` -> q (None without `queries`), k, v `[..., T, H, Dh]`, rotated."""
        shift, scale = self._modulate(h, cond, 0, 1)
        x = _affine(self.norm1(h), shift, scale)
        q, k, v = queries_keys_values(self.qkv, x, queries, self.dtype)
        return rotate(q, rotary) if queries else None, rotate(k, rotary), v

    def attention_output_and_mlp(self, h, attended, cond, dropout_keys):
        """h and attention output `[..., T, H, Dh]` -> the next h, auxiliary loss (none)."""
        gate1, shift, scale, gate2 = self._modulate(h, cond, 2, 3, 4, 5)
        rate = self.config.dropout
        h = h + _gated(row_dropout(self.out(attended), dropout_keys, 0, rate), gate1)
        inner = nn.gelu(self.mlp_in(_affine(self.norm2(h), shift, scale)), approximate=True)
        return h + _gated(row_dropout(self.mlp_out(inner), dropout_keys, 1, rate), gate2), 0.0

    def _modulate(self, h, cond, *parts):
        if not self.config.adaln:
            return (None,) * len(parts)
        return _per_token(self.modulation(cond), h.shape[-2], parts)


class Head(nn.Module):
    """Final norm and the untied, zero-initialised output layer."""

    config: DiTConfig
    dtype: Any

    def setup(self):
        self.norm = _norm(self.dtype)
        self.linear = nn.Dense(self.config.padded_vocab, dtype=self.dtype, kernel_init=nn.initializers.zeros,
                               dot_general=_float32_products)
        if self.config.adaln:
            self.modulation = _modulation(2, self.config, self.dtype)

    def __call__(self, h, cond):
        """h `[..., T, D]` -> logits float32 `[..., T, V]`, without the padding of the vocabulary."""
        return self.linear(self.features(h, cond)).astype(jnp.float32)[..., :self.config.vocab_size]

    def features(self, h, cond):
        """h `[..., T, D]` -> what the output layer multiplies, `[..., T, D]`."""
        h = self.norm(h)
        if self.config.adaln:
            h = _affine(h, *_per_token(self.modulation(cond), h.shape[-2], (0, 1)))
        return h

    def output_layer(self):
        """Its float32 kernel `[D, V']` and bias `[V']`, V' = config.padded_vocab."""
        params = self.linear.variables["params"]
        return params["kernel"], params["bias"]


def rotate(x, rotary):
    """RoPE, half-split layout (arXiv 2104.09864): x `[..., T, H, Dh]`, rotary cos and sin `[..., T, 1, Dh / 2]`."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _norm(dtype):
    return nn.LayerNorm(epsilon=1e-5, use_bias=False, dtype=dtype)


def _modulation(parts, config, dtype):
    return nn.DenseGeneral((parts, config.hidden_size), dtype=dtype, kernel_init=nn.initializers.zeros)


def _per_token(modulation, length, parts):
    """`[..., n, P, D]` -> for each wanted part `[..., length, D]` (n parts of the row), or `[..., 1, D]` if n = 1."""
    n = modulation.shape[-3]
    chosen = [modulation[..., part, :] for part in parts]
    return chosen if n in (1, length) else [jnp.repeat(x, length // n, axis=-2) for x in chosen]


def _affine(x, shift, scale):
    return x if shift is None else x * (1 + scale) + shift


def _gated(x, gate):
    return x if gate is None else gate * x


def _float32_products(*args, **kwargs):
    """The head's matrix product accumulates and returns float32 whatever the compute dtype."""
    kwargs["preferred_element_type"] = jnp.float32
    return jax.lax.dot_general(*args, **kwargs)
