import jax
import numpy as np
import pytest

from bd3lm_jax.experiments.bench import loss
from bd3lm_jax.experiments.bench.runner import FIELDS

CASE = loss.Case(vocab=50, width=8, positions=24)


@pytest.mark.parametrize("name", ["naive", "chunked", "masked", "masked_chunked"])
def test_every_variant_is_the_weighted_cross_entropy_without_the_mask_token(name):
    arguments = loss.problem(CASE)
    output, features, target, weight = (np.asarray(x, np.float64) for x in (arguments[0].kernel_DxV, *arguments[1:]))
    p = np.exp(features @ output)[:, :-1]  # the mask token is the last id
    p /= p.sum(1, keepdims=True)
    target = target.astype(int)
    expected = -np.sum(weight * np.log(p[np.arange(len(p)), target]))
    d_logits = weight[:, None] * (p - np.eye(CASE.vocab - 1)[target])
    value, (d_output, d_features) = jax.value_and_grad(loss.losses(CASE)[name], argnums=(0, 1))(*arguments)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(d_output.kernel_DxV[:, :-1], features.T @ d_logits, atol=1e-4)
    np.testing.assert_allclose(d_features, d_logits @ output[:, :-1].T, atol=1e-4)


def test_half_of_the_tokens_are_masked():
    weight = loss.problem(CASE)[-1]
    assert (weight > 0).sum() == CASE.positions // 2


def test_rows():
    rows = {row["variant"]: row for row in loss.run_case(CASE, 1)}
    assert list(rows) == ["naive", "chunked", "masked", "masked_chunked"]
    for row in rows.values():
        assert set(row) == {"case", "variant", "baseline", *FIELDS} and row["baseline"] == "naive"
        assert row["time_ratio"] > 0 and row["median_ms"] > 0 and row["compile_s"] > 0
    assert rows["masked"]["flops_ratio"] == pytest.approx(0.5)
