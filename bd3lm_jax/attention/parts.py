"""The parts of training attention: which queries meet which keys in one flash call (`merged.py` puts them together)."""

import jax
import jax.numpy as jnp

from bd3lm_jax.attention.spec import MaskSpec, Tokens
from bd3lm_jax.attention.tiles import NEG_INF, BackwardInputs, Flash, pad_to

NO_GRADS = (None, None, None)


class CleanPrefix:
    """All queries against the clean keys.

    Noised block b + 1 sees exactly the clean keys that clean block b sees: the noised copies, shifted by one block, and
    the clean stream are groups of queries of one call. In it noised tokens have copy 1, clean ones 0. With blocks of
    several sizes the shift is the smallest: a noised token sees no clean key that the tiles of the token so far before
    it leave out, as every size divides `spec.block_size`.
    """

    def __init__(self, spec: MaskSpec, noised, clean, flash: Flash):
        self.flash = flash
        clean_q, self.k, self.v = clean
        self.noise_samples, self.noised_length = (0, 0) if noised is None else noised[0].shape[1:3]
        self.shift = (spec.min_block_size or spec.block_size) if self.noise_samples else 0
        self.clean_length = 0 if clean_q is None else clean_q.shape[1]
        self.length = max(self.noised_length - self.shift, self.k.shape[1])
        self.q = self._group(noised and noised[0], clean_q)
        self.kv_tokens = with_noise_sample(spec.tokens("clean"), 0)
        noised_tokens = broadcast_noise_samples(with_noise_sample(spec.tokens("noised"), 1),
                                                self.noise_samples) if self.noise_samples else self.kv_tokens
        self.q_tokens = jax.tree.map(self._group, noised_tokens, self.kv_tokens)

    def forward(self):
        out, lse = self.flash.forward(self.q, self.k, self.v, self.q_tokens, self.kv_tokens)
        noised, clean = zip(self._ungroup(out, 0.0), self._ungroup(lse, NEG_INF))
        return noised if self.noise_samples else None, clean if self.clean_length else None

    def backward(self, noised: BackwardInputs | None, clean: BackwardInputs | None):
        streams = [stream for stream in (noised, clean) if stream is not None]
        grad = BackwardInputs(*map(self._group, streams[0], streams[-1]))
        dq, dk, dv = self.flash.backward(self.q, self.k, self.v, self.q_tokens, self.kv_tokens, grad)
        dq_noised, dq_clean = self._ungroup(dq, 0.0)
        return (dq_noised, None, None), (dq_clean, dk, dv)

    def _group(self, noised_BxMxT, clean_BxC):
        """One quantity of both streams -> `[B, G, N, ...]`, copies first; that of an absent stream is not read."""
        groups = [noised_BxMxT[:, :, self.shift:]] if self.noise_samples else []
        if self.clean_length:
            groups.append(clean_BxC[:, None])
        return jnp.concatenate([pad_to(x, 2, self.length) for x in groups], axis=1)

    def _ungroup(self, x_BxGxN, fill):
        """Inverse of `_group`, with `fill` for the first noised block, which sees no clean key."""
        noised = clean = None
        if self.noise_samples:
            noised = x_BxGxN[:, :self.noise_samples, :self.noised_length - self.shift]
            front = [(self.shift if axis == 2 else 0, 0) for axis in range(noised.ndim)]
            noised = jnp.pad(noised, front, constant_values=fill)
        if self.clean_length:
            clean = x_BxGxN[:, -1, :self.clean_length]
        return noised, clean


class OwnBlock:
    """Noised tokens against their own copy; a copy is a row of its own to `flash`."""

    def __init__(self, spec: MaskSpec, noised, flash: Flash):
        self.flash, self.shape = flash, noised[0].shape[:3]
        self.streams = tuple(map(self._rows, noised))
        self.tokens = jax.tree.map(self._rows,
                                   broadcast_noise_samples(with_noise_sample(spec.tokens("noised"), 1), self.shape[1]))

    def forward(self):
        q, k, v = self.streams
        results = self.flash.forward(q[:, None], k, v, self.tokens.expand(1), self.tokens)
        return tuple(self._views(x[:, 0]) for x in results), None

    def backward(self, noised: BackwardInputs, clean: BackwardInputs | None):
        q, k, v = self.streams
        grad = BackwardInputs(*(self._rows(x)[:, None] for x in noised))
        dq, dk, dv = self.flash.backward(q[:, None], k, v, self.tokens.expand(1), self.tokens, grad)
        return tuple(map(self._views, (dq[:, 0], dk, dv))), NO_GRADS

    def _rows(self, x_BxMxT):
        return x_BxMxT.reshape(-1, *x_BxMxT.shape[2:])

    def _views(self, x_RxT):
        return x_RxT.reshape(*self.shape, *x_RxT.shape[2:])


def blockwise(flash: Flash, size: int) -> Flash:
    """Queries against the keys at the same row indices, `size` at a time: a batch of problems for `flash`."""
    def fold(x_BxN, blocks):
        return pad_to(x_BxN, 1, blocks * size).reshape(-1, size, *x_BxN.shape[2:])

    def fold_groups(x_BxGxN, blocks):
        return fold(x_BxGxN.swapaxes(1, 2), blocks).swapaxes(1, 2)

    def unfold(x, batch, length):
        return x.reshape(batch, -1, *x.shape[2:])[:, :length]

    def unfold_groups(x, batch, length):
        return unfold(x.swapaxes(1, 2), batch, length).swapaxes(1, 2)

    def problems(q, k, v, q_tokens, kv_tokens):
        blocks = -(-max(q.shape[2], k.shape[1]) // size)
        q_tokens = jax.tree.map(lambda x: fold_groups(x, blocks), q_tokens)
        kv_tokens = jax.tree.map(lambda x: fold(x, blocks), kv_tokens)
        return blocks, (fold_groups(q, blocks), fold(k, blocks), fold(v, blocks), q_tokens, kv_tokens)

    def forward(q_BxGxN, *others):
        results = flash.forward(*problems(q_BxGxN, *others)[1])
        return tuple(unfold_groups(x, q_BxGxN.shape[0], q_BxGxN.shape[2]) for x in results)

    def backward(q_BxGxN, k_BxP, v_BxP, q_tokens, kv_tokens, grad: BackwardInputs):
        blocks, arguments = problems(q_BxGxN, k_BxP, v_BxP, q_tokens, kv_tokens)
        dq, dk, dv = flash.backward(*arguments, BackwardInputs(*(fold_groups(x, blocks) for x in grad)))
        batch, _, queries = q_BxGxN.shape[:3]
        return unfold_groups(dq, batch, queries), *(unfold(x, batch, k_BxP.shape[1]) for x in (dk, dv))

    return Flash(forward, backward)


def with_noise_sample(tokens: Tokens, noise_sample: int) -> Tokens:
    """The same tokens, `noise_sample` as an array like the others."""
    return tokens.replace(noise_sample=jnp.full(tokens.segment.shape, noise_sample))


def broadcast_noise_samples(tokens: Tokens, noise_samples: int) -> Tokens:
    """`[B, T]` -> `[B, M, T]`."""
    def repeat(x):
        return jnp.broadcast_to(x[:, None], (x.shape[0], noise_samples, *x.shape[1:]))
    return jax.tree.map(repeat, tokens)
