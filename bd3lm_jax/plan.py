"""What a training run will need, before any hardware is there: the real step is compiled from shapes alone.

Memory and communication come from a compiler: with `target` the TPU compiler itself (package libtpu) on a described
slice, else XLA's for CPU on simulated devices, as an estimate: it groups the sums of gradients otherwise and scatters
none (12-layer model on 2 x 4 devices: memory within 6 % of the TPU compiler's, communication within a factor of 2).
FLOPs are counted (flops.py), speeds are what published figures of accelerators (hardware.py) give at a utilisation.
"""

import dataclasses
import importlib.util
import math
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3lm_jax import flops, hlo, log, loss, memory, rundir, sharding
from bd3lm_jax.config import Config
from bd3lm_jax.data.tokenizers import NUM_BYTES, Tokenizer, get_tokenizer
from bd3lm_jax.errors import UserError, lookup
from bd3lm_jax.hardware import ACCELERATORS, Accelerator
from bd3lm_jax.program import Program, bytes_needed, bytes_per_device
from bd3lm_jax.step import SpecialIds

GIB, MIB = 2**30, 2**20
SLICES = {  # slices of TPUs that can be described, by number of devices
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
SLICES |= {"v6e": SLICES["v5e"], "v5p": SLICES["v4"]}
DESCRIBED = {  # what libtpu would ask a TPU machine for
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Compiled(NamedTuple):
    """What a compiler says of the step: bytes a device needs, what it sends (None: the compiler ran out of memory)."""

    total: int
    communication: dict[str, hlo.Traffic] | None
    seconds: float


def plan(config: Config, *, target: str, utilisation: float) -> dict[str, Any]:
    """The plan of `train` on the mesh of `config`, where a size of -1 counts as 1; tables on stderr.

    target: "" for all accelerators, memory and communication estimated; or a TPU, by the TPU compiler.
    utilisation: the part of the peak that the needed FLOPs will reach.

    Raises UserError for a config that `train` would refuse, or a target that cannot be compiled for here. It sets jax
    up for CPU: call it before jax has used a device.
    """
    sizes = {axis: max(getattr(config.mesh, axis), 1) for axis in sharding.AXES}
    config, special = resolved(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes)))
    number = math.prod(sizes.values())
    devices = _described(target, number) if target else _simulated(number)
    program = _program(config, special, devices, bool(target))
    log.note(f"{program.num_params:,} parameters on {_mesh_text(sizes)}; compiling the step "
             f"{'for ' + target if target else '(for CPU, as an estimate)'}")
    compiled = _compile(program)
    kinds = _bytes_by_kind(program, compiled)
    needed = flops.train_step(config.model, config.diffusion, batch=config.train.batch,
                              length=config.data.length, views=config.train.views)
    sent = None if compiled.communication is None else sum(t.bytes for t in compiled.communication.values())
    chosen = [ACCELERATORS[target]] if target else list(ACCELERATORS.values())
    expected = [_expected(program, accelerator, compiled.total, needed, sent, utilisation) for accelerator in chosen]
    result = {
        "params": program.num_params, "devices": len(devices), "mesh": sizes, "bytes_per_device": kinds,
        "flops_per_step": needed, "compile_s": compiled.seconds, "expected": expected, "compiler": target or "cpu",
        "communication": compiled.communication and {kind: t._asdict() for kind, t in compiled.communication.items()},
    }
    _show(config, result, utilisation)
    return result


def resolved(config: Config) -> tuple[Config, SpecialIds]:
    """The config with its vocabulary size, and the special ids, without reading the corpus."""
    spec = config.data.tokenizer
    size = spec.removeprefix("bpe:")
    if size != spec and size.isdecimal() and int(size) > NUM_BYTES:
        tokenizer = Tokenizer(spec, int(size), 0, int(size))  # what training it will give
    else:
        tokenizer = get_tokenizer(spec, tuple)
    return rundir.resolve(config, tokenizer), SpecialIds(tokenizer.mask_id, tokenizer.end_id)


