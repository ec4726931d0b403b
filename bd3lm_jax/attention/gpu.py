"""GPU: exact block diffusion attention on cuDNN's flash attention, which knows causal calls and key lengths only.

Rows hold one document each. Noised copies shifted by one block and the clean stream are query groups of one call over
the clean keys (`parts.CleanPrefix`). Small blocks: a plain *causal* call, plus for each block what it misses, the
strict upper triangle of the aligned clean block, plus the noised block itself. Large blocks: one unmasked call per
block with its exact keys, and one for all noised blocks. All parts are merged and differentiated as one (`merged.py`).

On other devices XLA stands in for cuDNN, which is how the decomposition is tested, and the program lowered for CUDA is
tested to hold the intended cuDNN calls. Those calls themselves have been run and timed by nobody yet: the constants
below are counted, `self_check` guards every process, and tests marked slow compare with the oracle on a GPU.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp

from bd3lm_jax.attention import check, cudnn, tiles
from bd3lm_jax.attention.blocked import check_training, own_flash
from bd3lm_jax.attention.merged import merged_attention
from bd3lm_jax.attention.parts import CleanPrefix, OwnBlock, blockwise
from bd3lm_jax.attention.shards import per_device
from bd3lm_jax.attention.spec import MaskSpec, Tokens, allowed
from bd3lm_jax.attention.tiles import BackwardInputs, Flash

LARGE_BLOCK = 256  # from here on the triangle that a causal call misses costs more than a call per block
MAX_CALLS = 64  # calls per block in one program, forward and backward each
OWN_TILE = 16  # the smallest matrix product of a tensor core
MAX_HEAD = 128
XLA_TILE = 128


def gpu_attention(spec: MaskSpec, noised, clean, cache):
    """Same contract as `reference.dense_attention`, without a cache; ask `unsupported_reason` first.

    Raises ValueError with a cache, streams that are not aligned or a mask that `unsupported_reason` refuses.
    """
    check_training(spec, noised, clean, cache)
    reason = _unsupported_mask_reason(spec)
    if reason:
        raise ValueError(reason)
    return per_device(functools.partial(merged_attention, _parts), spec, noised, clean)


def unsupported_reason(spec: MaskSpec, head_size: int, dtype) -> str | None:
    """Why this call cannot run on cuDNN, in words; None when it can. The device itself is tried by `self_check`."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN computes in bfloat16 or float16, not in {jnp.dtype(dtype)}"
    if head_size % 8 or head_size > MAX_HEAD:
        return f"cuDNN takes head sizes 8, 16, ... {MAX_HEAD}, not {head_size}"
    return _unsupported_mask_reason(spec) or cudnn.missing_primitive_reason()


def _unsupported_mask_reason(spec: MaskSpec) -> str | None:
    if spec.window is not None:
        return f"a layer sees {spec.window} tokens to either side, and cuDNN's calls here have no window"
    if spec.min_block_size is not None:
        return "rows have blocks of several sizes, and cuDNN's calls are the same for all rows"
    if not spec.one_document:
        return "rows may hold several documents, and cuDNN's causal call knows no segments"
    if spec.noised is None or spec.clean is None:
        return None
    if spec.rule == "bidirectional":
        return "a bidirectional clean stream beside a noised one is no causal call"
    needed, clean = spec.noised.segment.shape[1] - spec.block_size, spec.clean.segment.shape[1]
    return f"{needed} clean tokens are needed beside the noised ones, there are {clean}" if clean < needed else None


