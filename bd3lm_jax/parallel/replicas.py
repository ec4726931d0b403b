"""Replicas of one state on many devices and processes: whether they can stay the same, and whether they have.

A process that rounds differently (an older processor, other XLA flags, other code) trains other weights than its peers.
Nobody notices while they run, and what a checkpoint takes from each of them does not fit together.
"""

import hashlib
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jax

from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.parallel import distributed
from bd3lm_jax.parallel.fingerprint import fingerprints_by_device

USE_ALIKE = "results would differ: use the same versions, flags and kind of machine for all processes"
MAX_ARRAYS_NAMED = 3  # arrays named in an error
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "numpy")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
SETTINGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable",
            "jax_numpy_dtype_promotion", "jax_disable_most_optimizations", "jax_use_shardy_partitioner")
HARMLESS_FLAGS = r"--xla_(\w*dump\w*|hlo_profile|force_host_platform_device_count)(=\S*)?"  # change no result
SIMD = r"(sse|ssse|avx|fma|amx|asimd|sve|neon|bf16|f16c)\w*"  # flags of a processor that decide how a CPU rounds


def check(trees: Mapping[str, Any], consequence: str) -> dict[str, int]:
    """Fingerprints by "tree/path", the same on all devices of all processes; all of them must call it.

    Raises RunError on all processes, naming arrays, processes and devices, if the replicas of an array differ.
    consequence: of that, in words.
    """
    sums = {f"{name}/{path}": values for name, tree in trees.items()
            for path, values in fingerprints_by_device(tree).items()}
    own_sums = {path: values[0] for path, values in sums.items()}
    uniform = all(set(values) == {own_sums[path]} for path, values in sums.items())
    digest = hashlib.sha256(json.dumps(own_sums).encode()).hexdigest()
    if set(distributed.allgather_texts(f"{digest} {uniform}")) == {f"{digest} True"}:
        return own_sums
    sums_by_process = [json.loads(text) for text in distributed.allgather_texts(json.dumps(sums))]
    differing = {
        path: [
            f"device {k} of process {i}" if len(set(values[path])) > 1 else f"process {i}"
            for i, values in enumerate(sums_by_process) for k, value in enumerate(values[path]) if value != reference
        ]
        for path, (reference, *_) in sums_by_process[0].items()
    }
    differing = {path: list(dict.fromkeys(holders)) for path, holders in differing.items() if holders}
    names = "; ".join(f"{path}: {', '.join(holders[:MAX_ARRAYS_NAMED])}"
                      for path, holders in list(differing.items())[:MAX_ARRAYS_NAMED])
    more = f"; and {len(differing) - MAX_ARRAYS_NAMED} more arrays" if len(differing) > MAX_ARRAYS_NAMED else ""
    raise RunError(f"replicas differ from those of device 0 of process 0 ({names}{more}): {consequence}. Machines "
                   "round differently, or one is broken: run the same command again on machines, libraries and XLA "
                   "flags that are alike; it goes on from the last checkpoint", on_all_processes=True)


def check_start() -> None:
    """UserError on all processes unless they all have equally many devices of one kind, and compute with the same code,
    versions, flags and, on CPUs, processors: what differs is named."""
    if jax.process_count() > 1:
        _check_devices(jax.devices())  # first: processes with unequal numbers of devices cannot exchange texts
        distributed.assert_equal_across_processes(numeric_environment(), "environment", USE_ALIKE)


def _check_devices(devices: Sequence[Any]) -> None:
    counts = Counter(device.process_index for device in devices)
    kinds = {device.process_index: device.device_kind for device in devices}
    for i, count in sorted(counts.items()):
        if (count, kinds[i]) != (counts[0], kinds[0]):
            raise UserError(f"process {i} has {count} x {kinds[i]}, process 0 has {counts[0]} x {kinds[0]}: start all "
                            "processes on equally many devices of one kind", on_all_processes=True)


def check_program(lower: Callable[[], jax.stages.Lowered]) -> None:
    """UserError on all processes unless they all lower the same program."""
    if jax.process_count() > 1:
        text = re.sub(r'backend_config = "[^"]*"', "", lower().as_text())  # of a kernel: names files of its host
        distributed.assert_equal_across_processes({"hash": hashlib.sha256(text.encode()).hexdigest()[:12]},
                                                  "training step", USE_ALIKE)


def numeric_environment() -> dict[str, Any]:
    """What decides how this process rounds, as JSON values by name."""
    environment = {package: _version(package) for package in PACKAGES}
    environment["code of bd3lm_jax"] = _hash_of_code(Path(str(resources.files("bd3lm_jax"))))
    environment |= {name: " ".join(sorted(re.sub(HARMLESS_FLAGS, "", os.environ.get(name, "")).split()))
                    for name in VARIABLES}
    environment |= {name: str(getattr(jax.config, name, None)) for name in SETTINGS}
    if jax.default_backend() == "cpu":
        environment["processor"] = _processor()
    return environment


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hash_of_code(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _processor() -> str:
    """Architecture and vector instructions."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    flags = re.search(r"^(flags|Features)\s*:(.*)$", text, re.M)
    simd = sorted(flag for flag in (flags[2].split() if flags else ()) if re.fullmatch(SIMD, flag))
    return " ".join([platform.machine(), *simd])
