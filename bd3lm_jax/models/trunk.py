"""The one place that runs a backbone: layers scanned or unrolled, rematerialised, attending, with cache and streams.

A backbone (see `Backbone`) is a set of Linen leaf modules that know nothing of masks, streams or caches. Layers come
in groups; each group is initialised by vmap and stored stacked, so scanned, unrolled and peeled execution share one
checkpoint layout. Everything here is a pure function.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from bd3lm_jax.attention import MaskSpec, Tokens, attend
from bd3lm_jax.core.errors import lookup
from bd3lm_jax.models.cache import Cache, Int8, dequantize
from bd3lm_jax.parallel.sharding import BATCH_AXES, constrain

REMAT = {  # what the backward pass finds stored and need not compute again, from most to least memory
    "none": None,  # everything
    "dots": jax.checkpoint_policies.save_from_both_policies(  # results of matrix products and of attention
        jax.checkpoint_policies.checkpoint_dots, jax.checkpoint_policies.save_only_these_names("attended")),
    "attention": jax.checkpoint_policies.save_only_these_names("attended"),  # results of attention
    "full": jax.checkpoint_policies.nothing_saveable,  # the input of every layer
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a pass is computed; none of it changes the result beyond rounding."""

    backend: str  # attention backend, "auto"
    layers: str  # "scan", "unroll"
    remat: str  # one of REMAT
    one_document: bool  # rows are known to hold one document each, which allows more attention backends


