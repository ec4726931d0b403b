"""The layouts of BERT and RoBERTa with their masked-token heads (`BertForMaskedLM`, `RobertaForMaskedLM`).

Beside what the network uses, files may hold a pooler, the next-sentence head, the output layer once more (it is the
token table) and numbered positions.
"""

from typing import NamedTuple

import numpy as np

from bd3lm_jax.checkpoints.published import language
from bd3lm_jax.checkpoints.published.mapping import (
    ModelSpec,
    ParamMapping,
    bias,
    check_keys,
    linear,
    norm,
    padded,
    require,
    unchanged,
    vector,
)
from bd3lm_jax.models.bert import BertConfig

MODEL_TYPES = ("bert", "roberta")
CONFIG_KEYS = {"vocab_size": int, "max_position_embeddings": int, "hidden_size": int, "num_hidden_layers": int,
               "num_attention_heads": int, "intermediate_size": int, "layer_norm_eps": float, "type_vocab_size": int}
CHOICES = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "add_cross_attention": (False,),
           "tie_word_embeddings": (True,)}
READ = ("model_type", "is_decoder", "hidden_dropout_prob", "pad_token_id", language.BLOCK_SIZE)
OLD_NORM_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}  # names of norms in the oldest files


class Names(NamedTuple):
    """What the parts of a network are called."""

    kind: str
    architectures: tuple[str, str]  # masked tokens; with a causal mask
    dense: str  # of the head
    norm: str
    output: str  # weight of the output layer
    bias: tuple[str, ...]  # of the output layer, first that of today


BERT = Names("bert", ("BertForMaskedLM", "BertLMHeadModel"), "cls.predictions.transform.dense",
             "cls.predictions.transform.LayerNorm", "cls.predictions.decoder.weight",
             ("cls.predictions.bias", "cls.predictions.decoder.bias"))
ROBERTA = Names("roberta", ("RobertaForMaskedLM", "RobertaForCausalLM"), "lm_head.dense", "lm_head.layer_norm",
                "lm_head.decoder.weight", ("lm_head.bias", "lm_head.decoder.bias"))


def rename(name: str) -> str:
    """Norms of the oldest files had gamma and beta."""
    ending = name[name.rfind("."):]
    return name.removesuffix(ending) + OLD_NORM_SUFFIXES[ending] if ending in OLD_NORM_SUFFIXES else name


def from_hf_config(path, published: dict, scalars: dict[str, float]) -> ModelSpec:
    """What config.json says. RoBERTa's positions begin behind that of padding."""
    del scalars
    check_keys(path, published, CONFIG_KEYS)
    language.check_choices(path, published, CHOICES)
    unused = 0
    if published["model_type"] == ROBERTA.kind:
        check_keys(path, published, {"pad_token_id": int})
        unused = published["pad_token_id"] + 1
    length = published["max_position_embeddings"] - unused
    require(length > 0, f"{path}: max_position_embeddings={published['max_position_embeddings']} leaves no position "
            f"behind the first {unused}")
    model = BertConfig(
        vocab_size=published["vocab_size"], num_layers=published["num_hidden_layers"],
        hidden_size=published["hidden_size"],
        num_heads=published["num_attention_heads"], intermediate_size=published["intermediate_size"],
        dropout=float(published.get("hidden_dropout_prob", 0.0)), positions=length, unused_positions=unused,
        token_types=published["type_vocab_size"], norm_eps=float(published["layer_norm_eps"]))
    causal = published.get("is_decoder", False) is True
    return ModelSpec(model, language.read_objective(path, published, length, causal), length,
                     language.mask_id(path, published))


def to_hf_config(model: BertConfig, objective, length: int) -> dict:
    """Content of config.json, the inverse of `from_hf_config`. Raises UserError for an objective that it cannot say."""
    del length  # the context is what positions were learned for
    names = _names(model)
    return {
        "model_type": names.kind, "architectures": [names.architectures[objective.causal]],
        "vocab_size": model.vocab_size, "max_position_embeddings": model.positions + model.unused_positions,
        "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size, "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.norm_eps, "type_vocab_size": model.token_types, "is_decoder": objective.causal,
        "pad_token_id": max(model.unused_positions - 1, 0), **{key: values[0] for key, values in CHOICES.items()},
        **language.write_objective(names.kind, objective, model.positions, causal=objective.causal),
    }


