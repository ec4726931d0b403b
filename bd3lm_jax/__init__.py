"""Block diffusion language models in JAX: `lm = bd3lm_jax.load(path)`, then `lm.nll`, `lm.generate`, `lm.logits`.

`bd3lm_jax.train.train(config, workdir)` trains one.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bd3lm_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from bd3lm_jax import train as train
    from bd3lm_jax.lm import LM as LM
    from bd3lm_jax.lm import load as load

__all__ = ["LM", "load", "train"]


def __getattr__(name: str) -> Any:
    """`load`, `LM` and the modules are imported at their first use, so that parts of the library need only jax, flax
    and numpy."""
    if name in ("LM", "load"):
        return getattr(importlib.import_module("bd3lm_jax.lm"), name)
    try:
        return importlib.import_module(f"bd3lm_jax.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"bd3lm_jax.{name}":
            raise
    raise AttributeError(f"module 'bd3lm_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    """What `help(bd3lm_jax)` and the completion of an editor show."""
    return sorted({*globals(), *__all__})
