"""Every shipped config at full size: its training step lowers for eight devices, and no array is allocated."""

import json

import pytest
from toy_runs import run_python

pytestmark = pytest.mark.ci_slow

ARGS = {
    "tiny": ("", "block_size=16", "algo=mdlm", "algo=ar"),
    "austen": ("", "block_size=16", "algo=mdlm", "algo=ar"),
    "lm1b": ("", "block_size=16", "algo=mdlm", "algo=ar", "medium"),
    "owt": ("", "block_size=16", "algo=mdlm", "algo=ar", "medium"),
    "llama_8b": ("", "algo=ar"),
}
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))  # data, fsdp, tensor
CODE = """
import importlib, json, math, sys
import jax, jax.numpy as jnp
from bd3lm_jax import models
from bd3lm_jax.parallel import sharding
from bd3lm_jax.training import optim
from bd3lm_jax.config import Config, MeshConfig
from bd3lm_jax.data.tokenizers import get_tokenizer
from bd3lm_jax.models import trunk
from bd3lm_jax.checkpoints.rundir import resolve
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.training.step import make_step

name, args, meshes, compiles = sys.argv[1], *map(json.loads, sys.argv[2:])
get_config = importlib.import_module("configs." + name).get_config


class Trained:  # stands for "bpe:N": N ids and a mask on top, without training it
    def __init__(self, spec):
        self.end_id, self.mask_id = 0, int(spec.removeprefix("bpe:"))
        self.vocab_size = self.mask_id + 1


def lowered(config, tokenizer, mesh):
    sharding.check_mesh(mesh, config.model, config.train.batch_size)
    model, tx = models.build(config.model, jnp.bfloat16), optim.make_optimizer(config.optim, config.train.steps)

    def initial():
        params = trunk.init(model, jax.random.key(0))
        return TrainState(jnp.zeros((), jnp.int32), params, params, tx.init(params))

    abstract = jax.eval_shape(initial)
    shardings = sharding.state_shardings(tx, abstract, mesh, models.sharding_rules(config.model))
    shape, split = (config.train.batch_size, config.data.seq_len), sharding.batch_sharding(mesh)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
    step = jax.jit(make_step(config, model, tx, SpecialIds(tokenizer.mask_id, tokenizer.end_id)), donate_argnums=0,
                   out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        return abstract, step.lower(sharding.with_shardings(abstract, shardings),
                                    {key: rows for key in ("tokens", "segments", "positions")})


found = []
for arg in args:
    spec = get_config(arg).data.tokenizer
    tokenizer = Trained(spec) if spec.startswith("bpe:") else get_tokenizer(spec, tuple)
    config = resolve(Config.from_dict(get_config(arg).to_dict()), tokenizer)
    for shape in meshes:
        if config.model.num_heads % shape[2]:
            continue
        mesh = sharding.make_mesh(MeshConfig(*shape))
        state, program = lowered(config, tokenizer, mesh)
        outputs = jax.tree.leaves(program.out_info)
        compiled = program.compile() if compiles and arg == "" else None
        params = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
        found.append({"arg": arg, "mesh": shape, "params": params, "outputs": len(outputs),
                      "state": len(jax.tree.leaves(state)), "compiled": compiled is not None})
print(json.dumps({"found": found, "vocab_size": config.model.vocab_size,
                  "allocated": sum(x.nbytes for x in jax.live_arrays())}))
"""
VOCAB = {"lm1b": 30522, "owt": 50258, "llama_8b": 128_256}  # BERT's [MASK] is one of its ids


@pytest.mark.parametrize("name", ARGS)
def test_the_step_lowers_on_every_mesh(name):
    done = run_python(CODE, name, json.dumps(ARGS[name]), json.dumps(MESHES), json.dumps(name == "tiny"), devices=8,
                      timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["vocab_size"] == VOCAB.get(name, report["vocab_size"])
    assert report["allocated"] < 1 << 20
    meshes = [tuple(line["mesh"]) for line in report["found"]]
    assert meshes.count(MESHES[0]) == meshes.count(MESHES[1]) == len(ARGS[name])
    assert meshes.count(MESHES[2]) == len(ARGS[name]) or name in ("tiny", "austen")  # perhaps an odd number of heads
    for line in report["found"]:
        assert line["outputs"] == line["state"] + 5  # the metrics
        assert line["compiled"] == (name == "tiny" and line["arg"] == "")
        assert line["params"] > {"tiny": 1e6, "austen": 1e6, "lm1b": 1.2e8, "owt": 1.5e8, "llama_8b": 8e9}[name]
        if line["arg"] == "medium":
            assert line["params"] > 3.5e8
