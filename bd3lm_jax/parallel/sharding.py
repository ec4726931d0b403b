"""Where arrays live: the device mesh, parameters by the path rules of their network, and activation constraints.

Mesh axes: "data" replicates the parameters, "fsdp" shards them, "expert" splits the experts of a mixture (all three
split the batch), "tensor" splits heads, the hidden layer of the MLP, the vocabulary, and experts once more.

Slices are groups of devices with fast links of their own, joined by the network of the data centre. They lie along
"data", outermost, so that only what "data" sends crosses that network: the sum of the gradients, once a step.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.schema import MeshConfig
from bd3lm_jax.core.state import LORA, OBJECTIVE_PARAMS, TrainState, trainable_params

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
EXPERT_AXES = ("expert", "tensor")

# Pairs (pattern of the whole path of a parameter, spec). Networks bring theirs (`models.sharding_rules`); these are for
# what stands beside any network.
Rules = tuple[tuple[str, P], ...]
SHARED_RULES: Rules = ((rf"{OBJECTIVE_PARAMS}/\w+", P()), (rf"{LORA}/.*", P()))


def make_mesh(mesh: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of all `devices` (None: every device of the run); a size of -1 takes the devices that are left.

    Sizes are those of one slice; the mesh has `slices` times as many along "data". Raises UserError, with the numbers,
    if the sizes do not multiply to the number of devices, or if these lie in another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = group_by_slice(mesh, devices)
    data, *others = axis_sizes(mesh, len(devices), len(slices))
    device_arrays = [_device_array((data // len(slices), *others), slice_) for slice_ in slices]
    return Mesh(np.concatenate(device_arrays), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _device_array(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices of one slice, `[*sizes]`, neighbours along the axes being neighbours in the machine if they can."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # sizes that are no products of the slice's own axes
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def group_by_slice(mesh: MeshConfig, devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of every slice of the mesh. -1: as many as there are.

    Simulated devices are in no slices, so they are dealt out in order. GPUs, whose hosts count as slices, may be one.
    UserError if the devices lie in another number of slices, or in slices of several sizes.
    """
    devices_by_slice: dict[int, list[Any]] = {}
    for device in devices:
        devices_by_slice.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    slices, platform = len(devices_by_slice) if mesh.slices == -1 else mesh.slices, devices[0].platform
    sizes = sorted({len(slice_) for slice_ in devices_by_slice.values()})
    if slices == len(devices_by_slice) and len(sizes) == 1:
        return [devices_by_slice[index] for index in sorted(devices_by_slice)]
    if slices == 1 and platform != "tpu":
        return [list(devices)]
    if platform == "cpu" and len(devices) % slices == 0:
        part = len(devices) // slices
        return [list(devices[first:first + part]) for first in range(0, len(devices), part)]
    reason = f", of {' and '.join(map(str, sizes))} devices: slices must be alike" if len(sizes) > 1 else (
        f": use mesh.slices={len(devices_by_slice)}, or -1 for as many as there are")
    raise UserError(f"mesh.slices={slices}, but the {len(devices)} devices are in {len(devices_by_slice)}{reason}")


