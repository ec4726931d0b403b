import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bd3lm_jax.config import MeshConfig
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.models import BACKBONES, dit, moe, trunk
from bd3lm_jax.parallel import sharding

N, D, H, F, C, V = 2, 16, 4, 64, 8, 128
SHAPES = {
    "embed": {"embedding": (V, D)},
    "condition": {"fc1": {"kernel": (32, C), "bias": (C,)}, "fc2": {"kernel": (C, C), "bias": (C,)}},
    "blocks": {
        "norm1": {"scale": (N, D)}, "norm2": {"scale": (N, D)},
        "qkv": {"kernel": (N, D, 3, H, D // H)}, "out": {"kernel": (N, H, D // H, D)},
        "mlp_in": {"kernel": (N, D, F), "bias": (N, F)}, "mlp_out": {"kernel": (N, F, D), "bias": (N, D)},
        "modulation": {"kernel": (N, C, 6, D), "bias": (N, 6, D)},
    },
    "head": {"norm": {"scale": (D,)}, "modulation": {"kernel": (C, 2, D), "bias": (2, D)},
             "linear": {"kernel": (D, V), "bias": (V,)}},
}


def params_of(shapes):
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes,
                        is_leaf=lambda x: isinstance(x, tuple))


def abstract_mesh(data, fsdp, tensor, expert=1):
    return AbstractMesh((data, fsdp, expert, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def test_the_rules_split_heads_hidden_layer_and_vocabulary():
    specs = sharding.param_specs(params_of(SHAPES), dit.SHARDING)
    assert specs["embed"]["embedding"] == P("tensor", "fsdp")
    assert specs["blocks"]["qkv"]["kernel"] == P(None, "fsdp", None, "tensor", None)
    assert specs["blocks"]["out"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert specs["blocks"]["mlp_in"] == {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")}
    assert specs["blocks"]["mlp_out"] == {"kernel": P(None, "tensor", "fsdp"), "bias": P()}
    assert specs["head"]["linear"] == {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}
    for leaf in jax.tree.leaves([specs["condition"], specs["blocks"]["norm1"], specs["head"]["norm"]]):
        assert leaf == P()


@pytest.mark.parametrize("adaln", [True, False])
def test_the_rules_cover_the_dit(adaln):
    config = dit.DiTConfig(vocab_size=100, num_layers=2, hidden_size=D, num_heads=H, mlp_ratio=4, dropout=0.0,
                           adaln=adaln, cond_dim=C, time_conditioning=False, rope_theta=1e4)
    params = jax.eval_shape(lambda: trunk.init(dit.build(config, jnp.float32), jax.random.key(0)))
    specs = sharding.param_specs(params, dit.SHARDING)
    assert specs["blocks"]["qkv"]["kernel"] == P(None, "fsdp", None, "tensor", None)
    for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(specs)):
        assert len(spec) <= leaf.ndim


@pytest.mark.parametrize("name", BACKBONES)
def test_every_rule_stands_once(name):
    """Of two with the same pattern the second would never be read, and could be edited in vain."""
    patterns = [pattern for pattern, _ in BACKBONES[name].sharding]
    assert sorted(set(patterns)) == sorted(patterns)


def test_uncovered_leaves_are_listed():
    shapes = {**SHAPES, "extra": {"kernel": (D, D)}, "other": {"a": (D,)}}
    with pytest.raises(UserError, match="no sharding rule covers extra/kernel, other/a: add a line to SHARDING"):
        sharding.param_specs(params_of(shapes), dit.SHARDING)


def test_an_axis_that_does_not_divide_is_left_out_of_that_leaf_only():
    shardings = sharding.param_shardings(params_of(SHAPES), abstract_mesh(1, 3, 2), dit.SHARDING)
    assert shardings["embed"]["embedding"].spec == P("tensor", None)
    assert shardings["blocks"]["qkv"]["kernel"].spec == P(None, None, None, "tensor", None)
    shapes = {**SHAPES, "embed": {"embedding": (V, 18)}}
    shardings = sharding.param_shardings(params_of(shapes), abstract_mesh(1, 3, 1), dit.SHARDING)
    assert shardings["embed"]["embedding"].spec == P("tensor", "fsdp")


def test_every_leaf_can_be_placed_on_every_mesh():
    for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2), (1, 5, 3)):
        shardings = sharding.param_shardings(params_of(SHAPES), abstract_mesh(*shape), dit.SHARDING)
        for leaf, placed in zip(jax.tree.leaves(params_of(SHAPES)), jax.tree.leaves(shardings)):
            placed.shard_shape(leaf.shape)  # raises if an axis does not divide


def test_mesh_of_one_device():
    mesh = sharding.make_mesh(MeshConfig(-1, 1, 1), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("wanted, message", [
    (MeshConfig(2, 1, 1), "mesh.data=2, mesh.fsdp=1, mesh.tensor=1 does not fit 1 devices: the product must be 1"),
    (MeshConfig(-1, 1, 2), "mesh.data=-1, mesh.fsdp=1, mesh.tensor=2 does not fit 1 devices"),
])
def test_mesh_that_does_not_fit_names_the_numbers(wanted, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(wanted, jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Device:
    """Of a machine that is not here."""

    id: int
    slice_index: int | None
    platform: str
    device_kind: str = "no kind that has an order of its own"


def devices(platform, *slice_indices):
    return [Device(i, index, platform) for i, index in enumerate(slice_indices)]


def test_slices_lie_along_data_and_whole():
    """Eight devices of two slices, in disorder: every row of the other axes stays within one slice."""
    given = devices("gpu", 7, 3, 7, 3, 3, 7, 7, 3)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, slices=2), given)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids, [[[[1, 3]], [[4, 7]]], [[[0, 2]], [[5, 6]]]])
    counted = sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=1, slices=-1), given)
    assert dict(counted.shape) == {"data": 4, "fsdp": 2, "expert": 1, "tensor": 1}
    found = np.vectorize(lambda device: device.slice_index)(counted.devices)
    np.testing.assert_array_equal(found[..., 0, 0], [[3, 3], [3, 3], [7, 7], [7, 7]])
    one = sharding.make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1), given)  # GPU hosts as one
    assert [device.id for device in one.devices.flat] == list(range(8))


