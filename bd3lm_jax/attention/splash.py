"""TPU: exact attention on jax's Pallas splash attention, one kernel call over both streams, forward and backward.

Queries and keys are the noised copies and then the clean stream, each padded to whole tiles. What a token may see by
its row index is static and tells the kernel which tiles to skip; the segments go in row by row. Together they are the
predicate `spec.allowed`: a document is contiguous and begins at a row index that is a multiple of the block size, so
inside it positions and block indices are row indices and row blocks less a constant, which no comparison notices.

Padding is one more segment here, so that every query sees at least itself and no softmax is empty; its output is set
to 0 afterwards, which makes its gradients exactly 0 too.
"""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as pallas

from bd3lm_jax.attention.blocked import check_training
from bd3lm_jax.attention.merged import SAVED
from bd3lm_jax.attention.shards import per_device
from bd3lm_jax.attention.spec import MaskSpec, Tokens, allowed

TILES = (128, 256, 384, 512)  # the kernel wants multiples of 128; larger ones do not fit the fast memory
MAX_HEAD, MAX_TOKENS = 256, 32768  # what the compilers for v4 to v6e were seen to take, with up to three copies


def splash_attention(spec: MaskSpec, noised, clean, cache):
    """Same contract as `reference.dense_attention`, without a cache; ask `unsupported_reason` first.

    Compiled on TPU, interpreted (slowly) on CPU: the platform that the program is lowered for decides. A remat policy
    that saves the name "attended" keeps what the kernel computed, so that it does not run forwards twice.
    Raises ValueError with a cache, streams that are not aligned or what `unsupported_reason` refuses.
    """
    check_training(spec, noised, clean, cache)
    _, keys, _ = noised or clean
    reason = unsupported_reason(spec, keys.shape[-1], keys.dtype, keys.shape[-3])
    if reason:
        raise ValueError(reason)
    return per_device(_attention, spec, noised, clean)


def unsupported_reason(spec: MaskSpec, head_size: int, dtype, tokens: int) -> str | None:
    """Why the kernel cannot run this call, in words; None when it can. tokens: length of a row."""
    if spec.window is not None:
        return f"a layer sees {spec.window} tokens to either side, and no window goes into splash attention here"
    if spec.min_block_size is not None:
        return "rows have blocks of several sizes, and splash attention has one mask for all rows"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"splash attention computes in float32 or bfloat16, not in {jnp.dtype(dtype)}"
    if head_size > MAX_HEAD:
        return f"splash attention takes head sizes up to {MAX_HEAD}, not {head_size}"
    if tokens > MAX_TOKENS:
        return f"splash attention takes rows of up to {MAX_TOKENS} tokens, not {tokens}"
    return None


