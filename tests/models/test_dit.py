"""The network's parts against closed forms; its sizes against the paper's; wrong configs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.models import build, trunk
from bd3lm_jax.models.dit import Condition, DiTConfig, rotate

TINY = DiTConfig(vocab_size=67, num_layers=2, hidden_size=16, num_heads=2, mlp_ratio=4, dropout=0.0, adaln=True,
                 cond_dim=8,
                 time_conditioning=False, rope_theta=1e4)
PAPER = dataclasses.replace(TINY, vocab_size=50258, num_layers=12, hidden_size=768, num_heads=12, cond_dim=128)


@functools.cache
def network(config):
    model = build(config, jnp.float32)
    return model, jax.jit(functools.partial(trunk.init, model))(jax.random.key(0))


def perturbed(params):
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * draw.normal(size=x.shape).astype(np.float32), params)


def shapes_of(config):
    return jax.eval_shape(functools.partial(trunk.init, build(config, jnp.float32)), jax.random.key(0))


def count_parameters(config):
    """Numbers in the network, without the rows that pad the vocabulary."""
    unused = (config.padded_vocab - config.vocab_size) * (2 * config.hidden_size + 1)
    return sum(x.size for x in jax.tree.leaves(shapes_of(config))) - unused


def test_size_is_the_papers():
    assert round(count_parameters(PAPER) / 1e6, 1) == 169.6


def test_autoregressive_form_has_no_conditioning():
    shapes = shapes_of(dataclasses.replace(TINY, adaln=False))
    assert "condition" not in shapes and "condition" in shapes_of(TINY)
    assert "modulation" not in shapes["blocks"] | shapes["head"]


def test_untrained_network_predicts_uniformly():
    model, params = network(TINY)
    ids = jnp.arange(6)[None]
    h = model.embed.apply({"params": params["embed"]}, ids)
    logits = trunk.logits(model, params, h)
    assert logits.shape == (1, 6, 67) and logits.dtype == jnp.float32
    assert np.all(np.asarray(logits) == 0)


def test_untrained_layer_is_the_identity():
    model, params = network(TINY)
    _, block, _ = model.groups[0]
    first_layer = {"params": jax.tree.map(lambda x: x[0], params["blocks"])}
    h = jax.random.normal(jax.random.key(1), (1, 3, 16))
    cond = jnp.ones((1, 1, 8))
    q, _, _ = block.apply(first_layer, h, cond, model.rotary(jnp.arange(3)[None]), True, method=block.project_qkv)
    after, aux = block.apply(first_layer, h, q, cond, None, method=block.attention_output_and_mlp)
    np.testing.assert_array_equal(after, h)
    assert aux == 0


def test_rotation_is_a_complex_product():
    model, _ = network(TINY)
    positions = np.array([0, 1, 5, 1000])
    x = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)
    angles = positions[:, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), model.rotary(jnp.asarray(positions))), expected, atol=1e-4)


def test_noise_level_features():
    condition = Condition(TINY)
    params = condition.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]
    sigma = np.array([[0.0, 0.7, 3.0]])
    angles = sigma[..., None] * np.exp(-np.log(10000) * np.arange(128) / 128)
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)

    def silu(x):
        return x / (1 + np.exp(-x))

    inner = silu(features @ np.asarray(params["fc1"]["kernel"], np.float64) + np.asarray(params["fc1"]["bias"]))
    expected = silu(inner @ np.asarray(params["fc2"]["kernel"], np.float64) + np.asarray(params["fc2"]["bias"]))
    np.testing.assert_allclose(condition.apply({"params": params}, jnp.asarray(sigma)), expected, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_noise_level_of_a_part_is_that_of_its_tokens(parts):
    model, params = network(dataclasses.replace(TINY, time_conditioning=True))
    params = perturbed(params)
    h = jax.random.normal(jax.random.key(2), (1, 6, 16))
    sigma = jnp.linspace(0.1, 2, parts)[None]
    logits_of = jax.jit(functools.partial(trunk.logits, model))
    together = logits_of(params, h, sigma)
    for i in range(6):
        alone = logits_of(params, h[:, i:i + 1], sigma[:, i * parts // 6][:, None])
        np.testing.assert_allclose(together[:, i:i + 1], alone, atol=1e-6)


def test_vocabulary_padding_is_invisible():
    model, params = network(TINY)
    params = perturbed(params)
    assert params["embed"]["embedding"].shape == (128, 16)
    ids = jnp.array([[1, 66, 3]])

    @jax.jit
    def logits_of(params):
        h = model.embed.apply({"params": params["embed"]}, ids)
        return trunk.logits(model, params, h)

    def spoiled(tree):
        tree = jax.tree.map(np.copy, tree)
        tree["embed"]["embedding"][67:] = np.nan
        tree["head"]["linear"]["kernel"][:, 67:] = 1e9
        tree["head"]["linear"]["bias"][67:] = 1e9
        return tree

    assert logits_of(params).shape == (1, 3, 67)
    np.testing.assert_array_equal(logits_of(spoiled(params)), logits_of(params))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jax.nn.logsumexp(logits_of(p), axis=-1))))(params)["head"]["linear"]
    assert np.all(np.asarray(gradient["bias"])[67:] == 0) and np.all(np.asarray(gradient["bias"])[:67] != 0)


@pytest.mark.parametrize("change, message", [
    ({"num_layers": 0}, "model.num_layers is 0"),
    ({"vocab_size": 1}, "model.vocab_size is 1"),
    ({"hidden_size": 18}, "model.hidden_size=18 must be a multiple of 2 \\* model.num_heads=4"),
    ({"dropout": 1.0}, "model.dropout is 1.0"),
    ({"adaln": False, "time_conditioning": True}, "needs model.adaln=True"),
])
def test_wrong_config(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)
