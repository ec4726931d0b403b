"""One layer of a pass, and all layers of one: scanned or unrolled, rematerialised, attending.

Nothing here knows which pass it belongs to (`trunk.two_streams`, `trunk.prefill`, `trunk.decode`).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.attention import MaskSpec, attend
from bd3lm_jax.core.errors import lookup
from bd3lm_jax.models.cache import Cache, dequantize
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


class LayerInputs(NamedTuple):
    """What every layer of a pass reads beside its parameters and hidden states.

    spec: of both streams. cond, rotary: by stream, as `Backbone` makes them; with an entry "joined" both streams go
    through the weights as one row of tokens, which reads the weights once. dropout_keys: one typed key a row `[B]`, or
    None.
    """

    spec: MaskSpec
    cond: dict
    rotary: dict
    backend: str
    dropout_keys: jax.Array | None = None


class LastLayer(NamedTuple):
    """A last layer of whose output only a part is read: nothing of the clean stream, whose keys and values it computes,
    and of the noised one the places `output_positions` `[B, P]` (None: all)."""

    output_positions_BxP: jax.Array | None = None


def block(module: Any, inputs: LayerInputs, params, cached, index, h: dict, last: LastLayer | None = None) -> tuple:
    """One layer on the streams in `h`.

    Args:
        params, cached, index: of this layer; cached: its (keys, values) in the cache, or None.
        h: hidden states by stream, "noised" `[B, M, T, D]` and "clean" `[B, C, D]`.
        last: what is read of the layer's output; None: everything.

    Returns:
        Hidden states by stream, the clean stream's (keys, values) or None without one, auxiliary loss.
    """
    variables, joined = {"params": params}, "joined" in inputs.rotary and len(h) == 2 and last is None
    h = {name: constrain(x, BATCH_AXES) for name, x in h.items()}  # else XLA may split features and sum them everywhere
    spec = dataclasses.replace(inputs.spec, noised=inputs.spec.noised if "noised" in h else None,
                               window=getattr(module, "window", None))
    if joined:
        h = {"joined": _join(h["noised"], h["clean"])}
    qkv = {name: module.apply(variables, x, inputs.cond[name], inputs.rotary[name], last is None or name == "noised",
                              method=module.project_qkv) for name, x in h.items()}
    if joined:
        qkv = _split(qkv["joined"], spec)
    if cached is not None:
        cached = tuple(dequantize(x, next(iter(h.values())).dtype) for x in cached)
    attended = dict(zip(("noised", "clean"), attend(inputs.backend, spec, qkv.get("noised"), qkv.get("clean"), cached)))
    if joined:
        attended = {"joined": _join(attended["noised"], attended["clean"])}
    if last is not None:
        h = {"noised": _at(h["noised"], last.output_positions_BxP)}
        attended = {"noised": _at(attended["noised"], last.output_positions_BxP)}
    result, aux = {}, jnp.zeros(())
    for name in h:
        result[name], extra = module.apply(variables, h[name], attended[name], inputs.cond[name],
                                           _dropout_keys(inputs.dropout_keys, index, name),
                                           method=module.attention_output_and_mlp)
        aux = aux + extra
    return _split(result["joined"], spec) if joined else result, qkv["clean"][1:] if "clean" in qkv else None, aux


def run_layers(groups, params: dict, inputs: LayerInputs, h: dict, cache: Cache | None, execution: Execution,
               first_noised: int = 0, last: LastLayer | None = None) -> tuple:
    """All layers: hidden states by stream, by group the clean stream's keys and values stacked, auxiliary loss.

    first_noised: number of the first layer that the noised stream goes through. last: as in `block`, of the last layer.
    """
    aux, parts = jnp.zeros(()), {name: [] for name, *_ in groups}
    runs = list(_runs(groups, first_noised))
    for name, module, start, stop, number in runs:
        streams = {stream: x for stream, x in h.items() if stream == "clean" or number >= first_noised}
        if not streams:
            continue
        cached = [None] * (stop - start) if cache is None or cache.empty else list(
            zip(cache.keys[name][start:stop], cache.values[name][start:stop]))
        layer = functools.partial(block, module, inputs)
        outputs, stored, extra = _run_alike(layer, _slice_layers(params[name], start, stop), cached, streams, number,
                                            execution, last if number == runs[-1][-1] else None)
        h, aux = h | outputs, aux + extra
        parts[name].append(stored)
    return h, {name: _concatenate(stored) for name, stored in parts.items()}, aux


def _runs(groups, boundary: int) -> Iterator[tuple]:
    """Layers that are alike and go through the same streams: (group, module, start, stop, number of the first one); a
    group with layer `boundary` in it is cut there."""
    first = 0
    for name, module, count in groups:
        cut = min(max(boundary - first, 0), count)
        yield from ((name, module, start, stop, first + start) for start, stop in ((0, cut), (cut, count))
                    if start < stop)
        first += count


def _run_alike(layer, params, cached: list, h: dict, first: int, execution: Execution, last: LastLayer | None) -> tuple:
    """Layers of one kind, numbered from `first` on, the last one by itself if its output is read in part."""
    stacked, count = not isinstance(params, tuple), len(cached)
    scanned = count if last is None else count - 1

    def of_layer(i):
        return jax.tree.map(lambda x: x[i], params) if stacked else params[i], cached[i], first + i

    def body(h, x, is_last):
        h, stored, aux = layer(*x, h, last if is_last else None)
        return h, (stored, aux)

    if execution.remat != "none":
        body = jax.checkpoint(body, policy=lookup(REMAT, execution.remat, "remat policy compute.remat"),
                              static_argnums=(2,), prevent_cse=execution.layers != "scan")
    parts, done = [], 0
    if execution.layers == "scan" and scanned > 1 and stacked:
        joined_cache = jax.tree.map(lambda *layers: jnp.stack(layers), *cached[:scanned])
        xs = (jax.tree.map(lambda x: x[:scanned], params), joined_cache, first + jnp.arange(scanned))
        h, ys = jax.lax.scan(lambda h, x: body(h, x, False), h, xs)
        parts, done = [ys], scanned
    for i in range(done, count):
        h, y = body(h, of_layer(i), i >= scanned)
        parts.append(jax.tree.map(lambda y: y[None], y))
    stored, aux = _concatenate(parts)
    return h, stored, aux.sum()


def _slice_layers(params, start: int, stop: int):
    """Some layers of a group, stacked or as a tuple (`trunk.unstack_layers`)."""
    if isinstance(params, tuple):
        return params[start:stop]
    count = jax.tree.leaves(params)[0].shape[0]
    return params if (start, stop) == (0, count) else jax.tree.map(lambda x: x[start:stop], params)


def _concatenate(parts: list):
    """Results of layers, each with a leading layer axis, one after the other."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


def _dropout_keys(keys_B, index, stream: str):
    """Keys of one layer and stream."""
    if keys_B is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, 2 * index + (stream == "noised")))(keys_B)


def _at(x_BxMxT, positions_BxP):
    """`x` at these places of every row, `[B, M, P, ...]`; None: at all of them."""
    if positions_BxP is None:
        return x_BxMxT
    return jnp.take_along_axis(x_BxMxT, jnp.expand_dims(positions_BxP, (1, *range(3, x_BxMxT.ndim))), axis=2)


def _join(noised_Bx1xT, clean_BxC):
    """Both streams as one row of tokens."""
    return jnp.concatenate([noised_Bx1xT[:, 0], clean_BxC], axis=1)


def _split(arrays, spec: MaskSpec) -> dict:
    """Inverse of `_join`, of an array or several: by stream."""
    length = spec.tokens("noised").position.shape[-1]
    return {"noised": jax.tree.map(lambda x: x[:, None, :length], arrays),
            "clean": jax.tree.map(lambda x: x[:, length:], arrays)}
