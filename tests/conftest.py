"""Compiled programs are kept between test runs: most of the time of a first run is compilation."""

import os
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/bd3lm_jax/test-programs").expanduser()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