class Backbone(NamedTuple):
    """The leaf modules of a network; `models/dit.py` is the example to read.

    embed(ids or mixtures of them, positions) -> h. condition(sigma) -> cond, or None for a network that takes no noise
    level. rotary(positions) -> whatever `project_qkv` wants of positions. groups: (name, block, count) with block
    methods pre(h, cond, rotary, queries) -> q (None without queries), k, v and
    post(h, attended, cond, dropout_keys) -> h, aux. head(h, cond) -> logits, in two parts: head.features(h, cond) and
    head.output_layer() -> kernel, bias. tied: the head finds the parameters of `embed` among its own, as "embed".
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
    dividing the length (one level for n-th parts of the row); None: the constant 0. sees: as in `Tokens`.
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
    """noised `[B, M, T, D]` and clean `[B, C, D]` hidden states before the head (None: absent or not wanted)."""

    noised: jax.Array | None
    clean: jax.Array | None
    cache: Cache | None
    aux: jax.Array


def is_time_conditioned(model_config) -> bool:
    """Whether a backbone of this config is told the noise level."""
    return getattr(model_config, "time_conditioning", False)


def encoder_layers(model_config) -> int:
    """Layers that only clean tokens go through; noised ones enter behind them (E2D2, arXiv 2510.22852)."""
    decoder = getattr(model_config, "decoder_layers", 0)
    return model_config.num_layers - decoder if decoder else 0


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
    stored = _run(model, params, None, stream, None, rule="causal", block_size=1,
                  execution=Execution("dense", "scan", "none", one_document=True), dropout_keys=None)[2]
    return {name: k for name, (k, _) in stored.items()}


def forward(model: Backbone, params: dict, *, noised: Stream | None, clean: Stream | None, cache: Cache | None,
            write_at, rule: str, block_size: int, execution: Execution, dropout_keys,
            min_block_size: int | None = None, output_positions_BxP=None) -> ForwardOutput:
    """One pass of both streams through all layers.

    Noised tokens attend to cache, earlier clean blocks and their own block; clean tokens to cache and clean by `rule`
    ("causal", "block_causal", "bidirectional"). Training: clean without its last block (nobody reads it), no cache.
    Decoding: noised = one block, clean = the block just finished, whose keys and values go to cache slots `write_at`.
    block_size: blocks begin at row indices that are multiples of it. With a noised stream the clean stream's last
    layer computes keys and values only and its hidden states are not returned. dropout_keys: one typed key a row
    `[B]`; None: no dropout. smallest: as in `MaskSpec`, for rows with blocks of several sizes. wanted: places in the
    noised stream whose hidden states are returned, `[B, M, P, D]`; nothing else goes through the last layer's MLP.
    """
    h_noised, h_clean, stored, aux = _run(model, params, noised, clean, cache, rule=rule, block_size=block_size,
                                          min_block_size=min_block_size, execution=execution, dropout_keys=dropout_keys,
                                          output_positions_BxP=output_positions_BxP)
    if cache is not None and clean is not None:
        cache = cache.write(stored, clean, write_at)
    return ForwardOutput(h_noised, h_clean, cache, aux)


def logits(model: Backbone, params: dict, h, sigma=None) -> jax.Array:
    """Hidden states `[..., D]` -> logits float32 `[..., V]`. sigma `[..., n]` as in `Stream`, None: the constant 0."""
    return model.head.apply(_head_variables(model, params), h, _condition(model, params, sigma))


def features(model: Backbone, params: dict, h, sigma=None) -> jax.Array:
    """Hidden states -> what the output layer multiplies, both `[..., D]`; sigma as in `logits`."""
    cond = _condition(model, params, sigma)
    return model.head.apply(_head_variables(model, params), h, cond, method=model.head.features)


def output_layer(model: Backbone, params: dict) -> tuple[jax.Array, jax.Array]:
    """Kernel `[D, V']` and bias `[V']`: logits = features @ kernel + bias; no token has an id from vocab_size on."""
    return model.head.apply(_head_variables(model, params), method=model.head.output_layer)


def _head_variables(model, params):
    return {"params": {**params["head"], "embed": params["embed"]} if model.tied else params["head"]}


def _condition(model, params, sigma):
    if model.condition is None:
        return None
    sigma = jnp.zeros((1,) * 2) if sigma is None else sigma
    return model.condition.apply({"params": params["condition"]}, sigma)


def _run(model, params, noised, clean, cache, *, rule, block_size, execution, dropout_keys, min_block_size=None,
         output_positions_BxP=None):
    """Hidden states of both streams, by group the clean stream's keys and values (None without one), auxiliary loss."""
    spec = MaskSpec(rule=rule, block_size=block_size, aligned=cache is None, one_document=execution.one_document,
                    noised=None if noised is None else noised.tokens(True),
                    clean=None if clean is None else clean.tokens(False),
                    cache=None if cache is None or cache.empty else cache.tokens(), min_block_size=min_block_size)
    streams = {name: stream for name, stream in (("noised", noised), ("clean", clean)) if stream is not None}
    position = {name: stream.position[:, None] if name == "noised" else stream.position
                for name, stream in streams.items()}
    h = {name: model.embed.apply({"params": params["embed"]}, stream.ids, position[name])
         for name, stream in streams.items()}
    cond = {name: _condition(model, params, stream.sigma) for name, stream in streams.items()}
    rotary = {name: model.rotary(x) for name, x in position.items()}
    joined = 0
    is_decoding = len(streams) == 2 and not spec.aligned and noised.ids.shape[1] == 1  # decoding
    if is_decoding and noised.sigma is None and clean.sigma is None:
        joined = noised.position.shape[-1]
        cond["both"] = cond["clean"]
        rotary["both"] = jax.tree.map(lambda n, c: jnp.concatenate([n[:, 0], c], axis=1), rotary["noised"],
                                      rotary["clean"])
    aux, stored, first = jnp.zeros(()), {}, 0
    encoder = 0 if noised is None else encoder_layers(model.config)
    for index, (name, block, count) in enumerate(model.groups):
        last_layer_is_partial = noised is not None and (clean is not None or output_positions_BxP is not None)
        peeled = last_layer_is_partial and index == len(model.groups) - 1
        cached = None if spec.cache is None else list(zip(cache.keys[name], cache.values[name]))
        split, parts = min(max(encoder - first, 0), count), []
        for start, stop, with_noised in ((0, split, False), (split, count, True)):
            inputs = {stream: x for stream, x in h.items() if with_noised or stream == "clean"}
            if start == stop or not inputs:  # no such layers, or no clean tokens that would go through them
                continue
            layer_spec = dataclasses.replace(spec, noised=spec.noised if with_noised else None,
                                             window=getattr(block, "window", None))
            layer = functools.partial(_layer, block, layer_spec, cond, rotary, execution.backend, dropout_keys,
                                      joined if with_noised else 0, output_positions_BxP)
            group_params = params[name] if stop - start == count else _layers(params[name], start, stop)
            outputs, group_kv, part_aux = _run_group(layer, group_params, cached and cached[start:stop], inputs, first + start,
                                                     stop - start, peeled and with_noised, execution)
            h, aux, parts = h | outputs, aux + part_aux, [*parts, group_kv]
        stored[name] = parts[0] if len(parts) == 1 else jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)
        first += count
    return h.get("noised"), h.get("clean") if noised is None else None, stored, aux


