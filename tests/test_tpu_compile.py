"""The TPU compiler on described slices, without a TPU: attention and a sharded step with it. `pytest -m libtpu`."""

import json
import re

import pytest
from toy_runs import run_python

pytestmark = pytest.mark.libtpu

DESCRIBED = """
import json, os, sys
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
               "TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
import jax, jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from bd3lm_jax import attention, hlo, passes, sharding
from bd3lm_jax.attention import MaskSpec, Tokens
from bd3lm_jax.models import dit, trunk
from bd3lm_jax.passes import Execution

def mesh_of(topology, data, fsdp):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    devices = np.array(devices[:data * fsdp]).reshape(data, fsdp, 1, 1)
    return jax.sharding.Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 4)

def compiled(function, mesh, *arguments):
    with jax.set_mesh(mesh):
        program = jax.jit(function).lower(*arguments).compile()
    text = program.as_text()
    return {"temporary": program.memory_analysis().temp_size_in_bytes,
            "kernels": text.count('custom_call_target="tpu_custom_call"'), "communication": hlo.communication(text),
            "sends": [line for line in text.splitlines() if hlo.CALL.search(line)]}
"""

ATTENTION = DESCRIBED + """
topology, (data, fsdp), backends = sys.argv[1], *map(json.loads, sys.argv[2:])
rows, length, block_size, heads, kv_heads, head_size = 4, 2048, 16, 4, 2, 64
mesh = mesh_of(topology, data, fsdp)
def shape(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
def tokens(length, view):
    return Tokens(*[shape(rows, length, dtype=jnp.int32)] * 3, view)
def stream(*lead):
    return tuple(shape(*lead, n, head_size) for n in (heads, kv_heads, kv_heads))
kept = length - block_size
spec = MaskSpec("block_causal", block_size, True, False, tokens(length, 1), tokens(kept, 0), None)
streams = stream(rows, 1, length), stream(rows, kept)

def gradients(backend):
    def total(streams, spec):
        outputs = attention.attend(backend, spec, *streams, None)
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in outputs)
    return jax.grad(total)
print(json.dumps({name: compiled(gradients(name), mesh, streams, spec) for name in backends}))
"""

STEP = DESCRIBED + """
batch, length, block_size, vocabulary = 16, 512, 16, 512
mesh = mesh_of("v5e:4x4", 4, 4)
config = dit.DiTConfig(vocab_size=vocabulary, layers=3, width=128, heads=2, mlp_ratio=4, dropout=0.0, adaln=True,
                       cond_dim=32, time_conditioning=False, rope_base=1e4)
model = dit.build(config, jnp.bfloat16)
abstract = jax.eval_shape(lambda: trunk.init(model, jax.random.key(0)))
params = sharding.with_shardings(abstract, sharding.param_shardings(abstract, mesh))
rows = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding.batch_sharding(mesh))

def loss(params, xt_BxL, x0_BxL, position_BxL, segment_BxL):
    execution = Execution(backend="auto", layers="scan", remat="attention", one_document=True)
    h = passes.two_stream(model, params, xt_BxL[:, None], x0_BxL, position_BxL, segment_BxL, block_size=block_size,
                          execution=execution)
    return jnp.mean(jnp.square(h.astype(jnp.float32)))
print(json.dumps(compiled(jax.grad(loss), mesh, params, rows, rows, rows, rows)))
"""


def compile_on_tpu(code, *arguments):
    pytest.importorskip("libtpu")
    done = run_python(code, *arguments, timeout=590)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x1"])
def test_attention_compiles_to_three_kernels_in_little_memory(topology):
    found = compile_on_tpu(ATTENTION, topology, "[1, 1]", '["splash", "dense"]')
    splash, dense = found["splash"], found["dense"]
    assert splash["kernels"] == 3 and dense["kernels"] == 0  # forward, dq, dk and dv
    whole_mask = 4 * (2 * 2048)**2  # one byte for each pair of each row
    assert dense["temporary"] > whole_mask
    assert splash["temporary"] < 0.1 * dense["temporary"]


def test_attention_on_a_mesh_does_not_communicate():
    found = compile_on_tpu(ATTENTION, "v5e:4x4", "[2, 2]", '["splash"]')["splash"]
    assert found["kernels"] == 3 and found["communication"] == {}


def test_a_sharded_step_gathers_weights_and_nothing_for_attention():
    found = compile_on_tpu(STEP)
    assert found["kernels"] == 6  # the scanned layers and the last one; attention is not run forwards twice
    assert found["communication"]["all-gather"][0] > 0
    for line in found["sends"]:  # named after modules, of which attention is none
        assert re.search(r'op_name="[^"]*(Block|Embed)', line), line
