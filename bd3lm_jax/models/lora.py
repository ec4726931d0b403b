"""Low-rank updates of frozen matrices (LoRA, arXiv 2106.09685): W + (alpha / r) A B, where only A and B are trained.

They stand beside the network's parameters under LORA, by the path of their matrix: every kernel of a layer group that
is no router or expert. `merge_lora` puts them into the weights before a pass, so nothing that runs a network knows of
them; B begins at zero, and with it the adapted network is the frozen one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.state import LORA
from bd3lm_jax.models import Backbone

LORA_FOLD = 0x6C6F7261  # tells their random numbers from those of the network


def init(model: Backbone, params: dict, rank: int, key: jax.Array) -> dict:
    """Fresh updates of rank r, nested as the layer groups of `params`: for a kernel `[n, *in, *out]` of n layers "a"
    `[n, in, r]`, of variance 1 / in, and "b" `[n, r, out]`, which is 0.

    Where inputs end and outputs begin is where the two sides are nearest in size.
    """
    groups = {name: params[name] for name, *_ in model.groups}
    kernels: dict[tuple, Any] = {path: x for path, x in flatten_dict(groups).items()
                                 if path[-1] == "kernel" and _takes_lora(path, x)}
    lora_params = {}
    for index, (path, kernel) in enumerate(sorted(kernels.items())):
        layers, inputs, outputs = _matrix_shape(kernel.shape)
        a = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, LORA_FOLD), index), (layers, inputs, rank))
        lora_params[path] = {"a": a / math.sqrt(inputs), "b": jnp.zeros((layers, rank, outputs))}
    return unflatten_dict({(*path, name): x for path, pair in lora_params.items() for name, x in pair.items()})


def merge_lora(params: dict, scale: float) -> dict:
    """The parameters of the network with its updates in the weights, float32; those without updates as they are.

    scale: alpha / r.
    """
    if LORA not in params:
        return params
    flat: dict[tuple, Any] = dict(flatten_dict({name: x for name, x in params.items() if name != LORA}))
    updates: dict[tuple, Any] = dict(flatten_dict(params[LORA]))
    for path in sorted({path[:-1] for path in updates}):  # the same program in every process
        product = jnp.einsum("nir,nro->nio", updates[*path, "a"], updates[*path, "b"],
                             precision=jax.lax.Precision.HIGHEST)
        flat[path] = flat[path] + scale * product.reshape(flat[path].shape)
    return unflatten_dict(flat)


def merge_lora_jitted(params: dict, train: Any) -> dict:
    """`merge_lora` as a program of its own, for a TrainConfig."""
    return jax.jit(merge_lora)(params, scale_of(train)) if LORA in params else params


def scale_of(train: Any) -> float:
    """alpha / r of a TrainConfig; 1 without updates."""
    return train.lora_alpha / train.lora_rank if train.lora_rank else 1.0


def check(config: Any) -> None:
    """UserError for what frozen weights do not go with."""
    rank, adapt = config.train.lora_rank, config.noise.adaptive_noise
    frozen = config.train.init_from and not config.optim.ema_decay and adapt == "none" and not config.diffusion.learns
    if rank and not frozen:
        raise UserError(f"train.lora_rank={rank} trains updates of weights that are there: it needs train.init_from, "
                        "optim.ema_decay=0, noise.adaptive_noise='none' and an objective without parameters of its own")


def _takes_lora(path: tuple[str, ...], x) -> bool:
    return x.ndim >= 3 and not any("expert" in name or "router" in name for name in path)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Layers, inputs and outputs of a stacked kernel."""
    layers, *sizes = shape
    split = min(range(1, len(sizes)), key=lambda i: abs(math.log(math.prod(sizes[:i]) / math.prod(sizes[i:]))))
    return layers, math.prod(sizes[:split]), math.prod(sizes[split:])
