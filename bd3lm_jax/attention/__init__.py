"""Attention backends behind one call; `spec.allowed` says who sees whom."""

from bd3lm_jax.attention.blocked import blocked_attention
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.spec import RULES, MaskSpec, Tokens, allowed
from bd3lm_jax.errors import lookup

SMALL = 64  # tokens a row up to which the whole mask costs less than tiles

BACKENDS = {"dense": dense_attention, "blocked": blocked_attention}

__all__ = ["BACKENDS", "RULES", "MaskSpec", "Tokens", "allowed", "attend", "choose"]


def choose(backend: str, spec: MaskSpec, tokens: int) -> str:
    """The backend that runs: what was asked for, except that decoding (few queries) is always dense."""
    if spec.cache is not None or not spec.aligned:
        return "dense"
    if backend == "auto":
        return "dense" if tokens <= SMALL else "blocked"
    lookup(BACKENDS, backend, "attention backend compute.attention")
    return backend


def attend(backend: str, spec: MaskSpec, noised, clean, cache):
    """Attention of one layer; arguments and results as `reference.dense_attention`."""
    tokens = noised[0].shape[2] if noised is not None else clean[1].shape[1]
    return BACKENDS[choose(backend, spec, tokens)](spec, noised, clean, cache)
