"""The chunked loss against all logits at once: values, gradients, memory, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from toy_runs import run_python

from bd3lm_jax.scoring.loss import OutputLayer, chunk_positions, token_losses, weighted_total

GROUPS, POSITIONS, DEPTH, VOCAB, KNOWN, MASK = 2, 21, 16, 40, 37, 36


def problem(dtype=jnp.float32):
    draw = np.random.default_rng(0)
    output = OutputLayer(jnp.asarray(draw.normal(size=(DEPTH, VOCAB)), jnp.float32),
                         jnp.asarray(draw.normal(size=VOCAB), jnp.float32))
    features = jnp.asarray(draw.normal(size=(GROUPS, POSITIONS, DEPTH)), dtype)
    target = jnp.asarray(draw.integers(0, MASK, size=(GROUPS, POSITIONS)), jnp.int32)
    weight = draw.random((GROUPS, POSITIONS)) * (draw.random((GROUPS, POSITIONS)) < 0.6)
    return output, features, target, jnp.asarray(weight, jnp.float32)


def all_at_once(output, features, target):
    """Probabilities over the tokens that can be predicted, written out in float64."""
    possible = np.arange(VOCAB) < MASK
    kernel, bias, features = (np.asarray(x, np.float64) for x in (*output, features))
    odds = np.exp(features @ kernel + bias) * possible
    chosen = np.take_along_axis(odds, np.asarray(target)[..., None], axis=-1)[..., 0]
    return -np.log(chosen / odds.sum(-1)), odds / odds.sum(-1, keepdims=True)


@pytest.mark.parametrize("chunk", [0, 1, 4, 21, 100])
def test_losses_of_tokens(chunk):
    output, features, target, _ = problem()
    losses = token_losses(output.exclude_tokens(MASK, KNOWN), features, target, chunk)
    np.testing.assert_allclose(losses, all_at_once(output, features, target)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 1, 4, 21])
@pytest.mark.parametrize("depth", some([DEPTH, 5], 0))  # in slices, and not
def test_total_and_its_gradient(chunk, depth):
    """Softmax minus one-hot, by hand."""
    output, features, target, weight = problem()
    output, features = OutputLayer(output.kernel_DxV[:depth], output.bias_V), features[..., :depth]
    losses, p = all_at_once(output, features, target)

    def total(output, features, weight):
        return 3 * weighted_total(output.exclude_tokens(MASK, KNOWN), features, target, weight, chunk)

    value, (d_output, d_features, d_weight) = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(output, features, weight)
    d_logits = 3 * np.asarray(weight)[..., None] * (p - (np.arange(VOCAB) == np.asarray(target)[..., None]))
    expected = (3 * np.sum(weight * losses), np.einsum("gnd,gnv->dv", features, d_logits), d_logits.sum((0, 1)),
                d_logits @ np.asarray(output.kernel_DxV).T, 3 * losses)
    for found, right in zip((value, *d_output, d_features, d_weight), expected):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=2e-5)
    assert np.all(np.asarray(d_features)[np.asarray(weight) == 0] == 0)


def test_what_cannot_be_predicted_gets_no_gradient():
    output, features, target, weight = problem()

    def total(out):
        return weighted_total(out.exclude_tokens(MASK, KNOWN), features, target, weight, 4)

    gradient = jax.grad(total)(output)
    assert np.all(np.asarray(gradient.kernel_DxV)[:, MASK:] == 0) and np.all(np.asarray(gradient.bias_V)[MASK:] == 0)
    gradient = jax.grad(lambda out: weighted_total(out.exclude_tokens(-1, VOCAB), features, target, weight, 4))(output)
    assert np.all(np.any(np.asarray(gradient.kernel_DxV) != 0, axis=0))


def test_bfloat16_features_accumulate_in_float32():
    output, features, target, weight = problem(jnp.bfloat16)
    value, gradient = jax.value_and_grad(lambda x: weighted_total(output, x, target, weight, 4))(features)
    exact = weighted_total(output, features.astype(jnp.float32), target, weight, 4)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, exact, rtol=5e-3)


def test_chunks_are_even_and_bounded():
    assert chunk_positions(1000, 50, 300) == 250
    assert chunk_positions(10, 50, 300) == 10
    assert chunk_positions(10**6, 50_304, 0) * 50_304 * 4 <= 34 * 2**20


def test_memory_does_not_grow_with_the_positions():
    def temporary(positions):
        kernel, bias, features = (jax.ShapeDtypeStruct(shape, jnp.float32)
                                  for shape in ((64, 5000), (5000,), (1, positions, 64)))
        shapes = OutputLayer(kernel, bias), features
        def total(output, features):
            ids = jnp.zeros((1, positions), jnp.int32)
            return weighted_total(output, features, ids, ids + 1.0, 32)
        compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes
    assert temporary(2048) - temporary(512) < 4 * 1536 * 64 * 4  # of the features' size, not of the logits'
    assert temporary(2048) < 0.2 * 2048 * 5000 * 4


@pytest.mark.ci_slow
def test_a_sharded_batch_sums_the_output_gradient_once():
    """One reduction of the whole gradient after the loop, not one for every chunk."""
    done = run_python("""
        import re
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from bd3lm_jax.parallel import sharding
        from bd3lm_jax.core.schema import MeshConfig
        from bd3lm_jax.scoring.loss import OutputLayer, weighted_total

        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, P(None, "tensor"))
        draw = jax.random.normal(jax.random.key(0), (4, 24, 16))
        kernel = jax.random.normal(jax.random.key(1), (16, 64))
        ids, weight = jnp.arange(96).reshape(4, 24) % 64, jnp.ones((4, 24))

        def gradient(kernel, x, ids, weight):
            return jax.grad(lambda k: weighted_total(OutputLayer(k, jnp.zeros(64)), x, ids, weight, 6))(kernel)

        alone = jax.jit(gradient)(kernel, draw, ids, weight)
        with jax.set_mesh(mesh):
            placed = jax.device_put(kernel, whole), *(jax.device_put(x, rows) for x in (draw, ids, weight))
            step = jax.jit(gradient, out_shardings=whole).lower(*placed).compile()
            error = float(jnp.abs(step(*placed) - alone).max())
        reduced = re.findall(r"= f32\\[([0-9,]+)\\][^=]*? all-reduce\\(", step.as_text())
        sizes = [eval(shape.replace(",", "*")) for shape in reduced]
        print(error, sum(size >= 16 * 64 // 2 for size in sizes))
    """, devices=8)
    assert done.returncode == 0, done.stderr
    error, reductions = done.stdout.split()[-2:]
    assert float(error) < 1e-4 and int(reductions) == 1
