"""Toy runs for the tests of training and evaluation: a small text, a small network, subprocesses with more devices."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from places import HELPERS, ROOT

from bd3lm_jax import models
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.config import Config, decisive_hash
from bd3lm_jax.core.log import RunLog, read_metrics
from bd3lm_jax.models import trunk
from configs import tiny

LENGTH, MASK, END = 32, 257, 256  # of the byte tokenizer
AR = {"kind": "ar", "bos": True}
WORDS = "the a cat dog sat ran on under mat tree and then café because slowly".split()


def write_text(path: Path, documents: int, seed: int = 0) -> list[str]:
    """A text of random words, one document a line; returns the documents."""
    draw = np.random.default_rng(seed)
    lines = [" ".join(draw.choice(WORDS, size=draw.integers(2, 16))) for _ in range(documents)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return lines


def toy_dict(directory: Path, changes: dict) -> dict:
    """A config as a nested dict; `changes` has keys like "train.steps", or "diffusion" for the whole section."""
    config = tiny.get_config().to_dict()
    base = {
        "model.num_layers": 1, "model.hidden_size": 32, "model.num_heads": 2, "model.cond_dim": 16,
        "data.source": "text",
        "data.path": str(directory / "text.txt"), "data.tokenizer": "bytes", "data.seq_len": LENGTH,
        "data.valid_fraction": 0.1, "data.cache_dir": str(directory / "cache"), "data.workers": 1,
        "optim.schedule": "constant", "optim.warmup_steps": 0, "optim.lr": 1e-2, "train.steps": 6,
        "train.batch_size": 8,
        "log.every": 1, "checkpoint.every": 100, "eval.every": 100, "eval.batch_size": 16, "eval.rows": 8,
        "eval.num_samples": 0,
        "eval.sample_length": LENGTH,
    }
    for key, value in {**base, **changes}.items():
        section, _, name = key.partition(".")
        if name:
            assert name in config[section] or section == "diffusion", key
            config[section][name] = value
        else:
            config[section] = value
    return config


def rewrite_config(workdir: Path, changes: dict) -> None:
    """Make config.json of a run that of another one, hash and all: `changes` by section, a whole one if it has a kind.
    """
    path = workdir / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items()
              if key not in ("config_sha256", "files_sha256", "crc32")}
    config |= {key: x if "kind" in x else config[key] | x for key, x in changes.items()}
    path.write_text(json.dumps(config | {"config_sha256": decisive_hash(config)}))


def toy_config(directory: Path, changes: dict | None = None) -> Config:
    return Config.from_dict(toy_dict(directory, changes or {}))


def network(config: Config, scale: float = 0.25):
    """The backbone of a config and weights that are random everywhere, also where training starts from zero."""
    model = models.build(dataclasses.replace(config.model, vocab_size=MASK + 1), jnp.float32)
    shapes = jax.eval_shape(lambda: trunk.init(model, jax.random.key(0)))
    draw = np.random.default_rng(0)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + scale * draw.normal(size=x.shape), jnp.float32), shapes)


def quick_jit(function):
    """jit for functions that run a few times: most of their time would be compilation."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def run_python(code: str, *arguments: object, devices: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `code` in a new process with so many simulated devices; the arguments are sys.argv[1:]."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=timeout, env=environment(devices))


def losses(workdir: Path) -> dict[int, float]:
    """Logged losses by step."""
    return {line["step"]: line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line}


def steps_saved(workdir: Path) -> list[int]:
    return Checkpoints(workdir, 1, read_only=True).steps()


def slow_down(seconds: float) -> None:
    """Every step of this process that is logged takes so much longer from now on: time to stop a run within them."""
    metrics = RunLog.metrics

    def slowly(*arguments):
        time.sleep(seconds)
        return metrics(*arguments)

    RunLog.metrics = slowly


def free_port() -> int:
    """Of this machine, chosen by it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}",
                         "XLA_FLAGS": flags}
