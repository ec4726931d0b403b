"""Routing and the experts' products against loops over tokens in NumPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from toy_runs import run_python

from bd3lm_jax.models import experts
from bd3lm_jax.models.experts import Routing

E, D, F = 8, 6, 5


def route_in_numpy(logits, bias, groups, top_groups, top_k, scale):
    """One token: its experts and their weights, by sorting."""
    score = 1 / (1 + np.exp(-logits))
    ranked = score + bias
    members = np.arange(len(logits)).reshape(groups, -1)
    value = [sum(sorted(ranked[group])[-2:]) for group in members]
    open_ = members[np.argsort(value)[::-1][:top_groups]].ravel()
    choice = sorted(open_, key=lambda e: -ranked[e])[:top_k]
    weight = score[choice] / (score[choice].sum() if top_k > 1 else 1)
    return set(choice), dict(zip(choice, scale * weight))


@pytest.mark.parametrize("groups, top_groups, top_k", [(4, 2, 2), (4, 2, 4), (2, 1, 3), (1, 1, 1), (1, 1, 8)])
def test_routing_in_numpy(groups, top_groups, top_k):
    draw = np.random.default_rng(0)
    logits, bias = draw.normal(size=(3, 50, E)), draw.normal(size=E)
    found = experts.route(jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32), groups=groups,
                          top_groups=top_groups, top_k=top_k, scale=2.5)
    for index in np.ndindex(3, 50):
        choice, weight = route_in_numpy(logits[index], bias, groups, top_groups, top_k, 2.5)
        assert set(np.asarray(found.choice[index])) == choice
        for expert, value in zip(np.asarray(found.choice[index]), found.weight[index]):
            assert value == pytest.approx(weight[expert], rel=1e-5)


def test_the_bias_moves_the_choice_and_nothing_else():
    draw = np.random.default_rng(1)
    logits = jnp.asarray(draw.normal(size=(40, E)), jnp.float32)

    def chosen(bias):
        return experts.route(logits, bias, groups=1, top_groups=1, top_k=2, scale=1.0)

    pushed = chosen(jnp.zeros(E).at[3].set(2.0))
    assert np.all(np.any(np.asarray(pushed.choice) == 3, axis=-1))
    assert not np.all(np.any(np.asarray(chosen(jnp.zeros(E)).choice) == 3, axis=-1))
    np.testing.assert_allclose(pushed.weight.sum(-1), 1, rtol=1e-5)
    gradient = jax.grad(lambda bias: jnp.sum(chosen(bias).weight ** 2))(jnp.zeros(E))
    np.testing.assert_array_equal(gradient, 0)


def matrices(seed=2):
    draw = np.random.default_rng(seed)
    return [draw.normal(size=shape).astype(np.float32) / 2 for shape in ((E, D, F), (E, D, F), (E, F, D))]


def routings(kind, tokens, k):
    draw = np.random.default_rng(3)
    choice = {"even": np.argsort(draw.uniform(size=(tokens, E)), axis=-1)[:, :k],
              "one": np.tile(np.arange(k) + 5 - k, (tokens, 1))}[kind]
    return choice.astype(np.int32), draw.uniform(0.1, 1, size=(tokens, k)).astype(np.float32)


def mix_in_numpy(x, choice, weight, gate, up, down):
    out = np.zeros(x.shape)
    for n, (tokens_experts, weights) in enumerate(zip(choice, weight)):
        for e, w in zip(tokens_experts, weights):
            inner = x[n].astype(np.float64) @ gate[e]
            out[n] += w * ((inner / (1 + np.exp(-inner)) * (x[n] @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("kind, tokens, k", some([("even", 37, 2), ("one", 37, 3), ("even", 1, 2), ("even", 9, 8)], 0))
def test_products_in_numpy(kind, tokens, k):
    x = np.random.default_rng(4).normal(size=(tokens, D)).astype(np.float32)
    choice, weight = routings(kind, tokens, k)
    found = jax.jit(experts.moe_ffn)(x, Routing(choice, weight, None), *matrices())
    np.testing.assert_allclose(found, mix_in_numpy(x, choice, weight, *matrices()), atol=1e-5)


def test_gradients_are_those_of_all_experts_on_all_tokens():
    x = np.random.default_rng(5).normal(size=(2, 10, D)).astype(np.float32)
    choice, weight = (a.reshape(2, 10, 3) for a in routings("even", 20, 3))

    def dense(x, weight, gate, up, down):
        share = jnp.sum(jax.nn.one_hot(choice, E) * weight[..., None], axis=-2)
        inner = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
        return jnp.einsum("btef,efd,bte->btd", inner, down, share)

    def sorted_(x, weight, *kernels):
        return experts.moe_ffn(x, Routing(choice, weight, None), *kernels)

    found, expected = (jax.jit(jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), argnums=(0, 1, 2, 3, 4)))(
        x, weight, *matrices()) for f in (sorted_, dense))
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_every_assignment_has_a_slot_of_its_own_expert():
    draw = np.random.default_rng(6)
    for experts_, count in ((8, 5), (3, 1), (5, 200)):
        tiles, size = experts.tile_shape(count, experts_)
        assert tiles * size <= count + experts_ * size and size <= max(1, -(-count // (2 * experts_)))
        for law in (np.ones(experts_), np.eye(experts_)[0] + 1e-9, np.arange(experts_) + 0.1):
            choice = draw.choice(experts_, size=count, p=law / law.sum())
            slot, expert = map(np.asarray, experts._slots(jnp.asarray(choice), experts_, tiles, size))
            assert len(set(slot)) == count and slot.max() < tiles * size
            np.testing.assert_array_equal(expert[slot // size], choice)


def test_imbalance_by_hand():
    """Two rows: one whose tokens all choose alike, one with padding."""
    choice = np.array([[[0, 1]] * 3, [[0, 1], [2, 3], [6, 7]]])
    score = np.random.default_rng(7).uniform(size=(2, 3, E)).astype(np.float32)
    real = np.array([[True] * 3, [True, True, False]])
    share = score / score.sum(-1, keepdims=True)
    first = E / 2 * (share[0, :, 0].mean() + share[0, :, 1].mean())  # f is E / 2 on two experts
    second = E / 4 * share[1, :2, :4].mean(0).sum()
    found = experts.load_balancing_loss(Routing(jnp.asarray(choice), None, jnp.asarray(score)), jnp.asarray(real))
    assert found == pytest.approx(3 * first + 2 * second, rel=1e-5)
    alike = Routing(jnp.arange(E).reshape(1, 4, 2), None, jnp.ones((1, 4, E)))
    assert experts.load_balancing_loss(alike, jnp.ones((1, 4), bool)) == pytest.approx(4)


@pytest.mark.ci_slow
def test_devices_share_out_rows_and_experts():
    """Four simulated devices, which hold experts of their own rows or of rows of others: as on one device."""
    done = run_python("""
        import json
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from bd3lm_jax.parallel import sharding
        from bd3lm_jax.config import MeshConfig
        from bd3lm_jax.models import experts
        draw = np.random.default_rng(0)
        x = draw.normal(size=(4, 6, 8)).astype(np.float32)
        choice = np.argsort(draw.uniform(size=(4, 6, 8)), axis=-1)[..., :2].astype(np.int32)
        weight = draw.uniform(size=choice.shape).astype(np.float32)
        kernels = [draw.normal(size=s).astype(np.float32) for s in ((8, 8, 4), (8, 8, 4), (8, 4, 8))]

        def total(x, weight, *kernels):
            out = experts.moe_ffn(x, experts.Routing(choice, weight, None), *kernels)
            return jnp.sum(jnp.sin(out)), out

        def everything(*args):
            return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True))(*args)
        expected = everything(x, weight, *kernels)
        found = []
        for sizes in ((2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 1, 4), (1, 2, 1, 2), (1, 1, 2, 2)):
            mesh = sharding.make_mesh(MeshConfig(*sizes))
            with jax.set_mesh(mesh):
                rows = jax.device_put(x, sharding.batch_sharding(mesh))
                split = [jax.device_put(w, NamedSharding(mesh, P(sharding.EXPERT_AXES, "fsdp"))) for w in kernels]
                got = everything(rows, weight, *split)
            found.append(max(float(np.abs(np.asarray(a) - b).max())
                             for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected))))
        print(json.dumps(found))
    """, devices=4)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < 1e-4
