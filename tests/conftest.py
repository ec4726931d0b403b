"""A first run is mostly compilation: compile with little optimisation, and keep the programs between runs."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/bd3lm_jax/test-programs").expanduser()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """The programs of all files together need more memory maps than Linux gives a process (vm.max_map_count)."""
    yield
    import jax

    jax.clear_caches()
