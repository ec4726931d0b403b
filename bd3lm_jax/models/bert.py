"""BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692): learned positions, LayerNorm after each half of a layer,
exact GELU, and a masked-token head with a layer of its own before the tied output layer.

All tokens have token type 0, as in rows of one text. As published they see their whole row; nothing here depends on it.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
from jax.sharding import PartitionSpec as P

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.models import shared
from bd3lm_jax.models.shared import Layer, ModelConfig, OutputHead, check_config, embed_tokens, row_dropout, tied_kernel
from bd3lm_jax.models.trunk import Backbone

NORMAL = nn.initializers.normal(0.02)  # the published recipe's


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Sizes and switches of the network."""

    kind: ClassVar[str] = "bert"
    intermediate_size: int = 3072  # of the MLP
    dropout: float = 0.1  # of what each half of a layer adds
    positions: int = 256  # learned ones: the most tokens a document may have
    unused_positions: int = 0  # rows of the position table before that of the first token: RoBERTa has 2, BERT none
    token_types: int = 1  # rows of the token type table, of which the first is used
    norm_eps: float = 1e-12

    def __post_init__(self):
        check_config(self, ("num_layers", "hidden_size", "num_heads", "intermediate_size", "positions", "token_types"))
        if self.unused_positions < 0:
            raise UserError(f"model.unused_positions is {self.unused_positions}, expected 0 (BERT) or more (RoBERTa: "
                            "2)")


SHARDING = (*shared.SHARDING, (r"embed/token_type", P()))


def build(config: BertConfig, dtype: Any) -> Backbone:
    """The backbone that computes in `dtype`; parameters are float32."""
    return Backbone(config=config, embed=Embed(config, dtype), condition=None, rotary=lambda position: (),
                    groups=(("blocks", Block(config, dtype), config.num_layers),), head=Head(config, dtype),
                    dtype=dtype, tied=True)


class Embed(nn.Module):
    """Norm of the sum of tokens, their positions and token type 0."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids, position):
        """Tokens as `shared.embed_tokens` takes them, int32 positions `[..., T]` -> `[..., T, D]`."""
        config, dtype = self.config, self.dtype
        rows = config.unused_positions + config.positions
        tokens = self.param("embedding", NORMAL, (config.padded_vocab, config.hidden_size))
        places = self.param("position", NORMAL, (rows, config.hidden_size))
        types = self.param("token_type", NORMAL, (config.token_types, config.hidden_size))
        h = embed_tokens(tokens, ids, dtype) + embed_tokens(places, position + config.unused_positions, dtype)
        return _norm(config, dtype, name="norm")(h + types[0].astype(dtype))


class Block(Layer):
    """A transformer layer in two halves, around the attention that the trunk does; norms follow what they add."""

    config: BertConfig
    dtype: Any

    def setup(self):
        config, dtype = self.config, self.dtype
        size = config.hidden_size // config.num_heads
        self.q, self.k, self.v = (nn.DenseGeneral((config.num_heads, size), dtype=dtype, kernel_init=NORMAL)
                                  for _ in range(3))
        self.out = nn.DenseGeneral(config.hidden_size, axis=(-2, -1), dtype=dtype, kernel_init=NORMAL)
        self.mlp_in = nn.Dense(config.intermediate_size, dtype=dtype, kernel_init=NORMAL)
        self.mlp_out = nn.Dense(config.hidden_size, dtype=dtype, kernel_init=NORMAL)
        self.norm1, self.norm2 = _norm(config, dtype), _norm(config, dtype)

    def project_qkv(self, h, cond, rotary, queries: bool):
        """h `[..., T, D]` -> q (None without `queries`), k, v `[..., T, H, Dh]`."""
        del cond, rotary
        return self.q(h) if queries else None, self.k(h), self.v(h)

    def attention_output_and_mlp(self, h, attended, cond, dropout_keys):
        """h and attention output `[..., T, H, Dh]` -> the next h, auxiliary loss (none)."""
        del cond
        rate = self.config.dropout
        h = self.norm1(h + row_dropout(self.out(attended), dropout_keys, 0, rate))
        inner = nn.gelu(self.mlp_in(h), approximate=False)
        return self.norm2(h + row_dropout(self.mlp_out(inner), dropout_keys, 1, rate)), 0.0


class Head(OutputHead):
    """Masked-token head: dense layer, GELU and norm, then the token table with a bias."""

    config: BertConfig
    dtype: Any

    def setup(self):
        self.dense = nn.Dense(self.config.hidden_size, dtype=self.dtype, kernel_init=NORMAL)
        self.norm = _norm(self.config, self.dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.config.padded_vocab,))

    def features(self, h, cond):
        """h `[..., T, D]` -> what the output layer multiplies, `[..., T, D]`."""
        del cond
        return self.norm(nn.gelu(self.dense(h), approximate=False))

    def output_layer(self):
        """Its float32 kernel `[D, V']` and bias `[V']`, V' = config.padded_vocab."""
        return tied_kernel(self), self.bias


def _norm(config, dtype, name=None):
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=dtype, name=name)