def test_simulated_devices_are_dealt_out():
    given = devices("cpu", *[None] * 6)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1, slices=3), given)
    assert [[device.id for device in row] for row in mesh.devices[..., 0, 0]] == [[0, 1], [2, 3], [4, 5]]
    assert sharding.group_by_slice(MeshConfig(data=1, fsdp=6, tensor=1, slices=-1), given) == [given]


@pytest.mark.parametrize(("platform", "slices", "message"), [
    ("tpu", 1, "mesh.slices=1, but the 6 devices are in 2: use mesh.slices=2, or -1 for as many as there are"),
    ("gpu", 3, "mesh.slices=3, but the 6 devices are in 2"), ("cpu", 4, "mesh.slices=4, but the 6 devices are in 2")])
def test_slices_that_are_not_there(platform, slices, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1, slices=slices), devices(platform, *[0] * 3, *[1] * 3))


def test_slices_of_several_sizes():
    with pytest.raises(UserError, match="mesh.slices=2, but the 5 devices are in 2, of 2 and 3 devices: slices must"):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1, slices=2), devices("tpu", 0, 0, 0, 1, 1))


def test_a_mesh_that_does_not_fit_slices_names_them():
    message = "mesh.data=2, mesh.fsdp=2, mesh.tensor=1, mesh.slices=2 does not fit 6 devices: the product must be 6"
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=1, slices=2), devices("tpu", *[0] * 3, *[1] * 3))
    assert sharding.axis_sizes(MeshConfig(data=-1, fsdp=3, tensor=1, slices=2), 6, 2) == (2, 3, 1, 1)


def test_check_mesh():
    model = dit.DiTConfig(num_heads=H)
    sharding.check_mesh(abstract_mesh(2, 2, 4), model, batch=8)
    with pytest.raises(UserError, match="mesh.tensor=3 does not divide model.num_heads=4"):
        sharding.check_mesh(abstract_mesh(1, 1, 3), model, batch=8)
    with pytest.raises(UserError, match="fsdp = 6 does not divide a batch of 8 rows: use a multiple of 6, e.g. 12"):
        sharding.check_mesh(abstract_mesh(3, 2, 1), model, batch=8)


