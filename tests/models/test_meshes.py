"""A whole training step of the Llama and mixture networks: on one device, in microbatches, and on eight devices."""

import json

import pytest
from toy_runs import run_python

CODE = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from toy_runs import END, LENGTH, MASK, network, quick_jit, toy_config
from bd3lm_jax import models
from bd3lm_jax.models import forward
from bd3lm_jax.parallel import sharding
from bd3lm_jax.config import MeshConfig
from bd3lm_jax.models import llama, moe
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.training.step import make_step

SHARED = dict(vocab_size=-1, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=24, dropout=0.1,
              rope_theta=1e4, norm_eps=1e-5, qk_norm=True, tie_embeddings=True)
MODELS = {
    "llama": dict(SHARED, num_layers=2, rope_scaling=(), qkv_bias=True, target_shift=""),
    "moe": dict(SHARED, num_layers=2, dense_layers=1, rotary_dim=2, num_experts=4, expert_intermediate_size=8,
                shared_intermediate_size=8, top_k=2, groups=2, top_groups=1, routed_scale=2.5, load_balancing=0.1),
}
kind = sys.argv[1]
tx = optax.sgd(0.1)


def step_of(microbatch, mesh):
    config = toy_config(Path("unused"), {"model": {"kind": kind, **MODELS[kind]}, "optim.ema_decay": 0.0,
                                         "compute.microbatch": microbatch})
    model, params = network(config)
    state = TrainState(jnp.int32(0), params, {}, tx.init(params))
    tokens = np.random.default_rng(0).integers(97, 105, size=(8, LENGTH)).astype(np.int32)
    batch = {"tokens": tokens, "positions": np.array(forward.single_document_rows(tokens)[0]),
             "segments": np.ones_like(tokens)}
    step = quick_jit(make_step(config, model, tx, SpecialIds(MASK, END)))
    if mesh is None:
        return step(state, batch)
    mesh = sharding.make_mesh(MeshConfig(*mesh))
    rules = models.sharding_rules(config.model)
    state = jax.device_put(state, sharding.state_shardings(tx, jax.eval_shape(lambda: state), mesh, rules))
    split = state.params["blocks1"]["experts"] if kind == "moe" else state.params["blocks"]
    parts = split["up" if kind == "llama" else "gate"]["kernel"]
    assert parts.sharding.shard_shape(parts.shape) != parts.shape
    with jax.set_mesh(mesh):
        return step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))


(state, metrics), worst = step_of(0, None), {}
meshes = [(2, 2, 2)] if kind == "llama" else [(2, 2, 2), (1, 2, 2, 2), (2, 1, 1, 4)]  # data, fsdp, tensor, expert
for name, how in (("microbatch", (2, None)), *((str(sizes), (0, sizes)) for sizes in meshes)):
    other, seen = step_of(*how)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), state.params, other.params)
    worst[name] = [abs(float(seen["loss"]) - float(metrics["loss"])), max(jax.tree.leaves(moved))]
print(json.dumps([float(metrics["loss"]), worst]))
"""


@pytest.mark.ci_slow
@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_same_step_in_parts_and_on_eight_devices(kind):
    done = run_python(CODE, kind, devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    loss, worst = json.loads(done.stdout.splitlines()[-1])
    assert 1 < loss < 20
    for name, (loss_error, weight_error) in worst.items():
        assert loss_error < 1e-5 * loss and weight_error < 1e-5, name
