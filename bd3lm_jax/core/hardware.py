"""Published figures of accelerators, for expectations before a run and for model FLOPs utilisation during one.

Sources (November 2026): docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, per chip: peak compute (bf16), HBM capacity,
half of the "bidirectional inter-chip interconnect bandwidth"; for v4, whose page has none, six links of
50 GB/s (arXiv 2304.01433). NVIDIA's data sheets of the H100 and H200 SXM: half of the bfloat16 figure, which is "with
sparsity"; memory in the data sheet's GB (drivers report some 6 % more); half of NVLink's 900 GB/s. What a program may
use of the memory is what libtpu leaves it, and what jax reserves of a GPU by default.
"""

import dataclasses
from typing import Any

GB, GIB = 10**9, 2**30
TPU_USABLE, GPU_USABLE = 0.98, 0.75  # parts of the memory; XLA_PYTHON_CLIENT_MEM_FRACTION changes the latter


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device: bfloat16 FLOP/s, bytes, and bytes/s over links to other devices of its group."""

    name: str
    kinds: tuple[str, ...]  # how its `device_kind` in jax begins
    peak_flops: float
    memory: int
    usable_memory: int
    links_bandwidth: float


def _device(name: str, kinds: str, tflops: float, memory: int, usable: float, links_gbps: float):
    return Accelerator(name, tuple(kinds.split("|")), tflops * 1e12, memory, int(usable * memory), links_gbps * GB)


ACCELERATORS = {device.name: device for device in (
    _device("v4", "TPU v4", 275, 32 * GIB, TPU_USABLE, 300),
    _device("v5e", "TPU v5 lite|TPU v5e", 197, 16 * GIB, TPU_USABLE, 200),
    _device("v5p", "TPU v5", 459, 95 * GIB, TPU_USABLE, 600),
    _device("v6e", "TPU v6", 918, 32 * GIB, TPU_USABLE, 400),
    _device("H100", "NVIDIA H100 80GB HBM3", 989, 80 * GB, GPU_USABLE, 450),
    _device("H200", "NVIDIA H200", 989, 141 * GB, GPU_USABLE, 450),
)}


def find(device_kind: str) -> Accelerator | None:
    """The accelerator that jax calls `device_kind`; None if its figures are not known here."""
    found = [(len(kind), device.name) for device in ACCELERATORS.values() for kind in device.kinds
             if device_kind.startswith(kind)]
    return ACCELERATORS[max(found)[1]] if found else None


def utilisation(flops: float, seconds: float, devices: list[Any]) -> float | None:
    """Model FLOPs utilisation: `flops` in `seconds` on these jax devices, as a part of their bfloat16 peak.

    None where the peak is not known (CPU).
    """
    accelerator = find(devices[0].device_kind)
    return None if accelerator is None else flops / seconds / (len(devices) * accelerator.peak_flops)
