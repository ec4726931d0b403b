"""Attention that opens: causal at first, that of the objective at the end, and nothing else in between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_runs import AR, toy_config, write_text

from bd3lm_jax.attention.blocked import blocked_attention
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.spec import MaskSpec, Tokens, allowed
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.scoring import annealing
from bd3lm_jax.training.train import train

LENGTH, STEPS = 12, 10
POSITION = np.tile(np.arange(LENGTH), (3, 1))


def sample_max_visible_position(step, size=4, position=POSITION, seed=0):
    return np.asarray(annealing.sample_max_visible_position(jax.random.key(seed), step, STEPS, position, size))


def tokens(size, noise_sample, max_visible_position=None, segment=None):
    ones = np.ones_like(POSITION)
    return Tokens(POSITION, POSITION // size, ones if segment is None else segment, noise_sample * ones,
                  max_visible_position)


def dense(size, max_visible_position):
    """Who sees whom in row 0: noised tokens first, then clean ones."""
    both = [tokens(size, noise_sample, max_visible_position) for noise_sample in (1, 0)]
    joined = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1)[0], *both)
    return np.asarray(allowed("block_causal", joined.expand(1), joined.expand(0)))


@pytest.mark.parametrize("size", [1, 4, 12])
def test_causal_at_first_and_block_causal_at_the_end(size):
    """By enumeration over pairs of tokens, each stream and copy."""
    first, end, plain = dense(size, sample_max_visible_position(0, size)), dense(
        size, sample_max_visible_position(STEPS, size)), dense(size, None)
    for i in range(2 * LENGTH):
        for j in range(2 * LENGTH):
            (q, q_clean), (kv, kv_clean) = ((x % LENGTH, x >= LENGTH) for x in (i, j))
            same = q // size == kv // size
            if q_clean:
                causal = kv_clean and kv <= q
            else:
                causal = kv_clean and kv // size < q // size or not kv_clean and same and kv <= q
            assert first[i, j] == causal
    assert np.array_equal(end, plain)


@pytest.mark.parametrize("step", [3, 4, 8])
def test_opens_at_the_stated_rate(step):
    """floor(p S + u): its mean over many tokens is p S, and it never decreases with the steps."""
    position = np.tile(np.arange(500), (40, 1))
    ahead = sample_max_visible_position(step, 4, position) - position
    assert set(np.unique(ahead)) <= {int(step / STEPS * 4), int(step / STEPS * 4) + 1}
    p = step / STEPS * 4 % 1
    assert abs(ahead.mean() - step / STEPS * 4) < 4 * np.sqrt(p * (1 - p) / ahead.size)
    assert np.all(sample_max_visible_position(step + 2, 4, position) - position >= ahead)  # the same u for the same key


def test_rows_draw_for_themselves():
    wide = np.tile(np.arange(64), (5, 1))
    assert np.array_equal(sample_max_visible_position(4, 4, wide)[:2], sample_max_visible_position(4, 4, wide[:2]))
    assert not np.array_equal(sample_max_visible_position(4, 4, wide)[0], sample_max_visible_position(4, 4, wide)[1])
    assert not np.array_equal(sample_max_visible_position(4, 4, wide), sample_max_visible_position(4, 4, wide, seed=1))


@pytest.mark.ci_slow
def test_tiles_see_what_the_dense_mask_sees():
    """Both streams half-way, outputs and gradients."""
    draw, size = np.random.default_rng(0), 4
    max_visible_position = sample_max_visible_position(4, size)
    segment = np.repeat([[1, 2, 0]], 3, 0).repeat(4, 1)
    kept = slice(0, LENGTH - size)
    noised, clean = tokens(size, 1, max_visible_position,
                           segment), jax.tree.map(lambda x: x[:, kept], tokens(size, 0, max_visible_position, segment))
    spec = MaskSpec("block_causal", size, True, False, noised.replace(noise_sample=1), clean.replace(noise_sample=0),
                    None)
    streams = (tuple(draw.normal(size=(3, 2, LENGTH, 2, 4)).astype(np.float32) for _ in range(3)),
               tuple(draw.normal(size=(3, LENGTH - size, 2, 4)).astype(np.float32) for _ in range(3)))

    def values(attend):
        def total(streams):
            out = attend(spec, *streams, None)
            return sum(jnp.sum(jnp.sin(3 * x)) for x in out), out
        return jax.jit(jax.grad(total, has_aux=True))(streams)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), values(blocked_attention),
                 values(dense_attention))
    closed = dense_attention(
        spec.replace(noised=spec.noised.replace(max_visible_position=None),
                     clean=spec.clean.replace(max_visible_position=None)), *streams, None)
    assert not np.allclose(closed[0], values(dense_attention)[1][0])


@pytest.mark.ci_slow
def test_a_run_opens_and_goes_on_the_same(tmp_path):
    """Stopped while it opens and after: the same losses; after the opening, those of its objective."""
    write_text(tmp_path / "text.txt", 80)
    for steps in (2, 6):
        train(toy_config(tmp_path, {"train.anneal_steps": 4, "train.steps": steps}), str(tmp_path / "stopped"))
    train(toy_config(tmp_path, {"train.anneal_steps": 4}), str(tmp_path / "whole"))
    train(toy_config(tmp_path), str(tmp_path / "open"))
    losses = {name: [line["train/loss"] for line in read_metrics(tmp_path / name)]
              for name in ("stopped", "whole", "open")}
    assert losses["stopped"] == losses["whole"] and len(losses["whole"]) == 6
    assert losses["whole"][1:] != losses["open"][1:]


def test_what_stays_causal_has_nothing_to_open(tmp_path):
    with pytest.raises(UserError, match="train.anneal_steps=4 opens causal attention.*use 0"):
        toy_config(tmp_path, {"diffusion": AR, "model.adaln": False, "train.anneal_steps": 4})
