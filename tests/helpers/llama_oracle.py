"""A Llama-shaped network in NumPy, float64, token by token of one row with any mask; random parameters for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.models import build, trunk


@functools.cache
def network(config, seed=0):
    """A backbone and parameters that are random everywhere, norms near 1."""
    model = build(config, jnp.float32)
    shapes = jax.eval_shape(functools.partial(trunk.init, model), jax.random.key(0))
    draw = np.random.default_rng(seed)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + 0.25 * draw.normal(size=x.shape), jnp.float32), shapes)


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(p, x):
    return (silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]


def turned(x, position, base, count):
    """RoPE of x [T, H, Dh] as complex products: number i with number i + count / 2, for the first `count`."""
    half = count // 2
    angle = position[:, None, None] * base ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:count]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag, x[..., count:]], axis=-1)


def attention(q, k, v, mask):
    """[T, H, Dh]; query head h reads key head h // (H / Hkv)."""
    share = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        scores = np.where(mask, q[:, head] @ k[:, head // share].T / np.sqrt(q.shape[-1]), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // share]
    return out


def two_stream_mask(length, block_size):
    """Noised row then the clean one without its last block: mask [N, N], positions [N]."""
    place = np.concatenate([np.arange(length), np.arange(length - block_size)])
    noised, block = np.arange(len(place)) < length, place // block_size
    own = noised[:, None] & noised & (block[:, None] == block)
    earlier = noised[:, None] & ~noised & (block < block[:, None])
    clean = ~noised[:, None] & ~noised & (block <= block[:, None])
    return own | earlier | clean, place


def logits(config, params, ids, position, mask):
    """float64 [T, V] of tokens at these positions that see each other by mask [T, T]."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    h = params["embed"]["embedding"][ids]
    for layer in range(config.num_layers):
        p = jax.tree.map(lambda x: x[layer], params["blocks"])
        x = rms(h, p["norm1"]["scale"], config.norm_eps)
        q, k, v = (np.einsum("td,dhe->the", x, p[name]["kernel"]) + p[name].get("bias", 0) for name in "qkv")
        if config.qk_norm:
            q, k = (rms(x, p[name]["scale"], config.norm_eps) for x, name in ((q, "q_norm"), (k, "k_norm")))
        q, k = (turned(x, position, config.rope_theta, config.head_dim) for x in (q, k))
        h = h + np.einsum("the,hed->td", attention(q, k, v, mask), p["out"]["kernel"])
        h = h + swiglu(p, rms(h, p["norm2"]["scale"], config.norm_eps))
    h = rms(h, params["head"]["norm"]["scale"], config.norm_eps)
    kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["linear"]["kernel"]
    return (h @ kernel)[:, :config.vocab_size]
