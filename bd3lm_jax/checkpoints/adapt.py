"""What turns foreign weights into the start of a run: those of `train.init_from`, a run or a published checkpoint.

The network must be the same but for its vocabulary, which may lack the mask token, and for what no weight depends on.
A mask token that the source never read begins as the mean of all embeddings plus noise.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax import models
from bd3lm_jax.checkpoints import hf, rundir
from bd3lm_jax.config import SAME_AS_INIT, Config, read_sections
from bd3lm_jax.core import jax_settings, migrations
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import note
from bd3lm_jax.core.typed import Nested, as_mapping
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.models import Backbone, trunk
from bd3lm_jax.scoring import target_shift

# of a model config: no shape depends on it but the vocabulary's
ADAPTABLE_FIELDS = ("dropout", "vocab_size", "target_shift")
MASK_ROW_NOISE = 0.02  # of a new row, in standard deviations of the rows that are there
MASK_ROW_FOLD = 0x6D61736B  # tells its random numbers from others


class Source(NamedTuple):
    """What `train.init_from` holds; length: the most tokens a row that it was made for; mask_id: -1 if not named."""

    path: str
    published: bool
    model: Any
    objective: Any
    length: int
    mask_id: int


def read_source(path: str) -> Source:
    """The network of a run or of a published checkpoint, without its weights. UserError if there is none."""
    if not hf.is_published(path := hf.local(path)):
        config, _ = rundir.read(path)
        return Source(path, False, config.model, config.diffusion, config.data.seq_len, -1)
    model_spec = hf.from_hf_config(path)
    return Source(path, True, model_spec.model, model_spec.objective, model_spec.length, model_spec.mask_id)


def resolve(config: Config | Nested) -> Config | Nested:
    """A config as `Config.from_dict` takes it: model.kind="init_from" has become the network of `train.init_from`.

    UserError for a source that cannot be read, and as `Config.from_dict` for the sections beside `model`.
    """
    if isinstance(config, Config):
        return config
    section: Any = dict(as_mapping("", config).items()).get("model")
    if not hasattr(section, "items") or dict(section.items()).get("kind") != SAME_AS_INIT:
        return config
    nested, sections = read_sections(config)
    network = _network_of(dict(section.items()), sections["train"].init_from, sections["diffusion"],
                          sections["data"].seq_len)
    return nested | {"model": network}


def _network_of(overrides: Mapping, path: str, objective: Any, length: int) -> dict:
    """The section `model` of the network in `train.init_from`, with what is given beside `kind` in its place;
    target_shift="source" becomes the form that it has under an objective with rows of `length` tokens
    (`target_shift.inherited_shift`)."""
    if not path:
        raise UserError(f"model.kind='{SAME_AS_INIT}' takes the network of train.init_from, which is ''")
    source = read_source(path)
    own = {"kind": source.model.kind, **dataclasses.asdict(source.model)}
    overrides = migrations.with_known_names("model", {key: x for key, x in overrides.items() if key != "kind"}, own)
    if overrides.get("target_shift") == target_shift.INHERIT:
        del overrides["target_shift"]
        if "target_shift" in own:
            overrides["target_shift"] = target_shift.inherited_shift(source.model, source.objective.causal, objective,
                                                                length)
    return {**own, **overrides}


def add_mask_token(config: Config, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the mask token that `train.init_from` was trained with, where that names one; with one behind
    its vocabulary if it has none and the objective of the config needs it."""
    if not config.diffusion.uses_mask_token:
        return tokenizer
    source = read_source(config.train.init_from) if config.train.init_from else None
    if source is not None and source.objective.uses_mask_token and source.mask_id >= 0:
        return tokenizer.with_mask(source.mask_id)
    return tokenizer if tokenizer.mask_id >= 0 else tokenizer.with_mask(tokenizer.size)