def _layers(params, start: int, stop: int):
    """Some layers of a group, stacked or as a tuple (`unstack_layers`)."""
    return params[start:stop] if isinstance(params, tuple) else jax.tree.map(lambda x: x[start:stop], params)


def _run_group(layer, params, cached, h, first, count, peeled, execution: Execution):
    """All layers of a group; the last one is peeled off when not all of its output is wanted.

    cached: None, or for each layer its (keys, values).
    """
    scanned = count - 1 if peeled else count
    cached = [None] * count if cached is None else cached
    stacked = not isinstance(params, tuple)
    def of_layer(i):
        return jax.tree.map(lambda x: x[i], params) if stacked else params[i], cached[i], first + i
    def body(h, x, last):
        h, stored, aux = layer(*x, h, last)
        return h, (stored, aux)
    if execution.remat != "none":
        body = jax.checkpoint(body, policy=lookup(REMAT, execution.remat, "remat policy compute.remat"),
                              static_argnums=(2,), prevent_cse=execution.layers != "scan")
    if execution.layers == "scan" and scanned > 1 and stacked:
        joined_cache = jax.tree.map(lambda *layers: jnp.stack(layers), *cached[:scanned])
        xs = (jax.tree.map(lambda x: x[:scanned], params), joined_cache, first + jnp.arange(scanned))
        h, ys = jax.lax.scan(lambda h, x: body(h, x, False), h, xs)
        parts = [ys]
    else:
        parts = []
        for i in range(scanned):
            h, y = body(h, of_layer(i), False)
            parts.append(jax.tree.map(lambda y: y[None], y))
    if peeled:
        h, y = body(h, of_layer(count - 1), True)
        parts.append(jax.tree.map(lambda y: y[None], y))
    stored, aux = parts[0] if len(parts) == 1 else jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)
    return h, stored, aux.sum()


def _layer(block, spec, cond, rotary, backend, dropout_keys, joined, output_positions_BxP, params, cached, index, h, last):
    """One layer of both streams -> hidden states, the clean stream's (k, v) or None, auxiliary loss.

    joined: length of the noised stream when both go through the weights as one, else 0. last: of the clean stream
    nothing else is wanted, of the noised one only what `wanted` says.
    """
    variables = {"params": params}
    h = {name: constrain(x, BATCH_AXES) for name, x in h.items()}  # else XLA may split features and sum them everywhere
    if joined and not last:
        h = {"both": _join(h["noised"], h["clean"])}
    qkv = {name: block.apply(variables, h[name], cond[name], rotary[name], not (last and name == "clean"),
                             method=block.project_qkv) for name in h}
    if "both" in qkv:
        qkv = _split_all(qkv.pop("both"), joined)
    stored = qkv["clean"][1:] if "clean" in qkv else None
    if cached is not None:
        cached = tuple(dequantize(x, next(iter(h.values())).dtype) for x in cached)
    if last:
        h = {"noised": h["noised"]}
    attended = dict(zip(("noised", "clean"), attend(backend, spec, qkv.get("noised"), qkv.get("clean"), cached)))
    if last and output_positions_BxP is not None:
        h["noised"], attended["noised"] = (
            jnp.take_along_axis(x, jnp.expand_dims(output_positions_BxP, (1, *range(3, x.ndim))), axis=2)
            for x in (h["noised"], attended["noised"]))
    if "both" in h:
        attended = {"both": _join(attended["noised"], attended["clean"])}
    result, aux = {}, jnp.zeros(())
    for name in h:
        key = None
        if dropout_keys is not None:
            key = jax.vmap(lambda k, name=name: jax.random.fold_in(k, 2 * index + (name == "noised")))(dropout_keys)
        result[name], extra = block.apply(variables, h[name], attended[name], cond[name], key, method=block.attention_output_and_mlp)
        aux = aux + extra
    if "both" in result:
        result = _split_all(result.pop("both"), joined)
    return result, stored, aux


def _join(noised_Bx1xT, clean_BxC):
    """Both streams as one row of tokens, so that weights are read once."""
    return jnp.concatenate([noised_Bx1xT[:, 0], clean_BxC], axis=1)


def _split_all(arrays, noised_length: int) -> dict:
    """Inverse of `_join`, of an array or several: by stream."""
    return {"noised": jax.tree.map(lambda x: x[:, None, :noised_length], arrays),
            "clean": jax.tree.map(lambda x: x[:, noised_length:], arrays)}
