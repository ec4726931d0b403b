"""Attention on causal and unmasked flash calls against the dense oracle, with XLA in cuDNN's place; on a GPU, cuDNN."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from grids import some
from oracle import assert_equal_to_dense, assert_padding_is_nothing, one_stream_spec, streams_for, two_stream_spec

from bd3lm_jax.attention import check, gpu
from bd3lm_jax.attention.blocked import blocked_attention
from bd3lm_jax.attention.gpu import gpu_attention

ON_GPU = jax.default_backend() == "gpu"


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 are large, tiles short, and checks of the device fresh. Not on a GPU: no XLA in cuDNN's place."""
    if ON_GPU:
        pytest.skip("runs cuDNN on a GPU, which takes no such shapes")
    monkeypatch.setattr(gpu, "LARGE_BLOCK", 16)
    monkeypatch.setattr(gpu, "XLA_TILE", 16)
    gpu.self_check.cache_clear()
    yield
    gpu.self_check.cache_clear()


# length, block size, document of each row, heads, key heads, copies, is the clean stream's own output wanted
TWO_STREAM = [
    (40, 1, [40, 33], 1, 1, 1, True),
    (48, 4, [48, 29], 4, 2, 2, True),
    (48, 4, [48], 1, 1, 1, False),
    (60, 12, [60, 60], 2, 2, 3, False),
    (64, 16, [64, 35], 2, 1, 2, True),  # large blocks
    (96, 32, [70, 0], 1, 1, 1, False),
    (12, 12, [12, 7], 1, 1, 2, False),  # one block: no clean stream
    (48, 48, [48, 31, 0], 2, 1, 1, False),
]


@pytest.mark.parametrize("length, block_size, documents, heads, kv_heads, noise_samples, clean_output",
                         some(TWO_STREAM, 1, 4))
def test_two_streams(small, length, block_size, documents, heads, kv_heads, noise_samples, clean_output):
    spec = two_stream_spec([[n] if n else [] for n in documents], length, block_size)
    assert_equal_to_dense(gpu_attention, spec, *streams_for(spec, heads, kv_heads, noise_samples, clean_output))


@pytest.mark.ci_slow
@pytest.mark.parametrize("block_size", [4, 32])
def test_causal_clean_stream_beside_a_noised_one(small, block_size):
    spec = two_stream_spec([[64], [50]], 64, block_size, rule="causal")
    assert_equal_to_dense(gpu_attention, spec, *streams_for(spec, 1, 1, 1, True))


@pytest.mark.parametrize("rule, block_size", some([("causal", 1), ("block_causal", 4), ("block_causal", 20),
                                              ("bidirectional", 40)], 1))
def test_one_stream(small, rule, block_size):
    spec = one_stream_spec(rule, [[40], [27], []], 40, block_size)
    found = assert_equal_to_dense(gpu_attention, spec, *streams_for(spec, 2, 1, 0, True))
    assert_padding_is_nothing(spec, found)


@pytest.mark.parametrize("block_size", some([4, 16], 0))
def test_padding_gives_exact_zeros(small, block_size):
    spec = two_stream_spec([[29], [64]], 64, block_size)
    found = assert_equal_to_dense(gpu_attention, spec, *streams_for(spec, 2, 1, 2, True))
    assert_padding_is_nothing(spec, found)


@pytest.mark.ci_slow
def test_as_many_calls_as_blocks_only_up_to_a_limit(small, monkeypatch):
    """Beyond it large blocks take the causal call too."""
    monkeypatch.setattr(gpu, "MAX_CALLS", 1)
    spec = two_stream_spec([[64]], 64, 16)
    assert_equal_to_dense(gpu_attention, spec, *streams_for(spec, 1, 1, 1, True))


def test_what_cannot_run_is_said():
    spec = two_stream_spec([[32]], 32, 4)
    assert gpu.unsupported_reason(spec, 64, jnp.bfloat16) is None
    assert "not in float32" in gpu.unsupported_reason(spec, 64, jnp.float32)
    assert "not 60" in gpu.unsupported_reason(spec, 60, jnp.bfloat16)
    assert "not 256" in gpu.unsupported_reason(spec, 256, jnp.float16)
    assert "segments" in gpu.unsupported_reason(spec.replace(one_document=False), 64, jnp.bfloat16)
    assert "bidirectional" in gpu.unsupported_reason(spec.replace(rule="bidirectional"), 64, jnp.bfloat16)
    short = spec.replace(clean=jax.tree.map(lambda x: x[:, :24], spec.clean.replace(noise_sample=None)).replace(
        noise_sample=0))
    assert "28 clean tokens are needed" in gpu.unsupported_reason(short, 64, jnp.bfloat16)
    with pytest.raises(ValueError, match="28 clean tokens"):
        gpu_attention(short, *streams_for(short, 1, 1, 1, True), None)


def test_device_that_computes_right_passes_its_check_while_tracing(small, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    seen = []

    @jax.jit
    def traced(x):
        seen.append(gpu.self_check(8, jnp.dtype("bfloat16"), 2))
        return x

    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        traced(1.0)
    assert seen == [None]


def lost_gradient(backward):
    """A backward pass given the log-sum-exp and output of its own part instead of the whole."""
    def broken(causal, q, k, v, keys, lse, out, d_out):
        own_out, own_lse = gpu._xla_forward(causal, q, k, v, keys)
        return backward(causal, q, k, v, keys, own_lse, own_out, d_out)
    return broken


def failing(backward):
    def broken(*arguments):
        raise RuntimeError("no algorithm\nfor this shape")
    return broken


def not_finite(backward):
    def broken(causal, q, k, *others):
        dq, dk, dv = backward(causal, q, k, *others)
        return dq, dk.at[0, 0, 0, 0].set(jnp.nan) if causal else dk, dv
    return broken


@pytest.mark.ci_slow
@pytest.mark.parametrize("broken, message", [(lost_gradient, "off, and at most 0.02 is rounding"), (not_finite, "nan"),
                                             (failing, "no algorithm for this")])
def test_device_that_computes_wrong_fails_its_check(small, monkeypatch, broken, message):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "_xla_backward", broken(gpu._xla_backward))
    assert message in gpu.self_check(8, jnp.dtype("bfloat16"), 1)


def test_process_without_gpu_passes_no_check():
    assert ON_GPU or "no GPU" in gpu.self_check(64, jnp.dtype("bfloat16"), 1)


@dataclasses.dataclass(frozen=True)
class Case:
    length: int
    block_size: int
    share: int
    head_size: int


@pytest.mark.slow
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("attend, dtype", [(gpu_attention, jnp.bfloat16), (gpu_attention, jnp.float16),
                                           (blocked_attention, jnp.bfloat16), (blocked_attention, jnp.float32)])
@pytest.mark.parametrize("case", [Case(1024, 1, 1, 64), Case(1024, 4, 2, 64), Case(1024, 16, 1, 128),
                                  Case(1000, 8, 4, 64), Case(1024, 128, 1, 64), Case(2048, 512, 2, 64),
                                  Case(1024, 256, 1, 128)], ids=str)
def test_on_a_gpu(attend, dtype, case):
    rows = [[case.length], [case.length - case.block_size - 3]]
    example = check.example(rows, case.length, case.block_size, 2 * case.share, 2, case.head_size, dtype)
    assert check.largest_difference(attend, *example) <= check.tolerance(dtype)
