"""The mask predicate against published masks and a sentence-by-sentence enumeration; the static tile lists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN

from bd3lm_jax.attention.spec import RULES, Tokens, allowed, visible_tiles

PRIMITIVES = np.load(GOLDEN / "primitives.npz")
PUBLISHED = [name for name in PRIMITIVES if name.startswith("two_stream_mask/")]


def row(documents, block_size, padding=0, noise_sample=0):
    """Tokens [T] of documents (lengths) packed one after the other, each from position 0, then padding."""
    position = np.concatenate([np.arange(n) for n in documents] + [np.zeros(padding, int)])
    segment = np.repeat(range(1, len(documents) + 2), [*documents, padding])
    segment[segment > len(documents)] = 0
    return Tokens(position, position // block_size, segment, np.full(position.shape, noise_sample))


def join(*parts):
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


@functools.partial(jax.jit, static_argnums=0)
def visible(rule, tokens):
    return allowed(rule, tokens.expand(1), tokens.expand(0))


def mask(rule, tokens):
    return np.asarray(visible(rule, tokens))


def two_stream(length, block_size):
    return mask("block_causal", join(row([length], block_size, noise_sample=1), row([length], block_size)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_stream_equals_published_mask(name):
    length, block_size = map(int, name.split("/")[1:])
    np.testing.assert_array_equal(two_stream(length, block_size), PRIMITIVES[name])


@pytest.mark.parametrize("model, block_size",
                         [("bd3lm_block4", 4), ("bd3lm_time_conditioned", 8), ("bd3lm_block32_is_mdlm", 32)])
def test_two_stream_equals_mask_inside_published_models(model, block_size):
    published = np.load(GOLDEN / model / "io.npz")["attention_mask"]
    np.testing.assert_array_equal(two_stream(32, block_size), published)


def sees(rule, block_size, q, kv):
    """The rules as written in the paper, for one query and one key given as (document, place, copy)."""
    (q_document, q_place, q_view), (kv_document, kv_place, kv_view) = q, kv
    if q_document != kv_document or kv_document == 0:
        return False
    q_block, kv_block = q_place // block_size, kv_place // block_size
    if q_view:
        return kv_block == q_block if kv_view == q_view else kv_view == 0 and kv_block < q_block
    if kv_view:
        return False
    return {"causal": kv_place <= q_place, "block_causal": kv_block <= q_block, "bidirectional": True}[rule]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("documents, block_size", [([8], 4), ([6, 4], 2), ([3, 1, 5], 1), ([4, 8], 4)])
def test_packed_views_equal_enumeration(rule, documents, block_size):
    tokens = join(*(row(documents, block_size, padding=2, noise_sample=noise_sample) for noise_sample in (1, 2, 0)))
    listed = list(zip(tokens.segment.tolist(), tokens.position.tolist(), tokens.noise_sample.tolist()))
    expected = [[sees(rule, block_size, q, kv) for kv in listed] for q in listed]
    np.testing.assert_array_equal(mask(rule, tokens), expected)


def test_scalar_view_broadcasts():
    tokens = row([4], 2)
    q = Tokens(*(jnp.asarray(x) for x in (tokens.position, tokens.block, tokens.segment)), 1).expand(1)
    kv = Tokens(*(jnp.asarray(x) for x in (tokens.position, tokens.block, tokens.segment)), 0).expand(0)
    np.testing.assert_array_equal(allowed("causal", q, kv), np.kron([[0, 0], [1, 0]], np.ones((2, 2))).astype(bool))


def tiles_of(dense, tile):
    """Every (query tile, key tile) that holds a visible pair."""
    return {(i // tile, j // tile) for i, j in np.argwhere(dense)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length, block_size, tile",
                         [(32, 4, 8), (32, 1, 8), (32, 8, 8), (32, 16, 8), (32, 32, 8), (30, 3, 8), (21, 7, 4),
                          (5, 1, 8)])
def test_tiles_are_exactly_those_seen_by_one_document(rule, length, block_size, tile):
    listed = visible_tiles(rule, block_size, length, length, tile).tolist()
    assert {tuple(pair) for pair in listed} == tiles_of(mask(rule, row([length], block_size)), tile)
    assert listed == sorted(listed)


@pytest.mark.parametrize("rule", RULES)
def test_tiles_cover_packed_rows(rule):
    packed = mask(rule, row([8, 12, 4], 4, padding=4))
    listed = {tuple(pair) for pair in visible_tiles(rule, 4, 28, 28, 6).tolist()}
    assert tiles_of(packed, 6) <= listed


def test_tiles_of_fewer_keys_than_queries():
    dense = mask("block_causal", row([16], 4))[:, :12]
    assert {tuple(p) for p in visible_tiles("block_causal", 4, 16, 12, 4).tolist()} == tiles_of(dense, 4)
