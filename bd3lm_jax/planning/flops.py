"""Floating-point operations of what we compute (a multiply-add is 2), counted, not measured.

`train_step` and `forward` count what the mathematics needs: the noised and the clean stream (without its last block,
which nobody reads; in the last layer only keys and values), attention between tokens that see each other, the output
layer on the positions that are scored, and a backward pass of twice the forward pass. This is what model FLOPs
utilisation and expected speeds refer to. `count` counts every matrix product of a traced function, with everything that
is computed beyond need (whole tiles, what remat computes again); a compiler's own count takes the body of a scan once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax import models
from bd3lm_jax.core import jax_settings
from bd3lm_jax.models import trunk


class Parts(NamedTuple):
    """FLOPs of a forward pass: matrix products of the layers, attention, output layer."""

    layers: float
    attention: float
    head: float


def train_step(model_config: Any, objective: Any, *, batch: int, length: int, noise_samples: int,
               adaptive_noise: Any = None) -> float:
    """FLOPs that a step on `batch` rows of `length` tokens needs, over all devices; `noise_samples` noised copies a
    row.

    adaptive_noise: what chooses the noise from the data (`Config.adaptive_noise`); None: the objective's own noise.
    """
    return 3 * forward(model_config, objective, batch=batch, length=length, noise_samples=noise_samples,
                       adaptive_noise=adaptive_noise)


def forward(model_config: Any, objective: Any, *, batch: int, length: int, noise_samples: int,
            adaptive_noise: Any = None) -> float:
    """FLOPs of the forward pass of `train_step`; without such a choice also that of the likelihood bound."""
    return sum(parts(model_config, objective, batch=batch, length=length, noise_samples=noise_samples,
                     adaptive_noise=adaptive_noise))


def parts(model_config: Any, objective: Any, *, batch: int, length: int, noise_samples: int,
          adaptive_noise: Any = None) -> Parts:
    """FLOPs of a forward pass by part. Rows hold one document each (packed rows need less attention).

    Rows whose blocks are of several sizes (`mixed`) count as the mean over these sizes.

    Args:
        model_config: of any registered backbone, with its vocabulary size.
        objective: of any registered kind; one that is `causal` reads a single stream.
        adaptive_noise: as in `train_step`.
    """
    model = models.build(model_config, jnp.float32)
    params = jax.eval_shape(lambda: trunk.init(model, jax_settings.key(0)))
    sizes = objective.block_sizes
    objectives = [objective.at(size) for size in sizes] if len(sizes) > 1 else [objective]
    layers, attention = np.mean([_body(model, params, one, batch, length, noise_samples) for one in objectives], axis=0)
    shapes = _scored(objective, batch, length, noise_samples, adaptive_noise)
    head = sum(_head(model, params, shape) for shape in shapes)
    return Parts(float(layers), float(attention), head)


def _body(model, params, objective, batch: int, length: int, noise_samples: int) -> tuple[float, float]:
    """FLOPs of the layers and of attention, of blocks of one size."""
    model_config = model.config
    level = (batch, noise_samples,
             length // objective.block_size) if trunk.is_time_conditioned(model_config) else (1, 1)
    noised_views, clean = objective.stream_lengths(length, noise_samples)
    layers = attention = first = 0
    for index, (name, block, layer_count) in enumerate(model.groups):
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params[name])
        on_noised = _layer(model, block, layer, params, (batch, noised_views, length), level)
        on_clean = _layer(model, block, layer, params, (batch, clean), (1, 1))
        # The layer, if any, whose clean stream gives only keys and values.
        peeled = int(clean < length and index == len(model.groups) - 1)
        noised_layers = layer_count - min(max(model_config.first_noised_layer - first, 0), layer_count)
        first += layer_count
        clean_pairs, noised_pairs = _pairs(objective, length, noise_samples, getattr(block, "window", None))
        layers += noised_layers * on_noised.all + (layer_count - peeled) * on_clean.all + peeled * on_clean.keys_values
        attention += 4 * batch * on_noised.width * (noised_layers * noised_pairs + (layer_count - peeled) * clean_pairs)
    if objective.reads_soft_inputs:  # mixtures of tokens instead of ids
        soft_inputs = jax.ShapeDtypeStruct((batch, noise_samples, length, model_config.vocab_size), jnp.float32)
        places = jax.ShapeDtypeStruct(soft_inputs.shape[:-1], jnp.int32)
        layers += count(lambda p, *x: model.embed.apply({"params": p}, *x), params["embed"], soft_inputs, places)
    return layers, attention


def scored_positions(objective: Any, batch: int, length: int, noise_samples: int, adaptive_noise: Any = None) -> int:
    """Positions of a copy that reach the output layer: the static capacity of the objective's masks, or of those that
    adaptive noise may choose."""
    return _scored(objective, batch, length, noise_samples, adaptive_noise)[0][-1]


def _scored(objective, batch: int, length: int, noise_samples: int, adaptive_noise) -> list[tuple[int, int, int]]:
    """Shapes `[B, M, C]` of the positions that reach the output layer: of the copies, and of a clean stream that
    predicts, too."""
    def noised(ids):
        arrays: dict[str, Any] = {name: jnp.zeros(ids.shape) for name in objective.extra_batch_keys}
        if hasattr(adaptive_noise, "distribution"):
            blocks = length // objective.block_size
            arrays["distribution"] = adaptive_noise.distribution(adaptive_noise.init_state(), blocks)
        if objective.learns:
            learned = objective.init_learned_params(jax_settings.key(0), 1, 1)
            arrays["learned_params"] = {**learned, "embedding": jnp.zeros((1, 1))}
        return objective.corrupt(jax_settings.key(0), ids, ids, noise_samples, 0, 0, **arrays)

    drawn = jax.eval_shape(noised, jax.ShapeDtypeStruct((batch, length), jnp.int32))
    of_clean = [(batch, 1, length)] if drawn.clean is not None else []
    return [(batch, noise_samples, min(drawn.capacity, length)), *of_clean]


def count(function: Callable, *args: Any) -> int:
    """FLOPs of all matrix products in `function(*args)`, which is traced, not run; args may be abstract.

    Raises ValueError where the number cannot be known: a kernel, or a product in a loop of unknown length.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


