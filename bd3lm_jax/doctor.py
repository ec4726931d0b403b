"""What is installed, which devices there are, and whether the core computes the same thing two ways on them."""

import functools
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata

from bd3lm_jax import log
from bd3lm_jax.errors import RunError

CORE = ("jax", "jaxlib", "flax", "optax", "chex", "numpy")
EXTRA = {  # what is lost without it, and how to get it
    "orbax-checkpoint": "checkpoints (pip install orbax-checkpoint)",
    "tokenizers": "sub-word tokenizers (pip install tokenizers)",
    "safetensors": "checkpoints in Hugging Face layout (pip install safetensors)",
    "matplotlib": "plots (pip install matplotlib)",
    "tensorflow-datasets": "data.source='tfds' (pip install tensorflow-datasets)",
    "tensorflow": "building TFDS data sets such as lm1b, not reading them (pip install 'bd3lm_jax[data]')",
}
TOLERANCE = 1e-4  # of the largest hidden state, in float32 through two layers


def diagnose() -> dict:
    """Report on stderr; the same as a dict whose `ok` is False if anything needed fails. Raises nothing."""
    versions = {name: _version(name) for name in (*CORE, *EXTRA)}
    checks = [_check("core packages", lambda: _core_packages(versions)), _check("devices", _devices),
              _check("cache directory", _cache_directory), _check("attention, blocked = dense", _attention),
              _check("sampler", _sampler)]
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
    from bd3lm_jax.sharding import make_mesh

    devices, mesh = jax.devices(), make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return (f"{len(devices)} {jax.default_backend()} ({devices[0].device_kind}), {jax.process_count()} process(es), "
            f"{os.cpu_count()} CPU cores, mesh {sizes}")


def _cache_directory() -> str:
    from bd3lm_jax.config import DataConfig
    from bd3lm_jax.data.prepare import cache_directory

    path = cache_directory(DataConfig(source="austen", path="", name="", field="text", tokenizer="bytes", length=1,
                                      layout="wrap", valid_fraction=0.5, cache_dir="", workers=1))
    with tempfile.TemporaryFile(dir=path):
        return f"{path} can be written"


def _tiny_model(rng):
    """A 2-layer backbone with random parameters (at its start adaLN gates and head are zero and hide everything)."""
    import jax
    import jax.numpy as jnp

    from bd3lm_jax import models
    from bd3lm_jax.models import trunk

    config = models.BACKBONES["dit"].Config(
        vocab_size=64, layers=2, width=32, heads=2, mlp_ratio=2, dropout=0.0, adaln=True, cond_dim=16,
        time_conditioning=False, rope_base=10_000.0)
    model = models.build(config, jnp.float32)
    abstract = jax.eval_shape(lambda: trunk.init(model, jax.random.key(0)))
    return model, jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype), abstract)


def _attention() -> str:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bd3lm_jax import passes
    from bd3lm_jax.attention.blocked import TILE

    rng = np.random.default_rng(0)
    model, params = _tiny_model(rng)
    x0_BxL = rng.integers(63, size=(2, 2 * TILE), dtype=np.int32)
    xt_BxMxL = np.where(rng.random(x0_BxL.shape) < 0.5, 63, x0_BxL)[:, None]
    position_BxL, segment_BxL = passes.plain_rows(x0_BxL)

    @functools.partial(jax.jit, static_argnums=0)
    def hidden(backend):
        execution = passes.Execution(backend=backend, layers="scan", remat="none", one_document=True)
        return passes.two_stream(model, params, xt_BxMxL, x0_BxL, position_BxL, segment_BxL, block_size=4,
                                 execution=execution)

    with jax.default_matmul_precision("highest"):
        dense = hidden("dense")
        difference = float(jnp.abs(hidden("blocked") - dense).max() / jnp.abs(dense).max())
    if not difference <= TOLERANCE:
        raise RunError(f"relative difference {difference:.1e}, expected at most {TOLERANCE:.0e}")
    return f"relative difference {difference:.1e}"


def _sampler() -> str:
    """Sample from a table that puts all probability on token 10 + place in the row."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bd3lm_jax import sampling

    length, size, vocab = 8, 4, 32

    def denoise(canvas, start, previous, previous_real, positions_BxP, level, cache):
        return 1e4 * jax.nn.one_hot(10 + start + positions_BxP, vocab), cache

    settings = sampling.Settings(block_size=size, steps=size, temperature=1.0, top_k=None, top_p=None,
                                 mask_id=vocab - 1, end_id=0)
    blank = jnp.full((2, length), settings.mask_id)
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = sampling.generate(denoise, sampling.STEPS["first_hitting"], settings, keys, blank, jnp.zeros(2, jnp.int32),
                              0, None)
    if not (np.asarray(drawn.tokens) == 10 + np.arange(length)).all():
        raise RunError(f"drew {np.asarray(drawn.tokens).tolist()} where every token is certain")
    return f"{int(drawn.nfe[0])} network calls for {length} tokens"
