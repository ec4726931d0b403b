"""A first run is mostly compilation: compile with little optimisation, and keep the programs between runs.

Most of what is left of compiling for CPUs would be the MLIR passes over each fusion, which the older emitter does
without: a training step of the tests takes 1.5 instead of 5.6 seconds of one core.
"""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # a process ends at a flag that its XLA does not know
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/bd3lm_jax/test-programs").expanduser()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small ones come again in every file


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """The programs of all files together need more memory maps than Linux gives a process (vm.max_map_count)."""
    yield
    import jax

    jax.clear_caches()