def axis_sizes(mesh: MeshConfig, count: int, slices: int) -> tuple[int, ...]:
    """Sizes by axis for `count` devices in so many slices, -1 resolved. UserError if their product is not `count`."""
    sizes = [getattr(mesh, axis) for axis in AXES]
    known_product = slices * math.prod(size for size in sizes if size != -1)
    data, *others = (count // known_product if size == -1 else size for size in sizes)
    if slices * data * math.prod(others) != count:
        named_sizes = {axis: size for axis, size in zip(AXES, sizes) if axis != "expert" or size != 1}
        named_sizes |= {"slices": slices} if slices > 1 else {}
        setting = ", ".join(f"mesh.{axis}={size}" for axis, size in named_sizes.items())
        raise UserError(f"{setting} does not fit {count} devices: the product must be {count} (one size may be -1: "
                        "whatever is left)")
    return slices * data, *others


def check_mesh(mesh: Mesh | AbstractMesh, model_config: Any, batch: int) -> None:
    """UserError unless "tensor" divides the heads, the axes that split rows divide `batch` (rows over all devices), and
    "expert", where it is not 1, splits experts that are there."""
    expert, tensor, rows = mesh.shape["expert"], mesh.shape["tensor"], num_row_shards(mesh)
    if model_config.num_heads % tensor:
        raise UserError(f"mesh.tensor={tensor} does not divide model.num_heads={model_config.num_heads}: "
                        f"use a divisor of {model_config.num_heads}")
    if expert > 1:
        experts = model_config.num_experts
        if not experts:
            raise UserError(f"mesh.expert={expert} splits experts, and model.kind='{model_config.kind}' has none: "
                            "use 1")
        if experts % (expert * tensor):
            raise UserError(f"mesh.expert x mesh.tensor = {expert * tensor} does not divide "
                            f"model.num_experts={experts}: use divisors of {experts}")
    if batch % rows:
        axes = " x ".join(f"mesh.{axis}" for axis in BATCH_AXES if axis != "expert" or expert > 1)
        raise UserError(f"{axes} = {rows} does not divide a batch of {batch} rows: "
                        f"use a multiple of {rows}, e.g. {-(-batch // rows) * rows}")


def num_row_shards(mesh: Any) -> int:
    """Devices that the rows of a batch are split over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def param_specs(params: Any, rules: Rules) -> Any:
    """Tree of PartitionSpec by the rules of a network, for arrays or abstract arrays.

    Raises UserError listing leaves without a rule.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    specs = [next((spec for rule, spec in (*rules, *SHARED_RULES) if re.fullmatch(rule, path)), None) for path in paths]
    uncovered = [path for path, spec in zip(paths, specs) if spec is None]
    if uncovered:
        raise UserError(f"no sharding rule covers {', '.join(uncovered)}: add a line to SHARDING in the file of the "
                        "network, which its entry in models.BACKBONES names")
    return jax.tree.unflatten(treedef, specs)


def param_shardings(params: Any, mesh: Mesh, rules: Rules) -> Any:
    """Tree of NamedSharding: `param_specs`, with every axis that does not divide its dimension left out."""
    return jax.tree.map(lambda leaf, spec: NamedSharding(mesh, _drop_indivisible(spec, leaf.shape, mesh)),
                        params, param_specs(params, rules))


def _drop_indivisible(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    def num_shards(axes):
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))

    return P(*(axes if axes is not None and size % num_shards(axes) == 0 else None for axes, size in zip(spec, shape)))


def state_shardings(tx: optax.GradientTransformation, abstract_state: TrainState, mesh: Mesh,
                    rules: Rules) -> TrainState:
    """TrainState of NamedSharding for a state from `jax.eval_shape`: moments and average lie where their weights do."""
    params = param_shardings(abstract_state.params, mesh, rules)
    replicated: Any = NamedSharding(mesh, P())  # in the place of an array
    opt_state = optax.tree_map_params(tx, lambda _, sharding: sharding, abstract_state.opt_state,
                                      trainable_params(params), transform_non_params=lambda _: replicated)
    noise: Any = dict.fromkeys(abstract_state.noise, replicated)
    return TrainState(replicated, params, params if abstract_state.ema else {}, opt_state, noise)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Abstract arrays that carry shardings, as a restore needs them."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        abstract, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) split over BATCH_AXES."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_devices() -> int:
    """Devices that the rows of a batch are split over under `jax.set_mesh`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else num_row_shards(mesh)


def divisible_axes(mesh: Any, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """Those of the axes that the mesh in use has, or None if there are none or their product does not divide `size`."""
    axes = tuple(axis for axis in axes if axis in mesh.auto_axes)
    return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def block_until_ready_if_simulated(results: Any) -> Any:
    """`results`, once they are there if devices are simulated on a CPU; elsewhere at once.

    Simulated devices share a few threads: the collectives of two programs in flight can starve each other for ever.
    """
    simulated = jax.default_backend() == "cpu" and len(jax.devices()) > 1
    return jax.block_until_ready(results) if simulated else results


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """`x` laid out by `spec` under `jax.set_mesh`, one entry a dimension (those left out are not split).

    Without a mesh `x` itself.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*spec))