def _attention(spec: MaskSpec, noised, clean):
    """One device's rows and heads."""
    layout = _Layout.of(spec, noised, clean)
    q_BxHxNxD, k_BxGxPxD, v_BxGxPxD = (layout.join(*pair) for pair in zip(noised or [None] * 3, clean or [None] * 3))
    q_BxHxNxD = (q_BxHxNxD.astype(jnp.float32) * q_BxHxNxD.shape[-1]**-0.5).astype(q_BxHxNxD.dtype)
    segment_BxP = layout.join_segments(spec)
    segment_BxN = segment_BxP[:, :q_BxHxNxD.shape[2]]

    def run(interpret, q_BxHxNxD, k_BxGxPxD, v_BxGxPxD, *segments):
        kernel = _kernel(layout, q_BxHxNxD.shape[1], interpret)
        return jax.vmap(kernel)(q_BxHxNxD, k_BxGxPxD, v_BxGxPxD, pallas.SegmentIds(*segments))

    out_BxHxNxD = jax.lax.platform_dependent(
        q_BxHxNxD, k_BxGxPxD, v_BxGxPxD, segment_BxN, segment_BxP,
        tpu=functools.partial(run, False), cpu=functools.partial(run, True))
    return layout.split(jnp.where(segment_BxN[:, None, :, None] > 0, out_BxHxNxD, 0))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the streams of a call are joined: the noised copies, then the clean stream, each in whole tiles."""

    rule: str
    block_size: int
    noise_samples: int
    noised: int  # tokens of one copy
    clean: int  # tokens of the clean stream
    clean_queries: bool
    tile: int  # rows and columns of a tile

    @classmethod
    def of(cls, spec: MaskSpec, noised, clean) -> "_Layout":
        noise_samples, length = (0, 0) if noised is None else noised[0].shape[1:3]
        clean_length = 0 if clean is None else clean[1].shape[1]
        tile = choose_tile(length, clean_length, noise_samples, spec.block_size)
        return cls(spec.rule, spec.block_size, noise_samples, length, clean_length,
                   clean is not None and clean_length > 0 and clean[0] is not None, tile)

    def _padded(self, length: int) -> int:
        return -(-length // self.tile) * self.tile

    def _pad(self, x, axis: int):
        """Zeros after the end of `axis` up to whole tiles."""
        return jnp.pad(x, [(0, self._padded(n) - n if a == axis else 0) for a, n in enumerate(x.shape)])

    def join(self, noised_BxMxTxHxD, clean_BxCxHxD):
        """`[B, H, N, Dh]` of the streams that are not None."""
        parts = []
        if noised_BxMxTxHxD is not None:
            padded = self._pad(noised_BxMxTxHxD, 2)
            parts.append(padded.reshape(padded.shape[0], -1, *padded.shape[3:]))
        if clean_BxCxHxD is not None:
            parts.append(self._pad(clean_BxCxHxD, 1))
        return jnp.concatenate(parts, axis=1).swapaxes(1, 2)

    def join_segments(self, spec: MaskSpec):
        """Segments `[B, P]` of the joined keys."""
        parts = [spec.tokens("noised")] * self.noise_samples if self.noise_samples else []
        parts += [spec.tokens("clean")] if self.clean else []
        return jnp.concatenate([self._pad(tokens.segment, 1) for tokens in parts], axis=1)

    def split(self, joined_BxHxNxD):
        """Inverse of `join`, for the streams that have queries."""
        joined_BxNxHxD = joined_BxHxNxD.swapaxes(1, 2)
        noised, clean = jnp.split(joined_BxNxHxD, [self.noise_samples * self._padded(self.noised)], axis=1)
        if self.noise_samples:
            noised = noised.reshape(noised.shape[0], self.noise_samples, -1, *noised.shape[2:])[:, :, :self.noised]
        return noised if self.noise_samples else None, clean[:, :self.clean] if self.clean_queries else None

    def tokens(self) -> Tokens:
        """The joined keys, as if the row held one document."""
        streams = [(noise_sample, self._padded(self.noised)) for noise_sample in range(1, self.noise_samples + 1)]
        streams.append((0, self._padded(self.clean)))
        row = np.concatenate([np.arange(length, dtype=np.int32) for _, length in streams])
        noise_sample = np.concatenate([np.full(length, noise_sample, np.int32) for noise_sample, length in streams])
        return Tokens(row, row // self.block_size, np.ones_like(row), noise_sample)


class _Mask(pallas.Mask):
    """Who sees whom by row index, computed tile by tile as the kernel's builder asks; different tiles are kept once."""

    def __init__(self, layout: _Layout):
        self.layout, self.tokens = layout, layout.tokens()
        keys = self.tokens.position.size
        self.queries_and_keys = keys if layout.clean_queries else int(np.sum(self.tokens.noise_sample > 0)), keys
        self.tiles, self.unique_tiles = {}, {}

    @property
    def shape(self) -> tuple[int, int]:
        return self.queries_and_keys

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in self.tiles:
            q, kv = (jax.tree.map(lambda x, part=part: x[part], self.tokens) for part in index)
            tile = np.asarray(_allowed(self.layout.rule, q.expand(1), kv.expand(0)))
            self.tiles[key] = self.unique_tiles.setdefault(tile.tobytes(), tile)
        return self.tiles[key]

    def __eq__(self, other) -> bool:
        return isinstance(other, _Mask) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash(self.layout)


_allowed = jax.jit(allowed, static_argnums=0)


def choose_tile(noised: int, clean: int, noise_samples: int, block_size: int) -> int:
    """Rows and columns of a tile, by estimated time, for `noise_samples` noised streams and a clean one of these
    lengths.

    Large tiles compute more pairs that nobody sees, on the diagonals and in padding; small ones spend the time on
    starting: about 0.35 us each, in which the kernel would compute some 256 x 256 pairs (an estimate, not measured).
    """
    def cost(tile):
        noised_tiles, clean_tiles, own_tiles = (-(-n // tile) for n in (noised, clean, block_size))
        prefix_tiles = (clean_tiles + 1) / 2
        tile_pairs = noise_samples * noised_tiles * (own_tiles + prefix_tiles) + clean_tiles * prefix_tiles
        return tile_pairs * (tile**2 + 256**2)
    return min(TILES, key=cost)


@functools.lru_cache(maxsize=16)
def _kernel(layout: _Layout, heads: int, interpret: bool):
    """The kernel as a function of one row: q `[H, N, Dh]`, k and v `[Hkv, P, Dh]`, segments `[N]` and `[P]`."""
    tiles = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"),
                          layout.tile)
    build = functools.partial(
        pallas.make_splash_mha, pallas.MultiHeadMask([_Mask(layout)] * heads), block_sizes=pallas.BlockSizes(**tiles),
        head_shards=1, q_seq_shards=1, residual_checkpoint_name=SAVED, interpret=interpret)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # apart from the trace and the mesh of the caller
        return jax.tree.map(np.asarray, thread.submit(build).result())
