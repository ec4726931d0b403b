"""`bd3lm_jax.train.train(config, workdir)`: the whole of `python -m launch train`."""

from bd3lm_jax.training.train import train

__all__ = ["train"]
