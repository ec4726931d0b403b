"""Weak scaling: the training step on 1, 2, 4 and 8 devices with as many rows a device, its work and what it sends.

The devices are simulated and share the cores of this machine, so nothing is run and nothing timed: the step is
compiled, its FLOPs are those of the compiler's account (layers are not scanned, because that account takes the body of
a loop once), and what a device sends is read from the program.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bd3lm_jax.config import Config, MeshConfig
from bd3lm_jax.core import log
from bd3lm_jax.experiments.bench.runner import Limit, row_of
from bd3lm_jax.experiments.bench.step import Case, config_of
from bd3lm_jax.parallel import sharding
from bd3lm_jax.planning import flops, hlo
from bd3lm_jax.planning.compilers import FAST_COMPILE_OPTIONS
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training.program import Program

SIMULATED = 8
COUNTS = (1, 2, 4, 8)
KINDS = ("data", "fsdp")  # the axis that all devices lie on
CASE = Case(layers=2, width=128, heads=2, batch=2, length=128, block_size=16, vocab=1152)  # batch: a device
BYTES = 4  # of a weight and of its gradient
NOTE = ("FLOPs are those of one device, to the step on a single one. Formulas: gradients are summed in a ring, "
        "2 (n - 1) / n of their bytes; with fsdp weights are gathered twice as well, (n - 1) / n of their bytes each.")
AGAINST = ()
LIMITS = tuple(Limit(kind, f"{count} devices", "1 device", "flops_ratio", 1.02) for kind in KINDS
               for count in COUNTS[1:])


def run(rounds: int, against: str) -> list[dict]:
    """A row a mesh, with these fields beside those of every benchmark: devices, mflops_compiled (the compiler's
    account), mflops_counted (all matrix products) and mflops_needed (`flops.train_step`) of one device, params, sent
    (calls and bytes of each kind of collective that a device takes part in), formula (bytes)."""
    del rounds, against
    rows = []
    for kind in KINDS:
        found = [measured(CASE, kind, count) for count in COUNTS]
        rows += [row_of(kind, _name(row["devices"]), _name(1), **row,
                        flops_ratio=row["mflops_compiled"] / found[0]["mflops_compiled"]) for row in found]
    log.table("Of one device, a step", ("", "devices", "MFLOPs compiled", "counted", "needed", "sent", "formula"), [
        (row["case"], row["devices"], *(f"{row[f'mflops_{what}']:,.0f}" for what in ("compiled", "counted", "needed")),
         _sent(row["sent"]), f"{row['formula'] / 2**20:.2f} MiB") for row in rows])
    return rows


def measured(case: Case, kind: str, count: int) -> dict[str, Any]:
    """The step of `case` rows a device on so many devices along the axis `kind`."""
    sizes = MeshConfig(**{axis: count if axis == kind else 1 for axis in ("data", "fsdp", "tensor")})
    config = _config(dataclasses.replace(case, batch=case.batch * count), sizes)
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    program = Program.of(config, SpecialIds(mask=case.vocab - 1, end=0), mesh, jnp.float32)
    with jax.set_mesh(mesh):
        counted = flops.count(program.step(), *program.arguments())
        compiled = program.step().lower(*program.arguments()).compile(FAST_COMPILE_OPTIONS)
    needed = flops.train_step(config.model, config.diffusion, batch=config.train.batch_size, length=case.length,
                              noise_samples=1)
    sent = hlo.communication(compiled.as_text() or "")
    return {"devices": count, "mflops_compiled": (compiled.cost_analysis() or {})["flops"] / 1e6,
            "mflops_counted": counted / count / 1e6, "mflops_needed": needed / count / 1e6,
            "params": program.num_params, "sent": {name: traffic._asdict() for name, traffic in sent.items()},
            "formula": formula(program, kind)}


def formula(program: Program, kind: str) -> float:
    """Bytes that a device sends at least, on a ring of n: the sum of all gradients, 2 (n - 1) / n of their bytes; with
    fsdp also the weights that are split, (n - 1) / n of their bytes, once for the forward and once for the backward
    pass."""
    count = program.mesh.size
    split = sum(x.size for x, where in zip(jax.tree.leaves(program.abstract.params),
                                           jax.tree.leaves(program.shardings.params)) if "fsdp" in where.spec)
    gathered = 2 * split if kind == "fsdp" else 0
    return (count - 1) / count * BYTES * (2 * program.num_params + gathered)


def _config(case: Case, sizes: MeshConfig) -> Config:
    """The step of that case; dense attention, because the count of the compiler knows no loops."""
    config = config_of(case, "two_stream", remat="none")
    compute = dataclasses.replace(config.compute, attention="dense", layers="unroll", dtype="float32")
    return dataclasses.replace(config, mesh=sizes, compute=compute)


def _name(count: int) -> str:
    return f"{count} devices" if count > 1 else "1 device"


def _sent(sent: dict) -> str:
    return ", ".join(f"{kind} {traffic['bytes'] / 2**20:.2f} MiB in {traffic['calls']}" for kind, traffic in
                     sent.items()) or "nothing"