def _simulated(number: int) -> list[jax.Device]:
    """CPU devices that stand for accelerators."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    return jax.devices()


def _described(target: str, number: int) -> list[Any]:
    """Devices of the TPU slice of that number, which are not there."""
    from jax.experimental import topologies

    shapes = {math.prod(map(int, shape.split("x"))): shape for shape in lookup(SLICES, target, "TPU --for")}
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--for={target} needs the TPU compiler: pip install 'bd3lm_jax[tpu_compile]', or leave it out "
                        "for estimates")
    if number != 1 and number not in shapes:
        raise UserError(f"the mesh has {number} devices, a slice of {target} has 1, {', '.join(map(str, shapes))}")
    jax.config.update("jax_platforms", "cpu")
    for name, value in DESCRIBED.items():
        os.environ.setdefault(name, value)
    options = {"chip_config_name": "megacore"} if target == "v4" else {}
    shape = shapes[max(number, min(shapes))]
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:{shape}", **options).devices[:number]


def _program(config: Config, special: SpecialIds, devices: list, on_tpu: bool) -> Program:
    """The program as accelerators run it."""
    mesh = sharding.make_mesh(config.mesh, devices)
    dtype = jnp.dtype("bfloat16" if config.compute.dtype == "auto" else config.compute.dtype)
    if dtype == jnp.bfloat16 and not on_tpu:
        dtype = jnp.dtype("float16")  # of the same size; the CPU compiler would widen bfloat16
    chunk = config.compute.loss_chunk or max(loss.ACCELERATOR_LOGITS // (4 * config.model.vocab_size), 1)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, loss_chunk=chunk))
    return Program.of(config, special, mesh, dtype)


def _compile(program: Program) -> Compiled:
    began = time.perf_counter()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        total = memory.needed_by(error, bytes_per_device(program.arguments()))
        if total is None:
            raise
        return Compiled(total, None, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return Compiled(bytes_needed(compiled), hlo.communication(compiled.as_text()), seconds)


def _bytes_by_kind(program: Program, compiled: Compiled) -> dict[str, int]:
    """Bytes a device; gradients are part of the compiler's temporaries and shown apart."""
    state, batch = program.arguments()
    kinds = {"params": bytes_per_device(state.params), "optimiser": bytes_per_device(state.opt_state),
             "ema": bytes_per_device(state.ema), "gradients": bytes_per_device(state.params),
             "batch": bytes_per_device(batch)}
    return {**kinds, "temporaries": max(compiled.total - sum(kinds.values()), 0), "total": compiled.total}


def _expected(program: Program, accelerator: Accelerator, total: int, needed: float, sent: float | None,
              utilisation: float) -> dict[str, Any]:
    """Whether the step fits, and data tokens a second over all devices: compute or links, whichever takes longer."""
    config = program.config
    compute_s = needed / (program.mesh.size * accelerator.peak_flops * utilisation)
    links_s = (sent or 0) / accelerator.links_bandwidth
    return {"device": accelerator.name, "fits": total <= accelerator.usable_memory,
            "tokens_per_s": config.train.batch * config.data.length / max(compute_s, links_s),
            "step_ms": 1e3 * max(compute_s, links_s), "bound_by": "compute" if compute_s >= links_s else "links"}


def _mesh_text(sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / MIB:.2f} MiB"


def _show(config: Config, result: dict, utilisation: float) -> None:
    estimate = "TPU compiler" if result["compiler"] != "cpu" else "estimate"
    rows = [("parameters", f"{result['params']:,}"), ("devices", f"{result['devices']} ({_mesh_text(result['mesh'])})"),
            ("FLOPs a step (needed)", f"{result['flops_per_step']:.3e}"),
            ("compile", f"{result['compile_s']:.0f} s")]
    rows += [(f"memory a device: {kind}", _size(size)) for kind, size in result["bytes_per_device"].items()]
    for kind, traffic in (result["communication"] or {}).items():
        rows.append((f"sent a device and step: {kind}", f"{_size(traffic['bytes'])} in {traffic['calls']} calls"))
    log.table(f"Plan: {config.train.batch} rows of {config.data.length} tokens a step; memory and communication: "
              f"{estimate}", ("", ""), rows)
    log.table(f"Expected at {utilisation:.0%} of the bfloat16 peak",
              ("device", "memory", "fits", "tokens/s", "ms a step", "bound by"),
              [(row["device"], _size(ACCELERATORS[row["device"]].usable_memory),
                "yes" if row["fits"] else "NO", f"{row['tokens_per_s']:,.0f}", f"{row['step_ms']:,.3g}",
                row["bound_by"]) for row in result["expected"]])
    if not any(row["fits"] for row in result["expected"]):
        log.note("to fit: --config.compute.remat=dots, attention or full; --config.compute.microbatch=ROWS; "
                 "--mesh=fsdp=N")
