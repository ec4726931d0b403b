"""The static tile lists against enumeration of the mask; a tile scan over several lists."""

import functools

import jax
import numpy as np
import pytest
from oracle import make_tokens

from bd3lm_jax.attention.spec import allowed
from bd3lm_jax.attention.tiles import all_tiles, prefix_tiles

LENGTH = 48


def seen(rule, tokens_q, tokens_kv):
    return np.asarray(jax.jit(functools.partial(allowed, rule))(tokens_q.expand(2), tokens_kv.expand(1)))


@pytest.mark.parametrize("rule", ["causal", "block_causal", "bidirectional"])
@pytest.mark.parametrize("block_size", [1, 4, 20, 24])
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("keys", [LENGTH, 37])
def test_lists_cover_what_is_seen_and_leave_out_masks_only_where_all_is_seen(rule, block_size, size, keys):
    """For clean queries and for noised ones one block on, over every number of padded tokens."""
    tiles = prefix_tiles(rule, block_size, True, size, LENGTH, keys)
    unmasked, masked = (set(map(tuple, pairs.tolist())) for pairs in (tiles.unmasked, tiles.masked))
    assert not unmasked & masked
    real = range(1, LENGTH + block_size + 1)
    rows = make_tokens([[n] for n in real], LENGTH + block_size, block_size, 0)
    clean = jax.tree.map(lambda x: x[:, :LENGTH], rows.replace(noise_sample=None)).replace(noise_sample=0)
    later = jax.tree.map(lambda x: x[:, block_size:], rows.replace(noise_sample=None)).replace(noise_sample=1)
    kv = jax.tree.map(lambda x: x[:, :keys], clean.replace(noise_sample=None)).replace(noise_sample=0)
    for q in (clean,) if rule == "bidirectional" else (clean, later) if rule == "block_causal" else (clean,):
        visible, is_real = seen(rule, q, kv), q.segment > 0
        for i in range(-(-LENGTH // size)):
            for j in range(-(-keys // size)):
                part = visible[:, i * size:(i + 1) * size, j * size:(j + 1) * size]
                if (i, j) in unmasked:
                    assert part.shape[2] == size and part[is_real[:, i * size:(i + 1) * size]].all()
                else:
                    assert (i, j) in masked or not part.any()


def test_only_the_diagonal_of_one_document_needs_masks():
    tiles = prefix_tiles("block_causal", 4, True, 8, LENGTH, LENGTH)
    assert tiles.masked.tolist() == [[i, i] for i in range(6)] and len(tiles.unmasked) == 15
    assert not len(prefix_tiles("block_causal", 4, False, 8, LENGTH, LENGTH).unmasked)


def test_all_tiles():
    assert all_tiles(8, 9, 20).masked.tolist() == [[i, j] for i in range(2) for j in range(3)]