class _Layer(NamedTuple):
    """FLOPs of one layer on one stream without attention; of its keys and values alone; the width of attention."""

    all: int
    keys_values: int
    width: int


def _layer(model, block, layer, params, shape, level) -> _Layer:
    """One layer on tokens `[B, C]` or `[B, M, T]`; level: shape of the noise levels that condition them."""
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    h = jax.eval_shape(lambda p, x: model.embed.apply({"params": p}, x, x), params["embed"], ids)
    rotary = jax.eval_shape(model.rotary, ids)
    cond = None
    if model.condition is not None:
        sigma = jax.ShapeDtypeStruct(level, jnp.float32)
        cond = jax.eval_shape(lambda p, x: model.condition.apply({"params": p}, x), params["condition"], sigma)

    def project_qkv(p, h, cond, rotary):
        return block.apply({"params": p}, h, cond, rotary, True, method=block.project_qkv)

    def attention_output_and_mlp(p, h, attended, cond):
        return block.apply({"params": p}, h, attended, cond, None, method=block.attention_output_and_mlp)[0]

    q = jax.eval_shape(project_qkv, layer, h, cond, rotary)[0]
    width = math.prod(q.shape[-2:])
    before, after = count(project_qkv, layer, h, cond, rotary), count(attention_output_and_mlp, layer, h, q, cond)
    if hasattr(block, "padding_flops"):
        after -= block.padding_flops(math.prod(shape))
    return _Layer(before + after, before - 2 * math.prod(h.shape) * width, width)


def _pairs(objective, length: int, noise_samples: int, window: int | None) -> tuple[float, float]:
    """Pairs (query, key) that see each other in one row and layer: clean queries, noised queries."""
    reach, place = length if window is None else window, np.arange(length)

    def pairs(size: int) -> np.ndarray:
        """Of each query whose reach ends with its part of `size` tokens, whichever stream its keys are in."""
        last = np.minimum(place // size * size + size - 1, place + reach)
        return last - np.maximum(place - reach, 0) + 1

    copies, clean = objective.stream_lengths(length, noise_samples)
    of_clean = pairs(1 if objective.attention_rule == "causal" else objective.block_size)[:clean]
    return float(of_clean.sum()), float(copies * pairs(objective.block_size).sum())


def _head(model, params, shape) -> int:
    """The output layer on positions `[B, M, C]`."""
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    h = jax.eval_shape(lambda p, x: model.embed.apply({"params": p}, x, x), params["embed"], ids)
    sigma = jax.ShapeDtypeStruct(ids.shape, jnp.float32) if trunk.is_time_conditioned(model.config) else None
    return count(lambda p, h, sigma: trunk.logits(model, p, h, sigma), params, h, sigma)


def _jaxpr_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
            continue
        inner = [_jaxpr_flops(x) for x in _inner_jaxprs(equation.params)]
        if name == "pallas_call" or (name == "while" and any(inner)):
            raise ValueError(f"cannot count the FLOPs of {name}: how often it runs is not known")
        if name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * (equation.params["length"] if name == "scan" else 1)
    return total


def _inner_jaxprs(params: dict):
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
