"""Block diffusion language models in JAX: `lm = bd3lm_jax.load(path)`, then `lm.nll`, `lm.generate`, `lm.logits`."""

__version__ = "0.1.0"
__all__ = ["LM", "load"]


def __getattr__(name: str):
    """`load` and `LM` are imported when asked for, so that parts of the library need only jax, flax and numpy."""
    if name in __all__:
        from bd3lm_jax import lm

        return getattr(lm, name)
    raise AttributeError(f"module 'bd3lm_jax' has no attribute '{name}'")
