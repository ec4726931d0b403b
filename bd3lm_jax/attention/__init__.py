"""Attention backends behind one call; `spec.allowed` says who sees whom."""

import functools
import logging
from typing import NamedTuple

import jax

from bd3lm_jax.attention import gpu
from bd3lm_jax.attention.blocked import blocked_attention
from bd3lm_jax.attention.gpu import gpu_attention
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.spec import RULES, MaskSpec, Tokens, allowed
from bd3lm_jax.core.errors import UserError, lookup

SMALL = 64  # tokens a row up to which the whole mask costs less than tiles
FASTEST = {"tpu": "splash", "gpu": "gpu"}  # by platform, where it can


def _splash_attention(spec: MaskSpec, noised, clean, cache):
    from bd3lm_jax.attention.splash import splash_attention

    return splash_attention(spec, noised, clean, cache)


BACKENDS = {"dense": dense_attention, "blocked": blocked_attention, "splash": _splash_attention, "gpu": gpu_attention}

__all__ = ["BACKENDS", "RULES", "Choice", "MaskSpec", "Tokens", "allowed", "attend", "choose", "target_platform"]


class Choice(NamedTuple):
    """A key of BACKENDS, and why, in words."""

    name: str
    reason: str


def attend(backend: str, spec: MaskSpec, noised, clean, cache):
    """Attention of one layer; `backend` as in `choose`, the rest and the results as `reference.dense_attention`."""
    name = choose(backend, spec, noised, clean, target_platform()).name
    return BACKENDS[name](spec, noised, clean, cache)


def target_platform() -> str:
    """"cpu", "gpu" or "tpu": what the mesh in use is made of (it may only be compiled for), else this process's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()


def choose(backend: str, spec: MaskSpec, noised, clean, platform: str) -> Choice:
    """The backend that runs for `backend` = "auto" or a key of BACKENDS; decoding is dense whatever was asked for.

    noised, clean: (q, k, v) as `attend` takes them; only shapes and dtypes are read. "auto" takes the fastest exact one
    and falls back with one line in the log. Raises UserError for one asked for by name that is unknown or cannot run.
    """
    if backend != "auto":
        lookup(BACKENDS, backend, "attention backend compute.attention")
    if spec.cache is not None or not spec.aligned:
        return Choice("dense", "decoding has few queries")
    if backend == "auto":
        return _fastest(spec, noised, clean, platform)
    unsupported = _unsupported_reason(backend, spec, noised, clean, platform)
    if unsupported:
        raise UserError(f"compute.attention='{backend}' cannot run here: {unsupported}; use 'auto' or 'blocked'")
    if backend == "splash" and platform != "tpu":
        _warn_once("compute.attention='splash' is interpreted off a TPU, which is for tests: 'blocked' is far faster")
    return Choice(backend, "asked for")


def _fastest(spec, noised, clean, platform) -> Choice:
    tokens = _length(noised, clean)
    if tokens <= SMALL:
        return Choice("dense", f"{tokens} tokens a row, at most {SMALL}")
    best = FASTEST.get(platform)
    if best is None:
        return Choice("blocked", f"fastest on {platform}")
    unsupported = _unsupported_reason(best, spec, noised, clean, platform)
    if unsupported is None:
        return Choice(best, f"fastest on {platform}")
    _warn_once(f"attention runs on 'blocked', not on '{best}': {unsupported}")
    return Choice("blocked", f"'{best}' cannot run: {unsupported}")


def _unsupported_reason(name: str, spec, noised, clean, platform) -> str | None:
    """Why a backend cannot compute this call on this platform, in words; None when it can."""
    k = (noised or clean)[1]
    kv_heads, head_size = k.shape[-2:]
    if name in FASTEST.values() and (spec.noised or spec.clean).max_visible_position is not None:
        return "tokens have a last visible position of their own"
    if name == "splash":
        if platform == "gpu":
            return "it needs a TPU, and this is a GPU"
        from bd3lm_jax.attention import splash

        return splash.unsupported_reason(spec, head_size, k.dtype, _length(noised, clean))
    if name == "gpu":
        if platform != "gpu":
            return f"it needs an NVIDIA GPU, and this is a {platform.upper()}"
        q = noised[0] if noised is not None else clean[0]
        return gpu.unsupported_reason(spec, head_size,
                                      k.dtype) or gpu.self_check(head_size, k.dtype, q.shape[-2] // kv_heads)
    return None


def _length(noised, clean) -> int:
    """Tokens a row."""
    return noised[0].shape[2] if noised is not None else clean[1].shape[1]


@functools.cache
def _warn_once(text: str) -> None:
    if jax.process_index() == 0:
        logging.getLogger("bd3lm_jax").warning(text)
