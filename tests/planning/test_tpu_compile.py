"""The TPU compiler on described slices, without a TPU: attention, the step, the sampler. `pytest -m libtpu`."""

import json
import math
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
from bd3lm_jax import attention
from bd3lm_jax.parallel import sharding
from bd3lm_jax.attention import MaskSpec, Tokens
from bd3lm_jax.planning import hlo
from bd3lm_jax.models import trunk

SLICE = 16  # devices

def mesh_of(topology, data, fsdp):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    devices = np.array(devices[:data * fsdp]).reshape(data, fsdp, 1, 1)
    return jax.sharding.Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 4)

def figures(function, mesh, *arguments):
    with jax.set_mesh(mesh):
        program = function.lower(*arguments).compile()
    text = program.as_text()
    return {"temporary": program.memory_analysis().temp_size_in_bytes,
            "kernels": text.count('custom_call_target="tpu_custom_call"'),
            "communication": hlo.communication(text, SLICE),
            "sends": [line.strip() for line in text.splitlines() if hlo.CALL.search(line)]}
"""

ATTENTION = DESCRIBED + """
topology, (data, fsdp), backends = sys.argv[1], *map(json.loads, sys.argv[2:])
rows, length, block_size, heads, kv_heads, head_size = 4, 2048, 16, 4, 2, 64
mesh = mesh_of(topology, data, fsdp)
def shape(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
def tokens(length, copy):
    return Tokens(*[shape(rows, length, dtype=jnp.int32)] * 3, copy)
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
print(json.dumps({name: figures(jax.jit(gradients(name)), mesh, streams, spec) for name in backends}))
"""

# Programs of a small run, as training and sampling make them; sys.argv[1]: keys of its config.
RUN = DESCRIBED + """
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from toy_runs import toy_config
from bd3lm_jax import models
from bd3lm_jax.planning import compilers
from bd3lm_jax.generation.sampling import Request
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.generation import batch, plan as plans
from bd3lm_jax.generation.options import Options

special, length = SpecialIds(mask=511, end=0), 512
config = toy_config(Path("unused"), {"model.num_layers": 3, "model.hidden_size": 128, "model.num_heads": 2,
"model.vocab_size": 512,
                                     "data.seq_len": length, "diffusion.block_size": 16, "train.batch_size": 32,
                                     "mesh.data": 1} | json.loads(sys.argv[1]))
"""

STEP = RUN + """
program = compilers.tpu_program(config, special, "v5e")
state, batch = program.arguments()
found = figures(program.step(), program.mesh, state, batch)
split = lambda x: "fsdp" in x.sharding.spec
layers, leaves = jax.tree.leaves(state.params["blocks"]), jax.tree.leaves(state.params)
weights = {int(np.prod(x.shape[1:])) for x in layers} | {x.size for x in layers if not split(x)}
weights |= {x.size for name in state.params if name != "blocks" for x in jax.tree.leaves(state.params[name])}
weights |= {2 * 128 * 128}  # keys and values alone, of the last layer's clean tokens
print(json.dumps(found | {"weights": sorted(weights),
                          "split": sum(x.size for x in leaves if split(x)),
                          "whole": sum(x.size for x in leaves if not split(x))}))
"""

SAMPLER = RUN + """
model, rows = models.build(config.model, jnp.bfloat16), 48
lm = SimpleNamespace(config=config, model=model, special=special, context=length, tokenizer=None)
mesh = sharding.make_mesh(config.mesh, compilers.tpu_devices("v5e", config.mesh.data, 1))

def placed(tree):  # rows over devices, all else on each
    def place(x):
        split = P(sharding.BATCH_AXES) if x.shape[:1] == (rows,) else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))
    return jax.tree.map(place, tree)

def asked():
    ints = jnp.zeros(rows, jnp.int32)
    return Request(jax.random.split(jax.random.key(0), rows), jnp.zeros((rows, length), bool), ints + length, ints,
                   jnp.zeros(512, bool), jnp.float32(0.5))

params = placed(jax.eval_shape(lambda: trunk.init(model, jax.random.key(0))))
request, tokens = placed(jax.eval_shape(asked)), placed(jax.ShapeDtypeStruct((rows, length), jnp.int32))
integer, real = (placed(jax.ShapeDtypeStruct((), dtype)) for dtype in (jnp.int32, jnp.float32))
plan = plans.make_plan(lm, Options(), length)
progress = placed(jax.eval_shape(lambda *asked: batch.start_rows(lm, plan, 0, *asked), params, request, tokens,
                                 *[integer] * 3, real))
run = jax.jit(lambda *arguments: batch.run_rows(lm, plan, *arguments), donate_argnums=3)
print(json.dumps(figures(run, mesh, params, request, real, progress, integer)))
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


MESHES = {"split": {"mesh.data": 4, "mesh.fsdp": 4}, "slices": {"mesh.fsdp": 16, "mesh.slices": 2}}


def elements(line):
    """Numbers in the largest array that a collective gives."""
    arrays = re.findall(r"\w+\[([\d,]*)\]", line.split(" = ")[1].split("(%")[0])
    return max(math.prod(map(int, filter(None, dims.split(",")))) for dims in arrays)


@pytest.mark.parametrize("name", MESHES)
def test_the_step_gathers_weights_and_never_activations(name):
    found = compile_on_tpu(STEP, json.dumps(MESHES[name]))
    sent = found["communication"]
    kinds = {"all-gather", "reduce-scatter", "all-reduce"}
    if name == "slices":  # between them nothing but sums: of a device's own part of the gradients, but for some
        assert set(sent) == kinds | {"all-reduce between slices"}
        assert sent["all-reduce between slices"][1] < 1 / 4 * 4 * (found["split"] + found["whole"])
    if name == "split":
        assert set(sent) == kinds
        assert found["kernels"] == 6  # the scanned layers and the last one; attention is not run forwards twice
        # Matrices in 16 bits, once for the forward and once for the backward pass.
        assert sent["all-gather"][1] == pytest.approx(2 * 3 / 4 * 2 * found["split"], rel=0.15)
        assert sent["reduce-scatter"][1] <= 3 / 4 * 4 * found["split"]
    gathered = [elements(line) for line in found["sends"] if "all-gather" in line]
    assert set(gathered) <= set(found["weights"])  # activations of a device's rows alone are more than any of them
    assert max(found["weights"]) < 32 // 16 * 512 * 128


def test_the_sampler_is_one_loop_without_communication_of_tokens():
    """On many devices every one writes rows of its own; they only agree on when all are done."""
    one, many = (compile_on_tpu(SAMPLER, json.dumps({"mesh.data": count})) for count in (1, 16))
    assert one["communication"] == {} and many["communication"].keys() == {"all-reduce"}
    assert [elements(line) for line in many["sends"]] == [1, 1]  # in the conditions of its two loops
    assert many["temporary"] < one["temporary"]
