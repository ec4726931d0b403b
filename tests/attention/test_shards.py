"""Eight simulated devices compute what one does, each for its own rows and heads, and say nothing to each other."""

import pytest
from toy_runs import run_python

EIGHT_DEVICES = """
import re
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from oracle import assert_equal_to_dense, streams_for, two_stream_spec
from bd3lm_jax.attention.gpu import gpu_attention

axes = ("data", "fsdp", "tensor")
cases = ((2, 2, 2), 4, 2, ("data", "fsdp")), ((4, 1, 2), 4, 1, "data"), ((8, 1, 1), 3, 2, None)
for sizes, batch, kv_heads, rows in cases:
    mesh = jax.make_mesh(sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    spec = two_stream_spec([[24], [9], [24], [1]][:batch], 24, 4)
    streams = streams_for(spec, 2 * kv_heads, kv_heads, 2, True)
    with jax.set_mesh(mesh):
        heads = "tensor" if kv_heads == 2 and sizes[2] == 2 else None
        specs = (P(rows, None, None, heads), P(rows, None, heads))
        streams = tuple(jax.device_put(qkv, NamedSharding(mesh, p)) for qkv, p in zip(streams, specs))
        found = assert_equal_to_dense(gpu_attention, spec, *streams)
        attend = jax.jit(lambda streams: gpu_attention(spec, *streams, None))
        program = attend.lower(streams).compile().as_text()
        assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program), (sizes, rows)
        for out, p in zip(attend(streams), specs):
            assert out.sharding.is_equivalent_to(NamedSharding(mesh, p), out.ndim)

mesh = jax.make_mesh((4, 1, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)
spec = two_stream_spec([[512]] * 4, 512, 16)
abstract = lambda *shape: (jax.ShapeDtypeStruct((4, *shape, 4, 64), "bfloat16"),) * 3
with jax.set_mesh(mesh):
    f = jax.jit(lambda streams: gpu_attention(spec, *streams, None))
    text = f.trace((abstract(1, 512), abstract(496))).lower(lowering_platforms=("cuda",)).as_text()
line, = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
assert "(tensor<1x496x4x64xbf16>, tensor<1x496x2x64xbf16>" in line, line
print("done")
"""


@pytest.mark.ci_slow
def test_eight_devices_in_three_meshes():
    done = run_python(EIGHT_DEVICES, devices=8)
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr
