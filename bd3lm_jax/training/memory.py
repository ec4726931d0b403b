"""Out of device memory: one line that says what would fit, found by compiling (not running) cheaper ways to train."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax import attention
from bd3lm_jax.config import Config
from bd3lm_jax.core import hardware
from bd3lm_jax.core.errors import RunError
from bd3lm_jax.core.log import note
from bd3lm_jax.models.layers import REMAT
from bd3lm_jax.parallel import sharding
from bd3lm_jax.training.program import Program, bytes_needed, bytes_per_device

GIB = 2**30
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
EXHAUSTED = "RESOURCE_EXHAUSTED"
LANES, SUBLANES = 128, 8  # a TPU holds arrays in tiles of float32 [8, 128]
REQUIRED_RATIO = 0.9  # what did not fit will not fit with less than a tenth off


@contextlib.contextmanager
def explain_out_of_memory(program: Program) -> Iterator[None]:
    """Turns running out of device memory within the block into a RunError that says what would fit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if EXHAUSTED not in str(error):
            raise
        note("out of device memory: looking for what would fit")
        raise RunError(advice(program, limit(program.mesh.devices.flat[0]))) from error


def advice(program: Program, limit_bytes: int) -> str:
    """What the step needs a device, and the cheapest change that needs at most `limit_bytes`, as one line.

    Tried in this order, each with those before: more remat, smaller microbatches, weights split over all devices
    (fsdp), fewer copies.
    """
    needed = _bytes_needed(program)
    allowed = min(limit_bytes, REQUIRED_RATIO * needed)
    summary = (f"out of memory: the step needs about {needed / GIB:.1f} GiB a device, there are "
               f"{limit_bytes / GIB:.1f}")
    for config in _cheaper(program.config, program.mesh):
        other = _with_config(program, config)
        if bytes_per_device(other.arguments()) > allowed:
            continue
        needed_bytes = _bytes_needed(other)
        if needed_bytes <= allowed:
            return f"{summary}: {_flags(program.config, config)} would need {needed_bytes / GIB:.1f}"
    state = bytes_per_device(program.arguments()[0])
    return (f"{summary}, and neither remat, microbatches, fsdp nor fewer copies would do (weights and optimiser take "
            f"{state / GIB:.1f}): use more devices, with mesh.fsdp, or a smaller model")


def limit(device: Any) -> int:
    """Bytes that programs may use on a device; on CPU a device's share of the machine."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    accelerator = hardware.find(device.device_kind)
    if accelerator is not None:
        return accelerator.usable_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def bytes_from_error(error: Exception, argument_bytes: int) -> int | None:
    """Bytes a device that the TPU compiler says were needed, if that is what the error is about.

    held: bytes of the program's arguments, which one of its messages leaves out.
    """
    text = str(error)
    total = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", text)
    temporary = re.search(r"HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM", text)
    found = total or temporary
    if found is None:
        return None
    return int(float(found[1]) * UNITS[found[2]]) + (0 if total else argument_bytes)


def tpu_padding(program: Program) -> int:
    """Bytes a device by which a TPU pads what attention keeps for the backward pass, and a CPU's compiler does not.

    Splash attention keeps its output, heads padded to whole lanes, and a log-sum-exp in eight sublanes, both for rows
    padded to whole tiles, in every layer that the remat policy does not compute again; without a policy also its
    queries, keys and values.
    """
    from bd3lm_jax.attention.splash import choose_tile

    config, mesh = program.config, program.mesh
    objective, compute, length = config.diffusion, config.compute, config.data.seq_len
    if compute.attention not in ("auto", "splash") or length <= attention.SMALL:
        return 0
    noise_samples, clean = objective.stream_lengths(length, config.train.noise_samples)
    tile = choose_tile(length if noise_samples else 0, clean, noise_samples, objective.block_size)
    real = noise_samples * length + clean
    padded = (noise_samples * -(-length // tile) + -(-clean // tile)) * tile
    head = config.model.head_dim
    size = jnp.dtype(program.model.dtype).itemsize
    lanes = -(-head // LANES) * LANES
    arrays = 4 if compute.remat == "none" else 1
    extra = arrays * size * (padded * lanes - real * head) + 4 * (padded * SUBLANES - real)
    rows = (compute.microbatch or config.train.batch_size) // sharding.num_row_shards(mesh)
    layers = 1 if compute.remat == "full" else config.model.num_layers
    return rows * config.model.num_heads // mesh.shape["tensor"] * layers * extra


def _bytes_needed(program: Program) -> float:
    """Bytes a device; infinite where the compiler gives up without a number."""
    try:
        return bytes_needed(program.compile())
    except jax.errors.JaxRuntimeError as error:
        if EXHAUSTED not in str(error):
            raise
        return bytes_from_error(error, bytes_per_device(program.arguments())) or float("inf")


def _cheaper(config: Config, mesh: jax.sharding.Mesh) -> Iterator[Config]:
    """Configs that need less memory, the cheapest first."""
    slices = len(sharding.group_by_slice(config.mesh, list(mesh.devices.flat)))
    data = mesh.shape["data"] // slices
    split = dataclasses.replace(config.mesh, data=1, fsdp=data * mesh.shape["fsdp"])
    policies = list(REMAT)[list(REMAT).index(config.compute.remat):]
    first = config.compute.microbatch or config.train.batch_size
    computed = [(policy, first) for policy in policies]
    computed += [(policies[-1], rows) for rows in _halves(first, sharding.num_row_shards(mesh))[1:]]
    for noise_samples in _halves(config.train.noise_samples, config.diffusion.noise_sample_multiple):
        for axes in [config.mesh, split] if data > 1 else [config.mesh]:
            for policy, rows in computed:
                compute = dataclasses.replace(config.compute, remat=policy,
                                              microbatch=0 if rows == config.train.batch_size else rows)
                changed = dataclasses.replace(config, compute=compute, mesh=axes,
                                              train=dataclasses.replace(config.train, noise_samples=noise_samples))
                if changed != config:
                    yield changed


def _halves(number: int, unit: int) -> list[int]:
    """number, number / 2, ... as long as they are multiples of `unit`."""
    found = [number]
    while found[-1] % (2 * unit) == 0:
        found.append(found[-1] // 2)
    return found


def _with_config(program: Program, config: Config) -> Program:
    mesh = sharding.make_mesh(config.mesh, list(program.mesh.devices.flat))
    return Program.of(config, program.special, mesh, program.model.dtype)


def _flags(config: Config, changed: Config) -> str:
    """The command-line flags that lead from one config to the other."""
    def values(config: Config) -> dict[str, Any]:
        return {"compute.remat": config.compute.remat, "compute.microbatch": config.compute.microbatch,
                **{f"mesh.{axis}": getattr(config.mesh, axis) for axis in sharding.AXES},
                "train.noise_samples": config.train.noise_samples}
    before = values(config)
    return " ".join(f"--config.{key}={value}" for key, value in values(changed).items() if value != before[key])
