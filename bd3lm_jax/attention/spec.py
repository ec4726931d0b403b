"""Who sees whom: one predicate, from which dense masks, tile lists and tests are derived.

Two streams share a row: the *noised* stream (one or more copies of the row, what is predicted) and the *clean* stream
(the context). A finished prefix may sit in a *cache*, which behaves like clean tokens.

Source: BD3-LM (arXiv 2503.09573) section 3 and appendix B.6; segments for packed documents as in LLaDA2.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # on a device or not yet
RULES = ("causal", "block_causal", "bidirectional")  # how clean tokens see clean tokens


class Tokens(flax.struct.PyTreeNode):
    """What the predicate knows of tokens; int32 arrays that broadcast together, normally `[B, T]`.

    position: place in its document. block: index of its block in its document. segment: the document within the row,
    0 for padding. noise_sample: 0 for clean tokens, m >= 1 for the m-th noised copy. max_visible_position: the last
    position that it may see of what the rule allows; None: all of it.
    """

    position: Array
    block: Array
    segment: Array
    noise_sample: Array | int
    max_visible_position: Array | None = None

    def expand(self, *axes: int) -> "Tokens":
        """New axes in every array (for broadcasting queries against keys)."""
        return jax.tree.map(lambda x: jnp.expand_dims(x, axes) if jnp.ndim(x) else x, self)


class MaskSpec(flax.struct.PyTreeNode):
    """One attention call: the rule, its static tile structure and the tokens of each stream (None: absent).

    block_size: every block begins at a row index that is a multiple of it, whatever the segments; it bounds which
    tiles can be seen. aligned: noised token i and clean token i stand at the same row index (training); False when the
    clean stream is the block before the noised one (decoding). one_document: every row is known to hold one document,
    padding only after it, so that position = row index; backends without segments need it. smallest: the smallest block
    of any row where rows have blocks of several sizes, all multiples of it that divide block_size; None: all alike.
    window: as in `allowed`.
    """

    rule: str = flax.struct.field(pytree_node=False)
    block_size: int = flax.struct.field(pytree_node=False)
    aligned: bool = flax.struct.field(pytree_node=False)
    one_document: bool = flax.struct.field(pytree_node=False)
    noised: Tokens | None
    clean: Tokens | None
    cache: Tokens | None
    min_block_size: int | None = flax.struct.field(pytree_node=False, default=None)
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    def tokens(self, stream: str) -> Tokens:
        """Those of "noised", "clean" or "cache", where they are there. ValueError where they are not."""
        tokens = getattr(self, stream)
        if tokens is None:
            raise ValueError(f"this attention call has no {stream} tokens")
        return tokens


def allowed(rule: str, q: Tokens, kv: Tokens, window: int | None = None) -> jax.Array:
    """Whether query token `q` may attend to key token `kv`: bool, shape of the two broadcast together.

    Noised sees its own block of its own copy and earlier clean blocks; clean sees clean by `rule`; clean never sees
    noised; nobody sees another segment or padding. window: nor a token whose place in the document is more than so many
    tokens away, in either direction; None: however far.
    """
    q_noised, kv_noised = jnp.asarray(q.noise_sample) > 0, jnp.asarray(kv.noise_sample) > 0
    own_block = q_noised & (q.noise_sample == kv.noise_sample) & (q.block == kv.block)
    earlier = q_noised & ~kv_noised & (kv.block < q.block)
    clean = ~q_noised & ~kv_noised
    if rule == "causal":
        clean &= kv.position <= q.position
    elif rule == "block_causal":
        clean &= kv.block <= q.block
    visible = (q.segment == kv.segment) & (kv.segment > 0) & (own_block | earlier | clean)
    if q.max_visible_position is not None:
        visible &= kv.position <= q.max_visible_position
    return visible if window is None else visible & (jnp.abs(q.position - kv.position) <= window)


def visible_tiles(rule: str, block_size: int, queries: int, keys: int, tile: int) -> np.ndarray:
    """Static superset of the (query tile, key tile) pairs that clean queries of one row can see: int32 [n, 2].

    Derived from row indices alone, so it holds for any segments. Sorted by query tile.
    """
    q_tiles, k_tiles = -(-queries // tile), -(-keys // tile)
    last_query = np.minimum((np.arange(q_tiles) + 1) * tile, queries) - 1
    if rule == "causal":
        last_key = last_query
    elif rule == "block_causal":
        last_key = (last_query // block_size + 1) * block_size - 1
    else:
        last_key = np.full_like(last_query, keys - 1)
    visible = np.arange(k_tiles)[None, :] * tile <= last_key[:, None]
    return np.argwhere(visible).astype(np.int32)
