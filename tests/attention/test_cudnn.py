"""The program for CUDA, lowered without a GPU, holds the intended cuDNN calls; nothing here runs them."""

import collections
import json
import re

import jax
import jax.numpy as jnp
import pytest
from oracle import one_stream_spec, two_stream_spec

from bd3lm_jax.attention import cudnn
from bd3lm_jax.attention.gpu import gpu_attention

HEADS, KV_HEADS, SIZE, BATCH = 4, 2, 64, 2
BACKWARD = "__cudnn$fmhaSoftmaxBackward"
FORWARD = "__cudnn$fmhaSoftmax"


def abstract(*shape):
    return tuple(jax.ShapeDtypeStruct((BATCH, *shape, n, SIZE), jnp.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS))


def cudnn_calls(spec, noised, clean):
    """(target, mask type, scale, shape of the query, shape of the key) of every call in forward and backward."""
    def total(streams):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in gpu_attention(spec, *streams, None) if x is not None)

    text = jax.jit(jax.grad(total)).trace((noised, clean)).lower(lowering_platforms=("cuda",)).as_text()
    calls = collections.Counter()
    for line in text.splitlines():
        target = re.search(r"@(__cudnn\S*?)\(", line)
        if target:
            config = json.loads(re.search(r'backend_config = "(.*?)"[,}]', line)[1].replace("\\22", '"'))
            fmha = config["cudnn_fmha_backend_config"]
            shapes = [tuple(map(int, x.split("x"))) for x in re.findall(r"tensor<([\dx]+)xbf16>", line)]
            calls[target[1], fmha["mask_type"], fmha["fmha_scale"], *shapes[:2]] += 1
    return calls


def both(mask_type, q, k, count=1):
    return {(target, mask_type, SIZE**-0.5, q, k): count for target in (FORWARD, BACKWARD)}


@pytest.mark.parametrize("noise_samples", [1, 2])
def test_small_blocks_take_one_causal_call(noise_samples):
    """Noised copies and the clean stream are more heads on the same keys."""
    spec = two_stream_spec([[512]] * BATCH, 512, 16)
    q, k = (BATCH, 496, (noise_samples + 1) * HEADS, SIZE), (BATCH, 496, KV_HEADS, SIZE)
    assert cudnn_calls(spec, abstract(noise_samples, 512), abstract(496)) == both("CAUSAL", q, k)


def test_large_blocks_take_a_call_each():
    """Query block b against (b + 1) blocks of keys, and all noised blocks against themselves."""
    spec = two_stream_spec([[768]] * BATCH, 768, 256)
    expected = both("PADDING", (3 * BATCH, 256, HEADS, SIZE), (3 * BATCH, 256, KV_HEADS, SIZE))
    for blocks in (1, 2):
        expected |= both("PADDING", (BATCH, 256, 2 * HEADS, SIZE), (BATCH, 256 * blocks, KV_HEADS, SIZE))
    assert cudnn_calls(spec, abstract(1, 768), abstract(512)) == expected


def test_one_block_is_one_call():
    spec = two_stream_spec([[512]] * BATCH, 512, 512)
    shapes = (BATCH, 512, HEADS, SIZE), (BATCH, 512, KV_HEADS, SIZE)
    assert cudnn_calls(spec, abstract(1, 512), None) == both("PADDING", *shapes)


@pytest.mark.parametrize("rule, block_size, mask_type", [("causal", 1, "CAUSAL"), ("block_causal", 16, "CAUSAL"),
                                                         ("bidirectional", 512, "PADDING")])
def test_one_stream_is_one_call(rule, block_size, mask_type):
    spec = one_stream_spec(rule, [[512]] * BATCH, 512, block_size)
    shapes = (BATCH, 512, HEADS, SIZE), (BATCH, 512, KV_HEADS, SIZE)
    assert cudnn_calls(spec, None, abstract(512)) == both(mask_type, *shapes)


def test_jax_without_the_private_calls_is_noticed(monkeypatch):
    assert cudnn.missing_primitive_reason() is None
    monkeypatch.delattr(cudnn._private(), "_dot_product_attention_bwd_p_wrapper")
    assert "has no cuDNN attention as this library knows it" in cudnn.missing_primitive_reason()