@functools.cache
def self_check(head_size: int, dtype, group_size: int) -> str | None:
    """Small calls of both kinds on this process's GPU against the dense oracle: what is wrong, in words, or None.

    share: query heads a key head. May be called while a program is traced: it runs in a thread of its own.
    """
    if jax.default_backend() != "gpu":
        return "this process has no GPU to try it on"
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            sizes = (LARGE_BLOCK // 4, LARGE_BLOCK)
            differences = list(thread.map(lambda size: _difference(size, head_size, dtype, group_size), sizes))
    except Exception as error:  # whatever cuDNN or the driver says, there is another backend
        return f"its check on this device failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if all(difference <= check.tolerance(dtype) for difference in differences):  # NaN is not
        return None
    formatted = " and ".join(f"{difference:.1e}" for difference in differences)
    return f"its check on this device is {formatted} off, and at most {check.tolerance(dtype)} is rounding"


def _difference(block_size: int, head_size: int, dtype, group_size: int) -> float:
    length = 3 * LARGE_BLOCK
    rows = [[length], [length - block_size - 3]]
    example = check.example(rows, length, block_size, 2 * group_size, 2, head_size, dtype)
    return check.largest_difference(gpu_attention, *example)


def _parts(spec: MaskSpec, noised, clean):
    size, parts = spec.block_size, []
    mask_fn = functools.partial(allowed, spec.rule)
    full = _flash(causal=False)
    if noised is not None:
        own = blockwise(full, size) if size >= LARGE_BLOCK else own_flash(mask_fn, size, OWN_TILE, None)
        parts.append(OwnBlock(spec, noised, own))
    if clean is None:
        return parts
    if spec.rule == "bidirectional":
        return [*parts, CleanPrefix(spec, noised, clean, full)]
    if spec.rule == "block_causal" and size >= LARGE_BLOCK and clean[1].shape[1] <= MAX_CALLS * size:
        return [*parts, CleanPrefix(spec, noised, clean, _block_causal(full, size))]
    parts.append(CleanPrefix(spec, noised, clean, _flash(causal=True)))
    if size > 1 and (noised is not None or spec.rule == "block_causal"):
        parts.append(CleanPrefix(spec, noised, clean,
                                 own_flash(functools.partial(_mask_outside_causal, spec), size, OWN_TILE, None)))
    return parts


def _mask_outside_causal(spec: MaskSpec, q: Tokens, kv: Tokens):
    """Who sees whom, less what the causal call over shifted rows has shown already (position = row index)."""
    return allowed(spec.rule, q, kv) & (kv.position > q.position - spec.block_size * (q.noise_sample > 0))


def _flash(causal: bool) -> Flash:
    """cuDNN, or XLA in its place, with query groups as more heads on each key head; padding gives exactly nothing."""
    def keys_of(tokens: Tokens):
        return jnp.maximum(jnp.sum(tokens.segment > 0, axis=-1), 1).astype(jnp.int32)

    def forward(q_BxGxNxHxD, k_BxPxKxD, v_BxPxKxD, q_tokens: Tokens, kv_tokens: Tokens):
        kv_heads, groups = k_BxPxKxD.shape[2], q_BxGxNxHxD.shape[1]
        out, lse = _by_device(cudnn.forward, _xla_forward, causal, _as_heads(q_BxGxNxHxD, kv_heads), k_BxPxKxD,
                              v_BxPxKxD, keys_of(kv_tokens))
        return tiles.zero_padding(q_tokens, *(_from_heads(x, groups, kv_heads) for x in (out, lse)))

    def backward(q_BxGxNxHxD, k_BxPxKxD, v_BxPxKxD, q_tokens: Tokens, kv_tokens: Tokens, grad: BackwardInputs):
        dtype, kv_heads, groups = q_BxGxNxHxD.dtype, k_BxPxKxD.shape[2], q_BxGxNxHxD.shape[1]
        out, d_out = (tiles.zero_padding(q_tokens, x.astype(dtype), grad.lse)[0] for x in (grad.out, grad.d_out))
        residuals = (_as_heads(x, kv_heads) for x in (tiles.lse_for_backward(grad.lse), out, d_out))
        dq, dk, dv = _by_device(cudnn.backward, _xla_backward, causal, _as_heads(q_BxGxNxHxD, kv_heads), k_BxPxKxD,
                                v_BxPxKxD, keys_of(kv_tokens), *residuals)
        return tuple(x.astype(jnp.float32) for x in (_from_heads(dq, groups, kv_heads), dk, dv))

    return Flash(forward, backward)


def _block_causal(full: Flash, size: int) -> Flash:
    """Block b of the queries against keys 0 .. (b + 1) size: one unmasked call a block."""
    def calls(q_BxGxN, k_BxP, v_BxP, q_tokens, kv_tokens):
        for start in range(0, q_BxGxN.shape[2], size):
            rows, keys = slice(start, start + size), slice(start + size)
            q_part, kv_part = (jax.tree.map(lambda x, part=part: x[..., part], tokens)
                               for tokens, part in ((q_tokens, rows), (kv_tokens, keys)))
            yield rows, (q_BxGxN[:, :, rows], k_BxP[:, keys], v_BxP[:, keys], q_part, kv_part)

    def forward(*arguments):
        results = zip(*(full.forward(*call) for _, call in calls(*arguments)))
        return tuple(jnp.concatenate(parts, axis=2) for parts in results)

    def backward(q_BxGxN, k_BxP, v_BxP, q_tokens, kv_tokens, grad: BackwardInputs):
        dqs, dk, dv = [], jnp.zeros(k_BxP.shape), jnp.zeros(v_BxP.shape)
        for rows, call in calls(q_BxGxN, k_BxP, v_BxP, q_tokens, kv_tokens):
            dq, dk_part, dv_part = full.backward(*call, BackwardInputs(*(x[:, :, rows] for x in grad)))
            dqs.append(dq)
            dk, dv = (total.at[:, :x.shape[1]].add(x) for total, x in ((dk, dk_part), (dv, dv_part)))
        return jnp.concatenate(dqs, axis=2), dk, dv

    return Flash(forward, backward)


def _by_device(on_cuda, default_fn, causal, *arguments):
    """Chosen when the program is lowered, so that it can be lowered for a GPU without having one."""
    return jax.lax.platform_dependent(*arguments, cuda=functools.partial(on_cuda, causal),
                                      default=functools.partial(default_fn, causal))


def _as_heads(x_BxGxNxH, kv_heads: int):
    """`[B, G, N, H, ...]` -> `[B, N, Hkv G R, ...]`."""
    batch, groups, length, heads, *rest = x_BxGxNxH.shape
    x = x_BxGxNxH.reshape(batch, groups, length, kv_heads, -1, *rest)
    return jnp.moveaxis(x, 1, 3).reshape(batch, length, groups * heads, *rest)


def _from_heads(x_BxNxH, groups: int, kv_heads: int):
    """Inverse of `_as_heads`."""
    batch, length, heads, *rest = x_BxNxH.shape
    x = x_BxNxH.reshape(batch, length, kv_heads, groups, -1, *rest)
    return jnp.moveaxis(x, 3, 1).reshape(batch, groups, length, heads // groups, *rest)


def _xla_forward(causal: bool, q_BxTxHxD, k_BxPxGxD, v_BxPxGxD, keys_B):
    """`cudnn.forward` in XLA."""
    flash, q_tokens, kv_tokens = _xla(causal, q_BxTxHxD, k_BxPxGxD, keys_B)
    out, lse = flash.forward(q_BxTxHxD[:, None], k_BxPxGxD, v_BxPxGxD, q_tokens, kv_tokens)
    return out[:, 0].astype(q_BxTxHxD.dtype), lse[:, 0]


def _xla_backward(causal: bool, q_BxTxHxD, k_BxPxGxD, v_BxPxGxD, keys_B, lse_BxTxH, out_BxTxHxD, d_out_BxTxHxD):
    """`cudnn.backward` in XLA."""
    flash, q_tokens, kv_tokens = _xla(causal, q_BxTxHxD, k_BxPxGxD, keys_B)
    d_out = d_out_BxTxHxD.astype(jnp.float32)
    grad = BackwardInputs(out_BxTxHxD, lse_BxTxH, d_out, jnp.sum(d_out * out_BxTxHxD, axis=-1))
    dq, dk, dv = flash.backward(q_BxTxHxD[:, None], k_BxPxGxD, v_BxPxGxD, q_tokens, kv_tokens,
                                jax.tree.map(lambda x: x[:, None], grad))
    return tuple(x.astype(q_BxTxHxD.dtype) for x in (dq[:, 0], dk, dv))


def _xla(causal: bool, q_BxTxHxD, k_BxPxGxD, keys_B):
    """The tile scan that sees as cuDNN does, and the tokens that make it do so."""
    batch, queries = q_BxTxHxD.shape[:2]
    def rows(length, segment):
        position = jnp.broadcast_to(jnp.arange(length), (batch, length))
        return Tokens(position, position, jnp.broadcast_to(segment, position.shape).astype(jnp.int32), 0 * position)
    q_tokens = rows(queries, 1).expand(1)
    keys = k_BxPxGxD.shape[1]
    if causal:
        tiles_of = functools.partial(tiles.prefix_tiles, "causal", 1, True, XLA_TILE)
        return tiles.flash(functools.partial(allowed, "causal"), tiles_of), q_tokens, rows(keys, 1)
    tiles_of = functools.partial(tiles.all_tiles, XLA_TILE)
    kv_tokens = rows(keys, jnp.arange(keys) < keys_B[:, None])
    return tiles.flash(functools.partial(allowed, "bidirectional"), tiles_of), q_tokens, kv_tokens