def test_an_axis_of_experts_needs_experts():
    dense, mixture = dit.DiTConfig(num_heads=H), moe.MoEConfig(num_heads=H, num_experts=8)
    sharding.check_mesh(abstract_mesh(1, 1, 2, expert=4), mixture, batch=4)
    sharding.check_mesh(abstract_mesh(1, 1, 4), moe.MoEConfig(num_heads=H, num_experts=6, groups=3), batch=4)
    with pytest.raises(UserError, match="mesh.expert=2 splits experts, and model.kind='dit' has none: use 1"):
        sharding.check_mesh(abstract_mesh(1, 1, 1, expert=2), dense, batch=8)
    with pytest.raises(UserError, match="expert x mesh.tensor = 16 does not divide model.num_experts=8"):
        sharding.check_mesh(abstract_mesh(1, 1, 4, expert=4), mixture, batch=8)
    with pytest.raises(UserError, match="mesh.data x mesh.fsdp x mesh.expert = 4 does not divide a batch of 6 rows"):
        sharding.check_mesh(abstract_mesh(2, 1, 1, expert=2), mixture, batch=6)


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, ("data", "fsdp"), None) is x


def test_constrain_keeps_values_under_a_mesh():
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(2 * x, ("data", "fsdp"), None))(jnp.ones((2, 3)))
        jaxpr = jax.make_jaxpr(lambda x: sharding.constrain(x, ("data", "fsdp"), None))(jnp.ones((2, 3)))
    np.testing.assert_array_equal(y, 2.0)
    assert "sharding_constraint" in str(jaxpr)


@pytest.mark.ci_slow
def test_eight_devices_hold_the_state_in_the_declared_parts():
    code = f"""
        import json
        import jax, jax.numpy as jnp, optax
        jax.config.update("jax_num_cpu_devices", 8)
        from jax.sharding import PartitionSpec as P
        from bd3lm_jax.models import dit
        from bd3lm_jax.parallel import sharding
        from bd3lm_jax.config import MeshConfig
        from bd3lm_jax.core.state import TrainState

        shapes = {SHAPES}
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

        def init():
            params = jax.tree.map(lambda s: jnp.ones(s), shapes, is_leaf=lambda x: isinstance(x, tuple))
            return TrainState(step=jnp.int32(0), params=params, ema=params, opt_state=tx.init(params))

        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
        abstract = jax.eval_shape(init)
        shardings = sharding.state_shardings(tx, abstract, mesh, dit.SHARDING)
        with jax.set_mesh(mesh):
            state = jax.jit(init, out_shardings=shardings)()
        part = lambda x: x.sharding.shard_shape(x.shape)
        moments = state.opt_state[1][0]
        print(json.dumps({{
            "mesh": dict(mesh.shape),
            "qkv": part(state.params["blocks"]["qkv"]["kernel"]),
            "ema": part(state.ema["head"]["linear"]["kernel"]),
            "mu": part(moments.mu["blocks"]["mlp_in"]["kernel"]), "nu": part(moments.nu["embed"]["embedding"]),
            "replicated": [x.sharding.is_fully_replicated for x in (state.step, moments.count)],
            "batch": part(jax.device_put(jnp.zeros((8, 5)), sharding.batch_sharding(mesh))),
            "abstract": part(sharding.with_shardings(abstract, shardings).params["head"]["linear"]["bias"]),
            "off": sharding.state_shardings(tx, abstract.replace(ema={{}}), mesh, dit.SHARDING).ema,
        }}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "mesh": {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2},
        "qkv": [N, D // 2, 3, H // 2, D // H], "ema": [D // 2, V // 2], "mu": [N, D // 2, F // 2],
        "nu": [V // 2, D // 2], "replicated": [True, True], "batch": [2, 5], "abstract": [V // 2], "off": {},
    }


def test_batch_rows_go_to_data_fsdp_and_expert():
    mesh = abstract_mesh(2, 4, 1)
    assert sharding.batch_sharding(mesh) == NamedSharding(mesh, P(("data", "fsdp", "expert")))
    assert sharding.num_row_shards(abstract_mesh(2, 4, 3, expert=5)) == 2 * 4 * 5
