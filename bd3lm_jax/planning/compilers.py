"""What compilers say of a training step for devices that are not there: memory and communication.

The TPU compiler (package libtpu) compiles for a described slice, in a process of its own: libtpu takes its settings
from the environment, talks a lot, and may end the process that loads it. XLA for CPU compiles for simulated devices;
for an accelerator that is an estimate.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import RunError, UserError, lookup
from bd3lm_jax.parallel import sharding
from bd3lm_jax.planning import hlo
from bd3lm_jax.scoring import loss
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training import memory
from bd3lm_jax.training.program import Program, bytes_needed, bytes_per_device

SLICES = {  # slices of TPUs that can be described, by number of devices
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
SLICES |= {"v5p": SLICES["v4"], "v6e": SLICES["v5e"]}
LIBTPU_ENVIRONMENT = {  # what libtpu would ask a TPU machine for
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
}
# The same HLO, hence the same figures, in half the time: only machine code suffers, which never runs.
FAST_COMPILE_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
INSTALL = "pip install -e '.[tpu_compile]'"


class CompiledCost(NamedTuple):
    """What a compiler says of the step: bytes a device needs, what it sends (None: the compiler ran out of memory)."""

    total: int
    communication: dict[str, hlo.Traffic] | None
    seconds: float


def simulated_program(config: Config, special: SpecialIds) -> Program:
    """The program of a config as accelerators run it, on as many simulated devices as its mesh has.

    `simulate` them first. Raises UserError if the mesh does not divide heads or rows.
    """
    return _program(config, special, jax.devices(), on_tpu=False)


def simulate(number: int) -> None:
    """So many devices, simulated on the CPU, from now on; before jax has used a device."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)


def compile_for_cpu(program: Program) -> CompiledCost:
    """What XLA for CPU says of a simulated program."""
    return _compile(program, FAST_COMPILE_OPTIONS)


def tpu_for(number: int) -> str | None:
    """The first TPU that has a slice of so many devices (1: a part of one); None if there is none."""
    return next((target for target in SLICES if number == 1 or number in _slices(target)), None)


def has_tpu_compiler() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def check_tpu(target: str, number: int) -> None:
    """UserError if there is no TPU compiler, or no slice of `number` devices of that TPU."""
    shapes = _slices(target)
    if not has_tpu_compiler():
        raise UserError(f"--accelerator={target} needs the TPU compiler: {INSTALL}, or leave it out for estimates")
    if number != 1 and number not in shapes:
        raise UserError(f"the mesh has {number} devices, a slice of {target} has 1, {', '.join(map(str, shapes))}")


def compile_for_tpu(config: Config, special: SpecialIds, target: str) -> Future:
    """What the TPU compiler says: a Compiled, later. Its `result` raises RunError, with the reason, if libtpu fails."""
    question = json.dumps({"config": config.to_dict(), "special": dataclasses.astuple(special), "target": target})
    thread = ThreadPoolExecutor(1)
    future = thread.submit(_ask, [sys.executable, "-c", f"from {__name__} import answer; answer()"], question)
    thread.shutdown(wait=False)
    return future


def answer() -> None:
    """The other side of `compile_for_tpu`: question on stdin, answer as the last line of stdout."""
    question = json.load(sys.stdin)
    config, special = Config.from_dict(question["config"], stored=True), SpecialIds(*question["special"])
    print(json.dumps(_compile(tpu_program(config, special, question["target"]), None)))


def tpu_program(config: Config, special: SpecialIds, target: str) -> Program:
    """The program of a config on slices of a TPU that are only described, in a process with libtpu and DESCRIBED."""
    number, slices = math.prod(dataclasses.astuple(config.mesh)), config.mesh.slices
    return _program(config, special, tpu_devices(target, number // slices, slices), on_tpu=True)


def _ask(command: Sequence[str], question: str) -> CompiledCost:
    library = str(Path(__file__).parents[1])
    path = os.pathsep.join([library, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(command, input=question, text=True, capture_output=True,
                             env=os.environ | LIBTPU_ENVIRONMENT | {"PYTHONPATH": path})
    try:
        total, communication, seconds = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        stderr_lines = [line.strip()
                        for line in process.stderr.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
        raise RunError(f"the TPU compiler failed: {stderr_lines[-1][:200]}") from None
    traffic = communication and {kind: hlo.Traffic(*numbers) for kind, numbers in communication.items()}
    return CompiledCost(total, traffic, seconds)


def _slices(target: str) -> dict[int, str]:
    """Names of slices by number of devices."""
    return {math.prod(map(int, shape.split("x"))): shape for shape in lookup(SLICES, target, "TPU --accelerator")}


def tpu_devices(target: str, number: int, slices: int) -> list[Any]:
    """Devices of so many TPU slices of `number` each, which are not there."""
    from jax.experimental import topologies

    shapes = _slices(target)
    options = {"chip_config_name": "megacore"} if target == "v4" else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    topology = f"{target}:{shapes[max(number, min(shapes))]}"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    return devices if slices > 1 else devices[:number]


def _program(config: Config, special: SpecialIds, devices: list, on_tpu: bool) -> Program:
    """The program as accelerators run it."""
    mesh = sharding.make_mesh(config.mesh, devices)
    dtype = jnp.dtype("bfloat16" if config.compute.dtype == "auto" else config.compute.dtype)
    if dtype == jnp.bfloat16 and not on_tpu:
        dtype = jnp.dtype("float16")  # of the same size; the CPU compiler would widen bfloat16
    chunk = config.compute.loss_chunk or max(loss.ACCELERATOR_LOGITS // (4 * config.model.vocab_size), 1)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, loss_chunk=chunk))
    return Program.of(config, special, mesh, dtype)


def _compile(program: Program, options: dict | None) -> CompiledCost:
    start_s = time.perf_counter()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.step().lower(*program.arguments()).compile(options)
    except jax.errors.JaxRuntimeError as error:
        total = memory.bytes_from_error(error, bytes_per_device(program.arguments()))
        if total is None:
            raise
        return CompiledCost(total, None, time.perf_counter() - start_s)
    seconds = time.perf_counter() - start_s
    slices = program.config.mesh.slices
    slice_size = program.mesh.size // slices if slices > 1 else None
    return CompiledCost(bytes_needed(compiled), hlo.communication(compiled.as_text() or "", slice_size), seconds)
