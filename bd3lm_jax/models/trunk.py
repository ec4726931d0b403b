"""The passes of a backbone: two streams for training and bounds, prefill of a cache, decoding behind one.

A backbone (see `Backbone`) is a set of Linen leaf modules that know nothing of masks, streams or caches. Layers come
in groups; each group is initialised by vmap and stored stacked, so that every way to run them (`layers.py`) shares one
checkpoint layout. Everything here is a pure function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from bd3lm_jax.attention import MaskSpec, Tokens
from bd3lm_jax.models.cache import Cache, Int8
from bd3lm_jax.models.layers import Execution, LastLayer, LayerInputs, run_layers


class Backbone(NamedTuple):
    """The leaf modules of a network; `models/dit.py` is the example to read.

    embed(ids or mixtures of them, positions) -> h. condition(sigma) -> cond, or None for a network that takes no noise
    level. rotary(positions) -> whatever `project_qkv` wants of positions. groups: (name, block, count) with block
    methods project_qkv(h, cond, rotary, queries) -> q (None without queries), k, v and
    attention_output_and_mlp(h, attended, cond, dropout_keys) -> h, aux. head(h, cond) -> logits, in two parts:
    head.features(h, cond) and head.output_layer() -> kernel, bias. tied: the head finds the parameters of `embed` among
    its own, as "embed".
    A block with an attribute `window` (not None) sees no further than that (`attention.allowed`).
    """

    config: Any
    embed: nn.Module
    condition: nn.Module | None
    rotary: Callable
    groups: tuple[tuple[str, nn.Module, int], ...]
    head: nn.Module
    dtype: Any
    tied: bool = False


class Stream(flax.struct.PyTreeNode):
    """Tokens going in. ids: int32, clean `[B, C]` or noised `[B, M, T]`; position, block, segment: int32 `[B, T]`
    (block: index of the block in its document; segment 0: padding). In place of ids, a mixture of them at every place:
    float `[..., V]`.

    sigma: float32 noise level -log(alpha) as the network takes it, `[B, n]` (clean) or `[B, M, n]` (noised) with n
    dividing the length (one level for n-th parts of the row); None: the constant 0. max_visible_position: as in
    `Tokens`.
    """

    ids: jax.Array
    position: jax.Array
    block: jax.Array
    segment: jax.Array
    sigma: jax.Array | None = None
    max_visible_position: jax.Array | None = None

    def tokens(self, noised: bool) -> Tokens:
        return Tokens(self.position, self.block, self.segment, int(noised), self.max_visible_position)


class ForwardOutput(NamedTuple):
    """noised `[B, M, T, D]` and clean `[B, C, D]` hidden states before the head, and the cache; None: absent or not
    computed."""

    noised: Any
    clean: Any
    cache: Any
    aux: jax.Array


def is_time_conditioned(model_config) -> bool:
    """Whether a backbone of this config takes the noise level."""
    return model_config.time_conditioning


def init(model: Backbone, key) -> dict:
    """Random parameters: nested dict of float32 arrays; every layer group has a leading layer axis."""
    ids = jnp.zeros((1, 1), jnp.int32)
    keys = jax.random.split(key, 3 + len(model.groups))
    params = {"embed": model.embed.init(keys[0], ids, ids)["params"]}
    h = model.embed.apply({"params": params["embed"]}, ids, ids)
    cond = None
    if model.condition is not None:
        params["condition"] = model.condition.init(keys[1], jnp.zeros((1, 1)))["params"]
        cond = model.condition.apply({"params": params["condition"]}, jnp.zeros((1, 1)))
    for (name, block, count), group_key in zip(model.groups, keys[3:]):
        def init_layer(layer_key, block=block):
            return block.init(layer_key, h, cond, model.rotary(ids))["params"]
        params[name] = jax.vmap(init_layer)(jax.random.split(group_key, count))
    # A tied output layer has no parameters of its own, and its table is not there yet.
    params["head"] = model.head.init(keys[2], h, cond, method=model.head.features if model.tied else None)["params"]
    return params


def unstack_layers(model: Backbone, params: dict) -> dict:
    """The parameters with each layer group as a tuple of its layers, which `forward` takes as well.

    For a loop around `forward`: layers cut out of their stacks inside it would be copied in every turn, about as much
    work as a pass over one token. Outside, all of them are copied once, and held as long as the loop runs.
    """
    groups = {name: tuple(jax.tree.map(lambda x, i=i: x[i], params[name]) for i in range(count))
              for name, _, count in model.groups}
    return {**params, **groups}


def new_cache(model: Backbone, params: dict, batch: int, capacity: int, dtype: str) -> Cache:
    """An empty cache for `capacity` tokens a row. dtype: one of cache.DTYPES, "compute": that of the network."""
    shapes = jax.eval_shape(lambda p: _stored_shapes(model, p), params)
    def buffer(x):
        heads, size = x.shape[3:]
        shape = (batch, heads, size, capacity)
        if dtype == "int8":
            return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros((batch, heads, 1, capacity), jnp.float32))
        return jnp.zeros(shape, x.dtype if dtype == "compute" else dtype)
    def buffers():
        return {name: tuple(buffer(x) for _ in range(x.shape[0])) for name, x in shapes.items()}
    zeros = jnp.zeros((batch, capacity), jnp.int32)
    return Cache(keys=buffers(), values=buffers(), position=zeros, block=zeros, segment=zeros, empty=True)


def _stored_shapes(model, params):
    token = jnp.zeros((1, 1), jnp.int32)
    stream = Stream(token, token, token, token)
    execution = Execution("dense", "scan", "none", one_document=True)
    stored = _clean_pass(model, params, stream, None, "causal", 1, execution, None)[1]
    return {name: k for name, (k, _) in stored.items()}


def two_streams(model: Backbone, params: dict, noised: Stream, clean: Stream | None, *, block_size: int,
                execution: Execution, rule: str = "block_causal", clean_outputs: bool = False, dropout_keys=None,
                min_block_size: int | None = None, output_positions_BxP=None) -> ForwardOutput:
    """The pass of training and of bounds over whole rows: hidden states of the noised stream.

    Noised tokens attend to earlier clean blocks and their own block, clean tokens to clean ones by `rule`.

    Args:
        clean: without its last block, which nobody reads; None where a row is one block. Its last layer computes keys
            and values only.
        rule: "block_causal" (up to the end of their block) or "causal".
        clean_outputs: the hidden states of the clean stream are returned as well, and all of it goes through the last
            layer.
        block_size: blocks begin at row indices that are multiples of it.
        dropout_keys: one typed key a row `[B]`; None: no dropout.
        min_block_size: as in `MaskSpec`, for rows with blocks of several sizes.
        output_positions_BxP: places of the noised stream whose hidden states are returned, `[B, M, P, D]`; nothing else
            goes through the last layer's MLP.
    """
    streams = {"noised": noised} if clean is None else {"noised": noised, "clean": clean}
    spec = MaskSpec(rule=rule, block_size=block_size, aligned=True, one_document=execution.one_document,
                    noised=noised.tokens(True), clean=None if clean is None else clean.tokens(False), cache=None,
                    min_block_size=min_block_size)
    h, inputs = _enter(model, params, streams, spec, execution, dropout_keys)
    h, _, aux = run_layers(model.groups, params, inputs, h, None, execution, model.config.first_noised_layer,
                           None if clean_outputs else _last_layer(clean, output_positions_BxP))
    return ForwardOutput(h["noised"], h["clean"] if clean_outputs else None, None, aux)


def prefill(model: Backbone, params: dict, clean: Stream, cache: Cache | None = None, write_at=None, *, rule: str,
            block_size: int, execution: Execution, dropout_keys=None) -> ForwardOutput:
    """The pass of clean tokens alone: their hidden states, and the cache with their keys and values.

    They attend to the cache and to each other by `rule` ("causal", "block_causal", "bidirectional").

    Args:
        cache: where keys and values go, to slots `write_at`; None: nowhere.
        block_size, dropout_keys: as in `two_streams`.
    """
    h, stored, aux = _clean_pass(model, params, clean, cache, rule, block_size, execution, dropout_keys)
    return ForwardOutput(None, h, None if cache is None else cache.write(stored, clean, write_at), aux)


def decode(model: Backbone, params: dict, noised: Stream, clean: Stream | None, cache: Cache, write_at, *,
           block_size: int, execution: Execution, rule: str = "block_causal",
           output_positions_BxP=None) -> ForwardOutput:
    """A pass of generation: hidden states of one noised block behind the cache.

    Args:
        clean: the block just finished, whose keys and values go to cache slots `write_at`; None: there is none. Both go
            through the weights as one row where they have the same noise level, the constant 0.
        block_size, rule, output_positions_BxP: as in `two_streams`.
    """
    streams = {"noised": noised} if clean is None else {"noised": noised, "clean": clean}
    spec = MaskSpec(rule=rule, block_size=block_size, aligned=False, one_document=execution.one_document,
                    noised=noised.tokens(True), clean=None if clean is None else clean.tokens(False),
                    cache=None if cache.empty else cache.tokens())
    h, inputs = _enter(model, params, streams, spec, execution, None)
    if clean is not None and noised.ids.shape[1] == 1 and noised.sigma is None and clean.sigma is None:
        rotary = jax.tree.map(lambda n, c: jnp.concatenate([n[:, 0], c], axis=1), inputs.rotary["noised"],
                              inputs.rotary["clean"])
        inputs = inputs._replace(cond=inputs.cond | {"joined": inputs.cond["clean"]},
                                 rotary=inputs.rotary | {"joined": rotary})
    h, stored, aux = run_layers(model.groups, params, inputs, h, cache, execution, model.config.first_noised_layer,
                                _last_layer(clean, output_positions_BxP))
    return ForwardOutput(h["noised"], None, cache if clean is None else cache.write(stored, clean, write_at), aux)


def logits(model: Backbone, params: dict, h, sigma=None) -> jax.Array:
    """Hidden states `[..., D]` -> logits float32 `[..., V]`. sigma `[..., n]` as in `Stream`, None: the constant 0."""
    return _apply_head(model, params, h, _condition(model, params, sigma))


def features(model: Backbone, params: dict, h, sigma=None) -> jax.Array:
    """Hidden states -> what the output layer multiplies, both `[..., D]`; sigma as in `logits`."""
    return _apply_head(model, params, h, _condition(model, params, sigma), method="features")


def output_layer(model: Backbone, params: dict) -> tuple[jax.Array, jax.Array]:
    """Kernel `[D, V']` and bias `[V']`: logits = features @ kernel + bias; no token has an id from vocab_size on."""
    return _apply_head(model, params, method="output_layer")


def _apply_head(model: Backbone, params: dict, *args, method: str = "__call__") -> Any:
    variables = {**params["head"], "embed": params["embed"]} if model.tied else params["head"]
    return model.head.apply({"params": variables}, *args, method=method)


def _condition(model, params, sigma):
    if model.condition is None:
        return None
    sigma = jnp.zeros((1,) * 2) if sigma is None else sigma
    return model.condition.apply({"params": params["condition"]}, sigma)


def _enter(model, params, streams: dict, spec, execution, dropout_keys) -> tuple[dict, LayerInputs]:
    """Hidden states of the streams before the first layer, and what all layers read."""
    position = {name: stream.position[:, None] if name == "noised" else stream.position
                for name, stream in streams.items()}
    h = {name: model.embed.apply({"params": params["embed"]}, stream.ids, position[name])
         for name, stream in streams.items()}
    cond = {name: _condition(model, params, stream.sigma) for name, stream in streams.items()}
    rotary = {name: model.rotary(x) for name, x in position.items()}
    return h, LayerInputs(spec, cond, rotary, execution.backend, dropout_keys)


def _clean_pass(model, params, clean, cache, rule, block_size, execution, dropout_keys) -> tuple:
    """Hidden states, keys and values by group, auxiliary loss."""
    spec = MaskSpec(rule=rule, block_size=block_size, aligned=cache is None, one_document=execution.one_document,
                    noised=None, clean=clean.tokens(False),
                    cache=None if cache is None or cache.empty else cache.tokens())
    h, inputs = _enter(model, params, {"clean": clean}, spec, execution, dropout_keys)
    h, stored, aux = run_layers(model.groups, params, inputs, h, cache, execution)
    return h["clean"], stored, aux


def _last_layer(clean: Stream | None, output_positions_BxP) -> LastLayer | None:
    """Nobody reads the clean stream's hidden states behind the last layer where there is a noised one."""
    return None if clean is None and output_positions_BxP is None else LastLayer(output_positions_BxP)
