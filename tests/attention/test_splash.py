"""Splash attention, interpreted, against the dense oracle; what it stores; which program each platform gets."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from oracle import (
    assert_equal_to_dense,
    assert_padding_is_nothing,
    make_stream,
    one_stream_spec,
    run,
    streams_for,
    two_stream_spec,
)
from toy_runs import run_python

from bd3lm_jax.attention import splash
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.splash import splash_attention


@pytest.fixture
def small_tiles(monkeypatch):
    """The smallest tiles the kernel takes, so that short rows have several."""
    monkeypatch.setattr(splash, "TILES", (128,))


# length, block size, documents of each row, heads, key heads, copies, is the clean stream's own output wanted
TWO_STREAM = [
    (300, 4, [[300]], 4, 2, 1, True),
    (280, 40, [[280], [233]], 1, 1, 2, False),  # blocks that straddle tiles, padding
    (512, 256, [[512]], 1, 1, 1, True),  # a block over several tiles
    (260, 20, [[100, 140], [20, 240]], 2, 1, 3, False),  # packed documents, a tile that is nearly all padding
    (36, 1, [[5, 1, 30], [36]], 2, 2, 2, True),  # less than a tile
]


@pytest.mark.parametrize("length, block_size, rows, heads, kv_heads, noise_samples, clean_output",
                         some(TWO_STREAM, 0, 3))
def test_two_streams(small_tiles, length, block_size, rows, heads, kv_heads, noise_samples, clean_output):
    spec = two_stream_spec(rows, length, block_size)
    assert_equal_to_dense(splash_attention, spec, *streams_for(spec, heads, kv_heads, noise_samples, clean_output))


@pytest.mark.ci_slow
@pytest.mark.parametrize("rule", ["causal", "bidirectional"])
def test_rules_of_a_clean_stream_beside_a_noised_one(small_tiles, rule):
    spec = two_stream_spec([[150]], 150, 50, rule=rule)
    assert_equal_to_dense(splash_attention, spec, *streams_for(spec, 1, 1, 1, True))


@pytest.mark.parametrize("rule, block_size", some([("causal", 1), ("bidirectional", 160)], 0))
def test_one_stream(small_tiles, rule, block_size):
    spec = one_stream_spec(rule, [[160], [8, 100, 52], [120, 12]], 160, block_size)
    assert_equal_to_dense(splash_attention, spec, *streams_for(spec, 2, 1, 0, True))


@pytest.mark.ci_slow
def test_one_block_needs_no_clean_stream(small_tiles):
    spec = two_stream_spec([[140], [135]], 140, 140)
    assert_equal_to_dense(splash_attention, spec, *streams_for(spec, 2, 1, 2, False))


@pytest.mark.ci_slow
def test_tiles_of_the_shipped_size():
    spec = two_stream_spec([[1000]], 1024, 16)
    assert_equal_to_dense(splash_attention, spec, *streams_for(spec, 1, 1, 1, True))


def test_padding_gives_exact_zeros(small_tiles):
    spec = two_stream_spec([[64, 69], [], [200]], 200, 8)
    found = assert_equal_to_dense(splash_attention, spec, *streams_for(spec, 2, 1, 2, True))
    assert_padding_is_nothing(spec, found)


def test_extreme_scores_stay_finite():
    spec = one_stream_spec("causal", [[140]], 140, 1)
    q, k, v = make_stream(8, (1, 140), 1, 1)
    found = assert_equal_to_dense(splash_attention, spec, None, (300 * q, 300 * k, v), atol=1e-2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_bfloat16_is_close_to_float32():
    spec = two_stream_spec([[120]], 128, 4)
    noised, clean = streams = streams_for(spec, 2, 2, 1, True)
    rounded = run(splash_attention, spec, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), streams))
    for low, exact in zip(jax.tree.leaves(rounded), jax.tree.leaves(run(dense_attention, spec, streams))):
        assert low.dtype == jnp.bfloat16
        assert np.linalg.norm(low.astype(np.float32) - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("rule, block_size, stored",
                         [("block_causal", 16, 3), ("block_causal", 24, 15), ("causal", 512, 1)])
def test_the_mask_follows_the_rules_and_few_tiles_are_stored(rule, block_size, stored):
    """Written down whole, for a long row."""
    length, tile = 3072, 512
    layout = splash._Layout(rule, block_size, 1, length, length, True, tile)
    mask = splash._Mask(layout)
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    block_i, block_j = i // block_size, j // block_size
    expected = np.block([[block_i == block_j, block_j < block_i],
                         [np.zeros((length, length), bool), j <= i if rule == "causal" else block_j <= block_i]])
    assert mask.shape == expected.shape
    for q, kv in itertools.product(range(0, 2 * length, tile), repeat=2):
        index = slice(q, q + tile), slice(kv, kv + tile)
        np.testing.assert_array_equal(mask[index], expected[index])
    assert len(splash._kernel(layout, 1, True).fwd_mask_info.partial_mask_blocks) == stored


def test_tiles_follow_the_lengths():
    assert splash.choose_tile(100, 96, 1, 4) == 128
    assert splash.choose_tile(640, 624, 1, 16) == 384  # two tiles of 384 instead of two of 512
    assert splash.choose_tile(1024, 1008, 1, 16) == splash.choose_tile(0, 8192, 0, 1) == 512


def lowered(platform, attend):
    """Text of the program of outputs and gradients, lowered on this machine for another."""
    spec = two_stream_spec([[128]], 128, 16)
    def total(streams):
        return sum(jnp.sum(jnp.sin(x)) for x in attend(spec, *streams, None))
    gradient = jax.jit(jax.grad(total)).trace(streams_for(spec, 1, 1, 1, True))
    return gradient.lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_of_the_program_decides_whether_it_is_interpreted():
    assert lowered("tpu", splash_attention).count("@tpu_custom_call") == 3  # forward, dq, dk and dv
    assert "tpu_custom_call" not in lowered("cpu", splash_attention)


def test_a_remat_policy_can_keep_what_the_kernel_computed():
    def calls(policy):
        return lowered("tpu", jax.checkpoint(splash_attention, policy=policy)).count("@tpu_custom_call")
    assert calls(jax.checkpoint_policies.save_only_these_names("attended")) == 3
    assert calls(jax.checkpoint_policies.nothing_saveable) == 4


def test_why_not():
    spec = two_stream_spec([[64]], 64, 16)
    assert splash.unsupported_reason(spec, 64, jnp.bfloat16, 64) is None
    assert splash.unsupported_reason(spec, 80, "float32", 32768) is None
    assert "not in float16" in splash.unsupported_reason(spec, 64, jnp.float16, 64)
    assert "up to 256, not 257" in splash.unsupported_reason(spec, 257, jnp.bfloat16, 64)
    assert "up to 32768 tokens, not 32769" in splash.unsupported_reason(spec, 64, jnp.bfloat16, 32769)


def test_what_cannot_run_is_refused():
    spec = two_stream_spec([[8]], 8, 4)
    noised, clean = streams_for(spec, 1, 1, 1, True)
    with pytest.raises(ValueError, match="no cache"):
        splash_attention(spec, noised, clean, clean[1:])
    with pytest.raises(ValueError, match="aligned"):
        splash_attention(spec.replace(aligned=False), noised, clean, None)
    with pytest.raises(ValueError, match="not in float16"):
        splash_attention(spec, *jax.tree.map(np.float16, (noised, clean)), None)


SHARDED = """
import json
import jax, numpy as np
from oracle import run, streams_for, two_stream_spec
from bd3lm_jax.planning import hlo
from bd3lm_jax.attention.reference import dense_attention
from bd3lm_jax.attention.splash import splash_attention
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

spec = two_stream_spec([[48], [40], [20, 28], [48]], 48, 4)
streams = streams_for(spec, 4, 2, 2, True)
expected = run(dense_attention, spec, streams)
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
def place(x):
    return jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"), *[None] * (x.ndim - 3), "tensor")))
with jax.set_mesh(mesh):
    streams = jax.tree.map(place, streams)
    program = jax.jit(lambda streams: run(splash_attention, spec, streams)).lower(streams).compile()
errors = [float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (program(streams), expected)))]
print(json.dumps({"errors": errors, "communication": hlo.communication(program.as_text())}))
"""


@pytest.mark.ci_slow
def test_devices_attend_for_their_own_rows_and_heads_without_communication():
    done = run_python(SHARDED, devices=8, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["communication"] == {}
    assert len(found["errors"]) == 2 + 6 and max(found["errors"]) < 1e-4