def layout(config: BertConfig) -> dict[str, ParamMapping]:
    """Path of each of our parameters -> its published source."""
    width, hidden = config.hidden_size, config.intermediate_size
    layers, names = range(config.num_layers), _names(config)
    heads, size = config.num_heads, config.hidden_size // config.num_heads
    embeddings, block = f"{names.kind}.embeddings.", f"{names.kind}.encoder.layer.{{layer}}."
    rows = config.unused_positions + config.positions
    table = ParamMapping(_table(names), (config.vocab_size, width), unchanged, unchanged)
    leaves = {
        "embed.embedding": padded(table, 0, config.padded_vocab),
        "embed.position": ParamMapping(f"{embeddings}position_embeddings.weight", (rows, width), unchanged, unchanged),
        "embed.token_type": ParamMapping(f"{embeddings}token_type_embeddings.weight", (config.token_types, width),
                                         unchanged, unchanged),
        **norm("embed.norm", f"{embeddings}LayerNorm", width),
        **norm("blocks.norm1", f"{block}attention.output.LayerNorm", width, layers),
        **norm("blocks.norm2", f"{block}output.LayerNorm", width, layers),
        "blocks.out.kernel": linear(f"{block}attention.output.dense.weight", (heads, size), width, layers),
        "blocks.out.bias": vector(f"{block}attention.output.dense.bias", width, layers),
        "blocks.mlp_in.kernel": linear(f"{block}intermediate.dense.weight", width, hidden, layers),
        "blocks.mlp_in.bias": vector(f"{block}intermediate.dense.bias", hidden, layers),
        "blocks.mlp_out.kernel": linear(f"{block}output.dense.weight", hidden, width, layers),
        "blocks.mlp_out.bias": vector(f"{block}output.dense.bias", width, layers),
        "head.dense.kernel": linear(f"{names.dense}.weight", width, width),
        "head.dense.bias": vector(f"{names.dense}.bias", width),
        **norm("head.norm", names.norm, width),
        "head.bias": padded(vector(names.bias[0], config.vocab_size), 0, config.padded_vocab),
    }
    for own_name, hf_name in (("q", "query"), ("k", "key"), ("v", "value")):
        name = f"{block}attention.self.{hf_name}"
        leaves[f"blocks.{own_name}.kernel"] = linear(f"{name}.weight", width, (heads, size), layers)
        leaves[f"blocks.{own_name}.bias"] = bias(f"{name}.bias", (heads, size), layers)
    return leaves


def buffer_shapes(config: BertConfig, names: set[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of tensors that may be there beside parameters."""
    width, parts, rows = config.hidden_size, _names(config), config.unused_positions + config.positions
    optional_shapes = {
        f"{parts.kind}.embeddings.position_ids": (1, rows), f"{parts.kind}.embeddings.token_type_ids": (1, rows),
        f"{parts.kind}.pooler.dense.weight": (width, width), f"{parts.kind}.pooler.dense.bias": (width,),
        "cls.seq_relationship.weight": (2, width), "cls.seq_relationship.bias": (2,),
    }
    tied_pairs = ((parts.output, _table(parts), (config.vocab_size, width)), (*parts.bias[::-1], (config.vocab_size,)))
    for name, source, shape in tied_pairs:
        optional_shapes |= dict.fromkeys((name, source), shape) if name in names else {}
    return {name: shape for name, shape in optional_shapes.items() if name in names}


def check_buffers(path, config: BertConfig, tensors: dict[str, np.ndarray]) -> None:
    """UserError unless the output layer, where it is written once more, is the token table and its bias the bias."""
    names = _names(config)
    language.check_tied(path, tensors, names.output, _table(names))
    language.check_tied(path, tensors, names.bias[1], names.bias[0])


def _names(config: BertConfig) -> Names:
    return ROBERTA if config.unused_positions else BERT


def _table(names: Names) -> str:
    return f"{names.kind}.embeddings.word_embeddings.weight"
