"""LLaDA2 (arXiv 2512.15745): a mixture of experts with grouped routing, as Ling 2 and DeepSeek-V3.

The first layers are dense; the others send every token through shared experts and its own few (see experts.py).
Queries and keys are normed per head; the first part of a head turns (partial RoPE), the rest does not.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.models import experts, shared
from bd3lm_jax.models.dit import rotate
from bd3lm_jax.models.llama import (
    INIT,
    Embed,
    Head,
    Kernel,
    check_sizes,
    dense,
    make_rotary,
    output_projection,
    rms_norm,
    rope_frequencies,
)
from bd3lm_jax.models.shared import Layer, ModelConfig, row_dropout
from bd3lm_jax.models.trunk import Backbone
from bd3lm_jax.parallel.sharding import EXPERT_AXES


@dataclasses.dataclass(frozen=True)
class MoEConfig(ModelConfig):
    """Sizes and switches of the network."""

    kind: ClassVar[str] = "moe"
    dense_layers: int = 1  # the first ones, without experts
    num_kv_heads: int = 4  # heads of keys and values, each shared by heads / kv_heads queries
    head_dim: int = 64
    rotary_dim: int = 32  # numbers of a head that turn
    intermediate_size: int = 2048  # of the MLP of dense layers
    num_experts: int = 16
    expert_intermediate_size: int = 512
    shared_intermediate_size: int = 512  # of what every token goes through beside its experts; 0: nothing
    top_k: int = 2  # experts of a token
    groups: int = 4  # of experts
    top_groups: int = 2  # groups that a token may choose from
    routed_scale: float = 2.5  # of the experts' sum
    load_balancing: float = 0.01  # coefficient of `experts.load_balancing_loss` of every layer; 0: none
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True
    tie_embeddings: bool = False  # the output layer is the embedding table

    def __post_init__(self):
        check_sizes(self, ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
                           "num_experts", "expert_intermediate_size", "top_k", "groups", "top_groups"))
        if not 0 <= self.dense_layers < self.num_layers:
            raise UserError(f"model.dense_layers is {self.dense_layers}, expected 0 to model.num_layers - 1 = "
                            f"{self.num_layers - 1}: with dense layers alone use model.kind='llama'")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(f"model.rotary_dim is {self.rotary_dim}, expected an even number up to model.head_dim="
                            f"{self.head_dim}")
        if self.num_experts % self.groups or self.num_experts < 2 * self.groups:
            raise UserError(f"model.groups={self.groups} must divide model.num_experts={self.num_experts} into groups "
                            "of at least 2")
        most = self.top_groups * (self.num_experts // self.groups)
        if self.top_groups > self.groups or self.top_k > most:
            raise UserError(f"model.top_groups={self.top_groups} of {self.groups} groups hold {most} experts, expected "
                            f"at most {self.groups} groups, and at least model.top_k={self.top_k} experts in them")
        if self.shared_intermediate_size < 0 or self.load_balancing < 0 or self.routed_scale <= 0:
            raise UserError(f"model.shared_intermediate_size={self.shared_intermediate_size} and "
                            f"model.load_balancing={self.load_balancing} must be at "
                            f"least 0, model.routed_scale={self.routed_scale} above 0")


SHARDING = (
    *shared.SHARDING,
    (r"blocks\d*/grouped_qkv/kernel", P(None, "fsdp", "tensor", None, None)),
    (r"blocks\d*/(mlp|shared)/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"blocks\d*/(mlp|shared)/down/kernel", P(None, "tensor", "fsdp")),
    (r"blocks\d*/router/(kernel|bias)", P()),
    (r"blocks\d*/experts/(gate|up)/kernel", P(None, EXPERT_AXES, "fsdp", None)),
    (r"blocks\d*/experts/down/kernel", P(None, EXPERT_AXES, None, "fsdp")),
)


def build(config: MoEConfig, dtype: Any) -> Backbone:
    """The backbone that computes in `dtype`; parameters, router and routing are float32."""
    groups = (("blocks0", Block(config, dtype, False), config.dense_layers),
              ("blocks1", Block(config, dtype, True), config.num_layers - config.dense_layers))
    return Backbone(config=config, embed=Embed(config, dtype), condition=None,
                    rotary=make_rotary(rope_frequencies(config.rotary_dim, config.rope_theta)),
                    groups=tuple(group for group in groups if group[2]), head=Head(config, dtype), dtype=dtype,
                    tied=config.tie_embeddings)


class Block(Layer):
    """A layer in two halves, around the attention that the trunk does; its MLP is dense or `sparse`."""

    config: MoEConfig
    dtype: Any
    sparse: bool

    def setup(self):
        config, dtype = self.config, self.dtype
        queries_per_kv = config.num_heads // config.num_kv_heads
        self.norm1, self.norm2 = (rms_norm(config.norm_eps, dtype) for _ in range(2))
        # By key head its queries, the key, the value: heads that belong together stay on one device.
        self.grouped_qkv = nn.DenseGeneral((config.num_kv_heads, queries_per_kv + 2, config.head_dim), use_bias=False,
                                           dtype=dtype, kernel_init=INIT)
        if config.qk_norm:
            self.q_norm, self.k_norm = (rms_norm(config.norm_eps, dtype) for _ in range(2))
        self.out = output_projection(config.hidden_size, dtype)
        if not self.sparse:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, dtype)
            return
        self.router = Router(config.hidden_size, config.num_experts)
        self.experts = Experts(config, dtype)
        if config.shared_intermediate_size:
            self.shared = SwiGLU(config.hidden_size, config.shared_intermediate_size, dtype)

    def project_qkv(self, h, cond, rotary, queries: bool):
        """h `[..., T, D]` -> q `[..., T, H, Dh]` (None without `queries`), k, v `[..., T, Hkv, Dh]`, rotated."""
        x, q = self.norm1(h), None
        if queries:
            qkv = self.grouped_qkv(x)
            q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
            q = q.reshape(*q.shape[:-3], self.config.num_heads, self.config.head_dim)
            q = self._norm_and_rotate(q, "q_norm", rotary)
        else:
            kernel = self.grouped_qkv.variables["params"]["kernel"][..., -2:, :].astype(self.dtype)
            k, v = jnp.moveaxis(jnp.tensordot(x, kernel, 1), -2, 0)
        return q, self._norm_and_rotate(k, "k_norm", rotary), v

    def _norm_and_rotate(self, x, norm: str, rotary):
        """Queries or keys, normed, their first numbers turned by position."""
        x, rotary_dims = getattr(self, norm)(x) if self.config.qk_norm else x, self.config.rotary_dim
        return jnp.concatenate([rotate(x[..., :rotary_dims], rotary), x[..., rotary_dims:]], axis=-1)

    def attention_output_and_mlp(self, h, attended, cond, dropout_keys):
        """h and attention output `[..., T, H, Dh]` -> the next h, the load-balancing loss times its coefficient."""
        rate = self.config.dropout
        h = h + row_dropout(self.out(attended), dropout_keys, 0, rate)
        x = self.norm2(h)
        if not self.sparse:
            return h + row_dropout(self.mlp(x), dropout_keys, 1, rate), 0.0
        config, aux = self.config, 0.0
        routing = experts.route(*self.router(x), groups=config.groups, top_groups=config.top_groups,
                                top_k=config.top_k, scale=config.routed_scale)
        if config.load_balancing:
            real = jnp.any(attended != 0, axis=(-2, -1))  # padding sees nobody: exactly nothing
            aux = config.load_balancing * experts.load_balancing_loss(routing, real)
        expert_output = self.experts(x, routing)
        if config.shared_intermediate_size:
            expert_output = expert_output + self.shared(x)
        return h + row_dropout(expert_output, dropout_keys, 1, rate), aux

    def padding_flops(self, tokens: int) -> int:
        """FLOPs of the empty slots among the experts' tiles, which are computed and not needed."""
        if not self.sparse:
            return 0
        tiles, size = experts.tile_shape(tokens * self.config.top_k, self.config.num_experts)
        return 6 * self.config.hidden_size * self.config.expert_intermediate_size * (tiles * size - tokens
                                                                                     * self.config.top_k)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    width: int
    hidden: int
    dtype: Any

    def setup(self):
        self.gate, self.up = (dense(self.hidden, self.dtype) for _ in range(2))
        self.down = dense(self.width, self.dtype)

    def __call__(self, x):
        return self.down(nn.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    """x `[..., D]` -> logits float32 `[..., E]`, and the bias of the choice `[E]`, which has no gradient."""

    width: int
    experts: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", INIT, (self.width, self.experts), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.experts,), jnp.float32)
        return jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST), bias


class Experts(nn.Module):
    """Their matrices, stacked, and `experts.moe_ffn`."""

    config: MoEConfig
    dtype: Any

    def setup(self):
        number, width, hidden = self.config.num_experts, self.config.hidden_size, self.config.expert_intermediate_size
        self.gate, self.up = (Kernel((number, width, hidden)) for _ in range(2))
        self.down = Kernel((number, hidden, width))

    def __call__(self, x, routing):
        return experts.moe_ffn(x, routing, *(kernel().astype(self.dtype) for kernel in (self.gate, self.up, self.down)))
