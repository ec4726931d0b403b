"""What several backbones are built from: token tables, tied output layers, dropout, checks of their sizes."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.parallel.sharding import Rules

# Sharding of the parameters that most networks have. Layers are stacked: parameters under "blocks" (or "blocks0",
# "blocks1", ... where layers differ) have a leading layer axis.
SHARDING: Rules = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"embed/position", P(None, "fsdp")),
    (r"(.*/)?([qk]_)?norm\d?/(scale|bias)", P()),
    (r"blocks\d*/qkv/kernel", P(None, "fsdp", None, "tensor", None)),
    (r"blocks\d*/qkv/bias", P(None, None, "tensor", None)),
    (r"blocks\d*/[qkv]/kernel", P(None, "fsdp", "tensor", None)),
    (r"blocks\d*/[qkv]/bias", P(None, "tensor", None)),
    (r"blocks\d*/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"blocks\d*/out/bias", P()),
    (r"blocks\d*/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"blocks\d*/down/kernel", P(None, "tensor", "fsdp")),
    (r"blocks\d*/mlp_in/kernel", P(None, "fsdp", "tensor")),
    (r"blocks\d*/mlp_in/bias", P(None, "tensor")),
    (r"blocks\d*/mlp_out/kernel", P(None, "tensor", "fsdp")),
    (r"blocks\d*/mlp_out/bias", P()),
    (r"head/dense/kernel", P("fsdp", None)),
    (r"head/dense/bias", P()),
    (r"head/bias", P("tensor")),
    (r"head/linear/kernel", P("fsdp", "tensor")),
    (r"head/linear/bias", P("tensor")),
)


SIZES = {  # the paper's small, and the usual medium
    "tiny": dict(num_layers=4, hidden_size=256, num_heads=4),
    "small": dict(num_layers=12, hidden_size=768, num_heads=12),
    "medium": dict(num_layers=24, hidden_size=1024, num_heads=16),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the library reads of the config of any network; the config of a network says what is different there.

    The fields, with their defaults, are the keys of the section `model`. vocab_size counts the mask token if there is
    one; -1 in a config: taken from the tokenizer. What is no field here is one where a network has it.
    """

    kind: ClassVar[str]
    vocab_size: int = -1
    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12

    time_conditioning = False  # the noise level is an input
    first_noised_layer = 0  # layers before it run on clean tokens only
    target_shift = ""  # whether outputs are one token ahead (scoring/target_shift.py)
    positions = None  # the most tokens a document may have, where positions are learned
    dropout = 0.0
    num_experts = 0
    load_balancing = 0.0  # coefficient of a loss beside that of the tokens

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab(self) -> int:
        return pad_vocab_size(self.vocab_size)


def check_ranges(config: Any, positive: tuple[str, ...]) -> None:
    """UserError unless the named fields are at least 1, and vocabulary and dropout are in range."""
    for name in positive:
        if getattr(config, name) < 1:
            raise UserError(f"model.{name} is {getattr(config, name)}, expected at least 1")
    if config.vocab_size != -1 and config.vocab_size < 2:
        raise UserError(f"model.vocab_size is {config.vocab_size}, expected at least 2, or -1 for the tokenizer's")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout is {config.dropout}, expected in [0, 1)")


def check_config(config: Any, positive: tuple[str, ...]) -> None:
    """As `check_ranges`, for networks whose heads share the width."""
    check_ranges(config, positive)
    if config.hidden_size % config.num_heads:
        raise UserError(f"model.hidden_size={config.hidden_size} must be a multiple of "
                        f"model.num_heads={config.num_heads}")


def pad_vocab_size(vocab_size: int) -> int:
    """Rows of a token table: a multiple of 128, which divides over devices; hidden from callers."""
    return -(-vocab_size // 128) * 128


def embed_tokens(table_VxD, ids, dtype) -> jax.Array:
    """Rows of a table: int32 `[..., T]`, or weights of the vocabulary's tokens float `[..., T, V]` -> `[..., T, D]`."""
    table_VxD = table_VxD.astype(dtype)
    if jnp.issubdtype(ids.dtype, jnp.floating):
        return ids.astype(dtype) @ table_VxD[:ids.shape[-1]]
    return table_VxD[ids]


def queries_keys_values(qkv: nn.DenseGeneral, x, queries: bool, dtype) -> tuple:
    """q (None without `queries`, and not computed), k, v `[..., T, H, Dh]` of a layer whose outputs are (3, H, Dh)."""
    if queries:
        return tuple(jnp.moveaxis(qkv(x), -3, 0))
    params = {name: value.astype(dtype) for name, value in qkv.variables["params"].items()}
    kv = jnp.tensordot(x.astype(dtype), params["kernel"][:, 1:], 1)
    if "bias" in params:
        kv = kv + params["bias"][1:]
    return None, *jnp.moveaxis(kv, -3, 0)


def tied_kernel(head: nn.Module) -> jax.Array:
    """The token table of a tied backbone as its output layer, `[D, V']`, inside a method of the head."""
    return head.get_variable("params", "embed")["embedding"].T


def logits_of(features, kernel_DxV, bias_V, vocab_size: int) -> jax.Array:
    """Float32 logits `[..., T, V]` without the padding of the vocabulary, accumulated in float32."""
    logits = jnp.einsum("...d,dv->...v", features, kernel_DxV.astype(features.dtype),
                        preferred_element_type=jnp.float32)
    return (logits + bias_V)[..., :vocab_size]


class Layer(nn.Module):
    """Base of the layers: `project_qkv` and `attention_output_and_mlp`, around the attention that the trunk does."""

    def __call__(self, h, cond, rotary):
        """All parameters once, for `init`."""
        return self.attention_output_and_mlp(h, self.project_qkv(h, cond, rotary, True)[0], cond, None)


class OutputHead(nn.Module):
    """Base of heads whose logits are `features` times the kernel of `output_layer`."""

    def __call__(self, h, cond):
        """h `[..., T, D]` -> logits float32 `[..., T, V]`, without the padding of the vocabulary."""
        kernel_DxV, bias_V = self.output_layer()
        return logits_of(self.features(h, cond), kernel_DxV, bias_V, self.config.vocab_size)


def row_dropout(x, row_keys, index: int, rate: float) -> jax.Array:
    """Dropout with one key a row, so that the noise does not depend on how rows are grouped; index: of the place in the
    layer. Without keys or rate: `x`."""
    if row_keys is None or rate == 0:
        return x
    keep_prob = 1 - rate

    def keep(key):
        return jax.random.bernoulli(jax.random.fold_in(key, index), keep_prob, x.shape[1:])

    return jnp.where(jax.vmap(keep)(row_keys), x / keep_prob, 0)
