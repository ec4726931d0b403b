import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.state import LORA
from bd3lm_jax.training.optim import ema_decay, make_optimizer, make_schedule, update_ema, warmup_steps

OPTIM = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=1.0, warmup_steps=10,
             schedule="constant", final_lr_fraction=0.1, decay_fraction=0.2, ema_decay=0.999)


def optim(**changes):
    return types.SimpleNamespace(**{**OPTIM, **changes})


def rates(steps, **changes):
    """Of every update of a run."""
    schedule = make_schedule(optim(**changes), steps)
    return np.array([float(schedule(n)) for n in range(steps)])


def test_warm_up_is_linear_from_zero_then_constant():
    values = rates(100)
    np.testing.assert_allclose(values[:11], 1e-2 * np.arange(11) / 10, rtol=1e-6)
    np.testing.assert_allclose(values[10:], 1e-2, rtol=1e-6)


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_no_warm_up_starts_at_the_full_rate(name):
    assert rates(100, schedule=name, warmup_steps=0)[0] == pytest.approx(1e-2)


def test_cosine_follows_its_formula():
    n = np.arange(10, 100)
    expected = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (n - 10) / 89)))
    np.testing.assert_allclose(rates(100, schedule="cosine")[10:], expected, rtol=1e-5)


def test_wsd_is_stable_then_falls_linearly_over_the_last_fifth():
    values = rates(100, schedule="wsd")
    np.testing.assert_allclose(values[10:80], 1e-2, rtol=1e-6)
    np.testing.assert_allclose(values[79:], np.linspace(1e-2, 1e-3, 21), rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 100, 101])
@pytest.mark.parametrize("changes", [{}, {"warmup_steps": 0}, {"warmup_steps": 99}, {"warmup_steps": 80},
                                     {"decay_fraction": 0.01}, {"decay_fraction": 0.0}, {"decay_fraction": 1.0},
                                     {"decay_fraction": 1.0, "warmup_steps": 0}, {"final_lr_fraction": 0.0},
                                     {"final_lr_fraction": 1.0}])
def test_the_last_rate_is_the_final_one(name, steps, changes):
    values = rates(steps, schedule=name, **changes)
    assert values[-1] == pytest.approx(1e-2 * changes.get("final_lr_fraction", 0.1), rel=1e-6, abs=0)
    assert steps < 3 or values.max() == pytest.approx(1e-2, rel=0.01 if name == "cosine" else 1e-6)


@pytest.mark.parametrize("changes, steps, warmup", [
    ({"warmup_steps": 45, "schedule": "wsd", "decay_fraction": 0.3}, 20, 2),  # configs/tiny.py with few steps
    ({"warmup_steps": 45, "schedule": "wsd", "decay_fraction": 0.3}, 900, 45),
    ({"warmup_steps": 45, "schedule": "wsd", "decay_fraction": 0.3}, 5, 0),
    ({"warmup_steps": 2500, "schedule": "constant"}, 100, 10),
    ({"warmup_steps": 99, "schedule": "constant"}, 100, 99),
    ({"warmup_steps": 100, "schedule": "cosine"}, 100, 10),
    ({"warmup_steps": 90, "schedule": "wsd"}, 100, 10),
    ({"warmup_steps": 10, "schedule": "wsd", "decay_fraction": 0.95}, 100, 5),
    ({"warmup_steps": 10, "schedule": "wsd", "decay_fraction": 1.0}, 100, 0),
])
def test_a_warm_up_without_room_is_shortened(changes, steps, warmup):
    assert warmup_steps(optim(**changes), steps) == warmup
    values = rates(steps, **changes)
    np.testing.assert_allclose(values[:warmup], 1e-2 * np.arange(warmup) / max(warmup, 1), rtol=1e-5)
    assert values[warmup] == pytest.approx(1e-2)


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(UserError, match="cosine"):
        make_schedule(optim(schedule="cosin"), 100)


PARAMS = {"embed": {"embedding": np.full((3, 2), 2.0)}, "blocks": {"qkv": {"kernel": np.full((2, 2), -3.0)},
          "norm1": {"scale": np.ones(2)}, "mlp_in": {"kernel": np.ones((2, 2)), "bias": np.full(2, 0.5)}}}


def test_only_kernels_decay():
    tx = make_optimizer(optim(warmup_steps=0), 100)
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["blocks"]["qkv"]["kernel"], 1e-2 * 0.1 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(updates["blocks"]["mlp_in"]["kernel"], -1e-2 * 0.1, rtol=1e-6)
    for leaf in (updates["embed"]["embedding"], updates["blocks"]["norm1"], updates["blocks"]["mlp_in"]["bias"]):
        assert not np.any(jax.tree.leaves(leaf))


def test_factors_of_low_rank_updates_decay():
    tx = make_optimizer(optim(warmup_steps=0), 100)
    params = {LORA: {"blocks": {"qkv": {"kernel": {"a": jnp.full((1, 2, 1), -3.0), "b": jnp.full((1, 1, 2), 2.0)}}}}}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    factors = updates[LORA]["blocks"]["qkv"]["kernel"]
    np.testing.assert_allclose(factors["a"], 1e-2 * 0.1 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(factors["b"], -1e-2 * 0.1 * 2.0, rtol=1e-6)


def adamw_by_hand(x, gradients, clip):
    m = v = np.zeros_like(x)
    for n, g in enumerate(gradients, 1):
        g = g * min(1.0, clip / np.linalg.norm(g)) if clip else g
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        step = (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.99**n)) + 1e-8)
        x = x - 1e-2 * (step + 0.1 * x)
    return x


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_update_is_clipped_adamw(clip):
    rng = np.random.default_rng(0)
    x, scales = rng.standard_normal((4, 3)), np.array([1, 9, 0.1, 1, 3])
    gradients = scales[:, None, None] * rng.standard_normal((5, 4, 3))
    tx = make_optimizer(optim(warmup_steps=0, clip_norm=clip), 100)
    params = {"kernel": jnp.asarray(x, jnp.float32)}
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], adamw_by_hand(x, gradients, clip), atol=2e-6)


def test_ema_warms_up():
    assert float(ema_decay(0.9999, jnp.int32(0))) == pytest.approx(0.1)
    assert float(ema_decay(0.9999, jnp.int32(90))) == pytest.approx(0.91)
    assert float(ema_decay(0.9999, jnp.int32(10**7))) == pytest.approx(0.9999)


def test_ema_moves_by_one_minus_the_decay_in_float32():
    params = {"kernel": jnp.full(3, 5.0, jnp.bfloat16)}
    average = update_ema({"kernel": jnp.full(3, 1.0)}, params, 0.5, jnp.int32(1000))
    assert average["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(average["kernel"], 3.0)


def test_ema_that_is_off_stays_off():
    assert update_ema({}, {"kernel": jnp.ones(3)}, 0.0, jnp.int32(0)) == {}
