"""What is installed, which devices there are, and whether the core computes the same thing two ways on them."""

import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata

from bd3lm_jax.core import log
from bd3lm_jax.core.errors import RunError, UserError

CORE = ("jax", "jaxlib", "flax", "optax", "chex", "numpy")
EXTRA = {  # what is lost without it, and how to get it
    "orbax-checkpoint": "checkpoints (pip install orbax-checkpoint)",
    "tokenizers": "sub-word tokenizers (pip install tokenizers)",
    "safetensors": "checkpoints in Hugging Face layout (pip install safetensors)",
    "matplotlib": "plots (pip install matplotlib)",
    "tensorflow-datasets": "data.source='tfds' (pip install tensorflow-datasets)",
    "gguf": "GGUF files (pip install gguf)",
    "huggingface_hub": "models by their names on the Hugging Face Hub (pip install huggingface_hub)",
    "tensorflow": "building TFDS data sets such as lm1b, not reading them (pip install 'bd3lm_jax[data]')",
}
ATTENTION_SHAPE = {"length": 1024, "block_size": 16, "heads": 1, "kv_heads": 1, "head_size": 64}
ATTENTION_ROWS = {"one document a row": [[1000]], "packed documents": [[512, 500]]}


def diagnose() -> dict:
    """Report on stderr; the same as a dict whose `ok` is False if anything needed fails. Raises nothing."""
    versions = {name: _version(name) for name in (*CORE, *EXTRA)}
    checks = [_check("core packages", lambda: _core_packages(versions)), _check("devices", _devices),
              _check("cache directory", _cache_directory), _check("attention", _attention),
              _check("sampler", _sampler), _check("sandbox of generated code", _sandbox)]
    log.table("Versions", ["package", "version"],
              [["python", platform.python_version()], *((name, version or "-") for name, version in versions.items())])
    log.table("Checks", ["check", "ok", "detail"],
              [[check["check"], "yes" if check["ok"] else "NO", check["detail"]] for check in checks])
    missing = {name: use for name, use in EXTRA.items() if versions[name] is None}
    for name, use in missing.items():
        log.note(f"not installed: {name}, needed for {use}")
    return {"ok": all(check["ok"] for check in checks), "python": platform.python_version(), "platform": sys.platform,
            "versions": versions, "missing": missing, "checks": checks}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check(name: str, run: Callable[[], str]) -> dict:
    try:
        return {"check": name, "ok": True, "detail": run()}
    except Exception as error:
        return {"check": name, "ok": False, "detail": " ".join(f"{type(error).__name__}: {error}".split())}


def _core_packages(versions: dict) -> str:
    missing = [name for name in CORE if versions[name] is None]
    if missing:
        raise RunError(f"{', '.join(missing)} not installed: pip install {' '.join(missing)}")
    return "all installed"


def _devices() -> str:
    import jax

    from bd3lm_jax.config import MeshConfig
    from bd3lm_jax.parallel.sharding import make_mesh

    try:
        devices = jax.devices()
    except (AssertionError, RuntimeError) as error:
        raise RunError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} names no device that is there ({error}): "
                       "unset it, or install jax for that device") from None
    mesh = make_mesh(MeshConfig(slices=-1))
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return (f"{len(devices)} {jax.default_backend()} ({devices[0].device_kind}), {jax.process_count()} process(es), "
            f"{os.cpu_count()} CPU cores, mesh {sizes}")


def _cache_directory() -> str:
    from bd3lm_jax.data.prepare import cache_directory

    path = cache_directory("")
    with tempfile.TemporaryFile(dir=path):
        return f"{path} can be written"


def _attention() -> str:
    """What training on this device would run, for both layouts of a row, each checked against the dense mask."""
    from bd3lm_jax import attention
    from bd3lm_jax.attention import check
    from bd3lm_jax.models import forward

    dtype, reports = forward.compute_dtype("auto"), []
    for layout, rows in ATTENTION_ROWS.items():
        spec, noised, clean = check.example(rows, **ATTENTION_SHAPE, dtype=dtype)
        name, reason = attention.choose("auto", spec, noised, clean, attention.target_platform())
        difference = check.largest_difference(attention.BACKENDS[name], spec, noised, clean)
        if not difference <= check.tolerance(dtype):
            raise RunError(f"{layout}: '{name}' has a relative difference of {difference:.1e} to the dense mask, "
                           f"expected at most {check.tolerance(dtype)}: set compute.attention='dense'")
        reports.append(f"{layout}: {name} ({reason}; relative difference {difference:.1e})")
    return f"auto in {dtype}, " + ", ".join(reports)


def _sandbox() -> str:
    """How `eval --task=humaneval` would confine programs: no failure where it cannot, for only that needs it."""
    from bd3lm_jax.evaluation.tasks import sandbox
    from bd3lm_jax.evaluation.tasks.evaluate import LIMITS

    try:
        return sandbox.choose(LIMITS)
    except UserError as error:
        return f"none: {error}"


def _sampler() -> str:
    """Sample from a table that puts all probability on token 10 + place in the row."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bd3lm_jax.core import jax_settings
    from bd3lm_jax.generation import sampling

    length, size, vocab = 8, 4, 32

    def denoise(canvas, block, finished, positions_BxP, level, cache):
        return 1e4 * jax.nn.one_hot(10 + block * size + positions_BxP, vocab), cache

    settings = sampling.Settings(block_size=size, window=size, steps=size, filters=sampling.Filters(),
                                 mask_id=vocab - 1, end_id=0)
    none = jnp.zeros((2, length), bool)
    request = sampling.Request(jax.random.split(jax_settings.key(0), 2), none, jnp.full(2, length), jnp.zeros(2, int),
                               jnp.zeros(vocab, bool), 0.0)
    context = sampling.DenoiserContext(denoise, sampling.SAMPLERS["first_hitting"], settings)
    state = sampling.start(context, request, jnp.zeros((2, length), jnp.int32), 0, None)
    samples = sampling.run_blocks(context, request, state, length // size)
    if not (np.asarray(samples.tokens) == 10 + np.arange(length)).all():
        raise RunError(f"drew {np.asarray(samples.tokens).tolist()} where every token is certain")
    return f"{int(samples.nfe[0])} network calls for {length} tokens"
