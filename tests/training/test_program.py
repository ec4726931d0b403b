from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_runs import END, LENGTH, MASK, run_python, toy_config

from bd3lm_jax.config import MeshConfig
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.models import forward
from bd3lm_jax.parallel.sharding import AXES, make_mesh
from bd3lm_jax.planning.plan import resolve_config
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training.program import Program, bytes_needed, bytes_per_device

SPECIAL = SpecialIds(MASK, END)
ONE = MeshConfig(data=1, fsdp=1, tensor=1)


def program(changes=None) -> Program:
    config, special = resolve_config(toy_config(Path("unused"), changes))
    return Program.of(config, special, make_mesh(ONE, jax.devices()[:1]), jnp.float32)


def test_the_compiled_step_is_the_step_that_runs():
    toy = program()
    assert toy.special == SPECIAL
    tokens = np.random.default_rng(0).integers(97, 105, size=(8, LENGTH)).astype(np.int32)
    position, segment = forward.single_document_rows(jnp.asarray(tokens))
    batch = {"tokens": jnp.asarray(tokens), "positions": position, "segments": segment}
    with jax.set_mesh(toy.mesh):
        state = toy.initial_state()
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, toy.abstract)
        ahead, _ = toy.compile()(toy.initial_state(), batch)
        now, metrics = toy.step()(state, batch)
    jax.tree.map(np.testing.assert_array_equal, ahead, now)
    assert int(now.step) == 1 and bool(metrics["finite"])
    assert toy.num_params == sum(x.size for x in jax.tree.leaves(now.params))


def test_bytes_are_those_of_the_arrays():
    toy = program()
    state, batch = toy.arguments()
    arrays = jax.tree.leaves(toy.initial_state())
    assert bytes_per_device(state) == sum(x.nbytes for x in arrays)
    assert bytes_per_device(batch) == 3 * 8 * LENGTH * 4
    assert bytes_needed(toy.compile()) > bytes_per_device((state, batch))


@pytest.mark.ci_slow
def test_bytes_on_four_devices():
    done = run_python("""
        import sys
        sys.path.insert(0, sys.argv[1])
        from test_program import *
        config, special = resolve_config(toy_config(Path("unused")))
        toy = Program.of(config, special, make_mesh(MeshConfig(data=2, fsdp=2, tensor=1)), jnp.float32)
        device = jax.devices()[3]
        held = sum(s.data.nbytes for x in jax.tree.leaves(toy.initial_state()) for s in x.addressable_shards
                   if s.device == device)
        assert held == bytes_per_device(toy.arguments()[0]), (held, bytes_per_device(toy.arguments()[0]))
        assert bytes_per_device(toy.arguments()[1]) == 3 * 2 * LENGTH * 4
    """, Path(__file__).parent, devices=4)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="does not divide a batch of 7 rows"):
        run = toy_config(Path("unused"), {"train.batch_size": 7})
        mesh = jax.sharding.AbstractMesh((2, 1, 1, 1), AXES)
        Program.of(resolve_config(run)[0], SPECIAL, mesh, jnp.float32)
