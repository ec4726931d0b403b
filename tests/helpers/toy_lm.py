"""A small random language model over 12 letters, for tests of the facade."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import bd3lm_jax
from bd3lm_jax.config import LMConfig
from bd3lm_jax.diffusion import Masked
from bd3lm_jax.models import build, trunk
from bd3lm_jax.models.dit import DiTConfig

VOCAB, MASK, END, CONTEXT = 13, 12, 3, 24


def masked(block_size):
    return Masked.uniform_counts(block_size)


class Letters:
    """A tokenizer of 12 letters, the fourth of which is the end token."""

    mask_id, end_id = MASK, END

    def encode(self, text):
        return np.array([ord(letter) - ord("a") for letter in text], np.int32)

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


LETTERS = Letters()


@functools.cache
def make_lm(objective=masked(4), time_conditioning=False, tokenizer=None):
    """Random parameters everywhere: a fresh network ignores its input."""
    config = DiTConfig(vocab_size=VOCAB, num_layers=2, hidden_size=32, num_heads=2, mlp_ratio=2, dropout=0.0,
                       cond_dim=8,
                       adaln=not objective.causal, time_conditioning=time_conditioning, rope_theta=1e4)
    model = build(config, jnp.float32)
    shapes = jax.eval_shape(functools.partial(trunk.init, model), jax.random.key(0))
    random = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + 0.2 * random.normal(size=x.shape), jnp.float32), shapes)
    return bd3lm_jax.LM(LMConfig(config, objective), params, tokenizer, model, CONTEXT)


def make_ids(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, MASK, size=shape).astype(np.int32)