def check_source(config: Config, tokenizer: Tokenizer) -> None:
    """UserError unless `train.init_from` holds weights for the network of a config, and was made with its tokenizer (a
    published checkpoint may bring none; which token is its mask need not be the same)."""
    source = read_source(config.train.init_from)
    name = f"train.init_from={source.path}"
    expected_fields, source_fields = ({"kind": model.kind, **dataclasses.asdict(model)}
                                      for model in (config.model, source.model))
    differing = [
        f"model.{key}: {expected_fields.get(key)!r} != {source_fields.get(key)!r}"
        for key in expected_fields | source_fields
        if key not in ADAPTABLE_FIELDS and expected_fields.get(key) != source_fields.get(key)
    ]
    if expected_fields["vocab_size"] < source_fields["vocab_size"]:
        differing.append(f"model.vocab_size: {expected_fields['vocab_size']} < {source_fields['vocab_size']}")
    if differing:
        raise UserError(f"{name} is another network ({'; '.join(differing)}; here != there): use model.kind="
                        f"'init_from', which takes its network")
    if config.data.seq_len > source.length and source.published:
        raise UserError(f"data.seq_len={config.data.seq_len}, but {name} was made for rows of at most {source.length} "
                        "tokens: shorten the rows")
    if source.published:
        source_fields = hf.read_tokenizer(source.path, hf.from_hf_config(source.path))
        if source_fields is not None and _decisive(source_fields) != _decisive(tokenizer):
            raise UserError(f"data.tokenizer='{config.data.tokenizer}' is not the tokenizer of {name}: ids would mean "
                            f"other text; use data.tokenizer={source.path}")
        return
    rundir.check_tokenizer(tokenizer, add_mask_token(config, rundir.read(source.path)[1]).identity, name)
    from bd3lm_jax.checkpoints.checkpoint import Checkpoints

    with Checkpoints(source.path, 1, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            raise UserError(f"{name} holds no checkpoint: train it first")


def _decisive(tokenizer: Tokenizer) -> dict:
    """What decides the ids of a text: neither the name of the tokenizer, nor its mask, nor what it never does."""
    content = json.loads(tokenizer.to_bytes())
    model = json.loads(content.get("model", "{}")) | dict.fromkeys(("padding", "truncation"))
    return {"model": model, "end_id": content["end_id"]}


def initial_weights(config: Config, model: Backbone, tokenizer: Tokenizer, abstract: dict,
                    mesh: jax.sharding.Mesh) -> dict:
    """The weights of `train.init_from` as those of `model`, with a row for the mask token if it has none.

    abstract: the network's parameters as shapes with shardings, where the result lies.
    """
    source, mask_id = read_source(config.train.init_from), tokenizer.mask_id
    if source.published:
        found, step = hf.read_model(source.path, mesh=mesh)[1], ""
    else:
        from bd3lm_jax.checkpoints.restore import restore

        run = restore(source.path, "ema", None, mesh)
        found, step = {name: run.params[name] for name in abstract}, f", step {run.step}"
    note(f"starting from the weights of {source.path}{step}")
    axes, known = vocabulary_axes(model), source.model.vocab_size
    found = jax.tree.map(_pad_vocab_axis, found, abstract, axes)
    if config.diffusion.uses_mask_token and (mask_id >= known or not _has_mask_row(source, tokenizer)):
        rows = min(known, tokenizer.size)
        note(f"mask token {mask_id}: {'a new row' if mask_id >= known else 'a row that was never read'}, now the mean "
             f"of {rows - (mask_id < rows)} embeddings plus noise")
        found = with_mask_row(found, axes, mask_id, rows, config.seed)
    return jax.device_put(found, jax.tree.map(lambda x: x.sharding, abstract))


def _has_mask_row(source: Source, tokenizer: Tokenizer) -> bool:
    """Whether the source was trained with the mask token of the tokenizer: a published network that names none was if
    the token is in the vocabulary; a row behind it is padding."""
    named = not source.published or source.mask_id >= 0
    return source.objective.uses_mask_token and (named or hf.vocabulary_mask_id(tokenizer) >= 0)


def vocabulary_axes(model: Backbone) -> dict:
    """For every parameter the axis that runs over the vocabulary, -1 where none does: what grows with its size."""
    def shapes(config):
        return jax.eval_shape(lambda: trunk.init(models.build(config, model.dtype), jax_settings.key(0)))

    def differing(a, b):
        return next((axis for axis, (here, there) in enumerate(zip(a.shape, b.shape)) if here != there), -1)

    larger = dataclasses.replace(model.config, vocab_size=model.config.padded_vocab + 1)
    return jax.tree.map(differing, shapes(model.config), shapes(larger))


def with_mask_row(params: dict, axes: dict, mask_id: int, known: int, seed: int) -> dict:
    """The parameters with row `mask_id` of every table over the vocabulary drawn anew: the mean of the others of the
    first `known` rows plus NOISE times their standard deviation, feature by feature, times a normal number."""
    leaves, treedef = jax.tree.flatten(params)
    key = jax.random.fold_in(jax_settings.key(seed), MASK_ROW_FOLD)

    def with_new_row(index, x, axis):
        if axis < 0:
            return x
        rows = jnp.moveaxis(x, axis, 0)
        others = (jnp.arange(rows.shape[0]) < known) & (jnp.arange(rows.shape[0]) != mask_id)
        where = others.reshape(-1, *(1,) * (rows.ndim - 1))
        mean, spread = jnp.mean(rows, 0, where=where), jnp.std(rows, 0, where=where)
        row = mean + MASK_ROW_NOISE * spread * jax.random.normal(jax.random.fold_in(key, index), mean.shape)
        return jnp.moveaxis(rows.at[mask_id].set(row), 0, axis)

    found = [with_new_row(index, x, axis) for index, (x, axis) in enumerate(zip(leaves, jax.tree.leaves(axes)))]
    return jax.tree.unflatten(treedef, found)


def _pad_vocab_axis(x, like, axis: int):
    """Zeros behind the last row of a table over the vocabulary, up to the size that it has here."""
    if axis < 0 or x.shape == like.shape:
        return x
    return jnp.pad(x, [(0, like.shape[i] - x.shape[i] if i == axis else 0) for i in range(x.ndim)])
