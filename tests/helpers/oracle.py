"""Layouts of rows, random streams, and the comparison of a backend with the dense oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.attention.spec import MaskSpec, Tokens


def make_tokens(rows, length, block_size, noise_sample):
    """rows: for each row the lengths of its documents; the rest is padding."""
    position, segment = np.zeros((2, len(rows), length), np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for index, size in enumerate(documents):
            position[row, start:start + size] = np.arange(size)
            segment[row, start:start + size] = index + 1
            start += size
    return Tokens(position, position // block_size, segment, noise_sample)


def one_stream_spec(rule, rows, length, block_size):
    return MaskSpec(rule, block_size, True, max(map(len, rows)) == 1, None, make_tokens(rows, length, block_size, 0),
                    None)


def two_stream_spec(rows, length, block_size, rule="block_causal"):
    """The training layout: the clean stream lacks its last block; with one block there is none."""
    noised = make_tokens(rows, length, block_size, 1)
    kept = length - block_size
    clean = Tokens(noised.position[:, :kept], noised.block[:, :kept], noised.segment[:, :kept], 0) if kept else None
    return MaskSpec(rule, block_size, True, max(map(len, rows)) == 1, noised, clean, None)


def make_stream(seed, shape, heads, kv_heads, size=4):
    draw = np.random.default_rng(seed)
    return tuple(draw.normal(size=(*shape, n, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads))


def streams_for(spec, heads, kv_heads, noise_samples, clean_output):
    """Random (q, k, v) of both streams of a mask; None for an absent stream and for an unwanted clean query."""
    noised = clean = None
    if spec.noised is not None:
        batch, length = spec.noised.segment.shape
        noised = make_stream(0, (batch, noise_samples, length), heads, kv_heads)
    if spec.clean is not None:
        clean = make_stream(1, spec.clean.segment.shape, heads, kv_heads)
        clean = clean if clean_output else (None, *clean[1:])
    return noised, clean


def run(attend, spec, streams):
    """Outputs, and gradients of a projection of them, in a program of their own."""
    @jax.jit
    def values(streams):
        def projected(streams):
            outputs = attend(spec, *streams, None)
            return sum(jnp.sum(jnp.sin(3 * x.astype(jnp.float32))) for x in jax.tree.leaves(outputs)), outputs
        gradients, outputs = jax.grad(projected, has_aux=True)(streams)
        return outputs, gradients
    return values(streams)


def assert_equal_to_dense(attend, spec, noised, clean, atol=2e-5):
    found, expected = run(attend, spec, (noised, clean)), by_hand(spec, noised, clean)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=atol), found, expected)
    return found


def by_hand(spec, noised, clean):
    """What `run` should find, in NumPy and float64 with the derivative written out: nothing of it is compiled."""
    parts = []  # (tokens, the stream's number of each, q, k, v) with one axis of tokens
    if noised is not None:
        batch, samples, length = noised[0].shape[:3]
        tokens = [np.tile(x, (1, samples)) for x in (spec.noised.position, spec.noised.block, spec.noised.segment)]
        streams = np.broadcast_to(np.repeat(np.arange(1, samples + 1), length), (batch, samples * length))
        parts.append((*tokens, streams, *(x.reshape(batch, samples * length, *x.shape[3:]) for x in noised)))
    if clean is not None:
        tokens = [np.asarray(x) for x in (spec.clean.position, spec.clean.block, spec.clean.segment)]
        parts.append((*tokens, np.zeros_like(tokens[0]), *clean))
    asking = [part for part in parts if part[4] is not None]
    position, block, segment, stream = (np.concatenate(x, axis=1)[:, None] for x in list(zip(*parts))[:4])
    q_position, q_block, q_segment, q_stream = (np.concatenate(x, axis=1)[..., None] for x in list(zip(*asking))[:4])
    rule = {"causal": position <= q_position, "block_causal": block <= q_block, "bidirectional": True}[spec.rule]
    mask = np.where(q_stream > 0, np.where(stream > 0, (stream == q_stream) & (block == q_block), block < q_block),
                    (stream == 0) & rule) & (segment == q_segment) & (segment > 0)
    if spec.window is not None:
        mask &= abs(position - q_position) <= spec.window

    q, = (np.concatenate(x, axis=1, dtype=np.float64) for x in list(zip(*asking))[4:5])
    k, v = (np.concatenate(x, axis=1, dtype=np.float64) for x in list(zip(*parts))[5:])
    share, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k, v = (np.repeat(x, share, axis=2) for x in (k, v))
    scores = np.where(mask[:, None], np.einsum("bqhd,bkhd->bhqk", q, k) * scale, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    d_out = 3 * np.cos(3 * out)
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_out, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    d_q = np.einsum("bhqk,bkhd->bqhd", d_scores, k)
    d_k, d_v = (x.reshape(*x.shape[:2], -1, share, x.shape[3]).sum(3) for x in (
        np.einsum("bhqk,bqhd->bkhd", d_scores, q), np.einsum("bhqk,bqhd->bkhd", weights, d_out)))

    outputs, gradients = [None, None], [None, None]
    for index, arrays in enumerate((noised, clean)):
        if arrays is None:
            continue
        *_, q_part, k_part, _ = parts.pop(0)
        cut = k_part.shape[1]
        gradients[index] = [None, *(x[:, :cut].reshape(arrays[1].shape) for x in (d_k, d_v))]
        d_k, d_v = d_k[:, cut:], d_v[:, cut:]
        if q_part is not None:
            outputs[index], gradients[index][0] = (x[:, :cut].reshape(arrays[0].shape) for x in (out, d_q))
            out, d_q = out[:, cut:], d_q[:, cut:]
        gradients[index] = tuple(gradients[index])
    return tuple(outputs), tuple(gradients)


def assert_padding_is_nothing(spec, found):
    """Outputs and gradients of padding are exactly 0; other outputs are not."""
    outputs, gradients = found
    for output, gradient, tokens in zip(outputs, gradients, (spec.noised, spec.clean)):
        for x in filter(lambda x: x is not None, (output, *(gradient or ()))):
            padding, real = _split(x, tokens)
            assert np.all(padding == 0) and np.any(real != 0)
        if output is not None:
            assert np.all(np.any(_split(output, tokens)[1] != 0, axis=-1))


def _split(x, tokens):
    """`[B, L, H, Dh]` or `[B, M, L, H, Dh]` -> all numbers of padding, those of real tokens `[..., Dh]`."""
    x = np.asarray(x).reshape(len(x), -1, *x.shape[-3:])
    real = np.broadcast_to((tokens.segment > 0)[:, None], x.shape[:3])
    return x[~real], x[real]
