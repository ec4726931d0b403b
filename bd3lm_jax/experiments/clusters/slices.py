"""Accelerators by the names that clusters give them: `v5litepod-16`, `v6e-256`, `v5p-64`, `H100:16`.

Sizes and hosts: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "configurations". The number in a name counts chips
(v5litepod, v6e) or TensorCores, two a chip (v4, v5p); jax shows one device a chip in all of them.
"""

import dataclasses

from bd3lm_jax.core.errors import UserError, nearest
from bd3lm_jax.core.hardware import ACCELERATORS

GPUS_A_HOST = 8
POWERS = tuple(2**n for n in range(14))


@dataclasses.dataclass(frozen=True)
class Slice:
    """What one request to a cluster brings. kind: its name in `hardware.ACCELERATORS`; runtime: image of a TPU VM."""

    name: str
    kind: str
    chips: int
    hosts: int
    runtime: str

    @property
    def is_tpu(self) -> bool:
        return bool(self.runtime)


@dataclasses.dataclass(frozen=True)
class _Family:
    prefix: str
    kind: str
    cores: int  # of a chip that the name counts
    sizes: tuple[int, ...]  # in the unit of the name
    one_host: int  # chips that a single host can have; larger slices have four a host
    runtime: str

    def slices(self) -> dict[str, Slice]:
        found = {}
        for size in self.sizes:
            name, chips = f"{self.prefix}-{size}", size // self.cores
            hosts = 1 if chips <= self.one_host else chips // 4
            found[name] = Slice(name, self.kind, chips, hosts, self.runtime)
        return found


TPUS = (
    _Family("v4", "v4", 2, POWERS[3:14], 4, "tpu-ubuntu2204-base"),
    _Family("v5litepod", "v5e", 1, (1, *POWERS[2:9]), 8, "v2-alpha-tpuv5-lite"),
    _Family("v5p", "v5p", 2, POWERS[3:14], 4, "v2-alpha-tpuv5"),
    _Family("v6e", "v6e", 1, (1, *POWERS[2:9]), 8, "v2-alpha-tpuv6e"),
)
GPUS = ("H100", "H200")
KNOWN = {name: found for family in TPUS for name, found in family.slices().items()}


def find(name: str) -> Slice:
    """The slice of that name. UserError, with the nearest, for a name that no cluster knows."""
    kind, colon, count = name.partition(":")
    if colon:
        if kind not in GPUS:
            raise UserError(f"unknown GPU '{kind}' in accelerator '{name}': {nearest(kind, GPUS)}")
        if not count.isdecimal() or int(count) < 1 or int(count) > GPUS_A_HOST and int(count) % GPUS_A_HOST:
            raise UserError(f"accelerator '{name}': expected {kind}:N with N up to {GPUS_A_HOST}, or a multiple of it")
        return Slice(name, ACCELERATORS[kind].name, int(count), -(-int(count) // GPUS_A_HOST), "")
    if name not in KNOWN:
        family = next((family for family in TPUS if name.startswith(f"{family.prefix}-")), None)
        if family:
            raise UserError(f"unknown accelerator '{name}': {family.prefix} comes in "
                            f"{', '.join(map(str, family.sizes))}")
        raise UserError(f"unknown accelerator '{name}': {_nearest(name)}")
    return KNOWN[name]


def _nearest(name: str) -> str:
    """Of the whole names, which are many, only the closest; families and GPUs where none is close."""
    suggestion = nearest(name, [*KNOWN, *(f"{gpu}:{GPUS_A_HOST}" for gpu in GPUS)])
    examples = [f"{family.prefix}-{family.sizes[3]}" for family in TPUS] + [f"{gpu}:{GPUS_A_HOST}" for gpu in GPUS]
    return suggestion if suggestion.startswith("did") else f"known are for example {', '.join(examples)}"
