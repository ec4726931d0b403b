import jax
import numpy as np
import pytest

from bd3lm_jax import bench as module
from bd3lm_jax.bench import Case, bench
from bd3lm_jax.errors import UserError

CASE = Case(layers=1, width=32, heads=2, batch=1, length=64, block_size=8, vocab=128)


@pytest.fixture(scope="module")
def result():
    original = module.STEP_CASES
    module.STEP_CASES = (CASE,)
    try:
        return bench("step", 1)
    finally:
        module.STEP_CASES = original


def test_rows(result):
    assert set(result) == {"bench", "device", "versions", "rows"}
    assert set(result["versions"]) == {"jax", "jaxlib", "flax", "optax"}
    rows = {row["variant"]: row for row in result["rows"]}
    assert set(rows) == {"ar", "two_stream", "published_structure"}
    for row in rows.values():
        assert set(row) == {"case", "variant", "baseline", "time_ratio", "cpu_ratio", "memory_ratio", "median_ms"}
        assert row["case"] == "1 x 32, B=1, L=64, S=8, V=128" and row["baseline"] == "ar"
        assert all(0 < row[key] < 1000 for key in ("time_ratio", "memory_ratio", "median_ms"))
    assert [rows["ar"][key] for key in ("time_ratio", "cpu_ratio", "memory_ratio")] == [1, 1, 1]
    assert rows["two_stream"]["memory_ratio"] < rows["published_structure"]["memory_ratio"]


def test_variants_of_one_model_have_the_same_loss():
    """The published structure computes the same function of the same noise: its first loss is that of two streams."""
    losses = []
    for function, arguments in (module._ours(CASE, module._masked(CASE)), module._published(CASE)):
        params, opt_state = arguments[0]
        draw = np.random.default_rng(0)
        params = jax.tree.map(lambda p: p + 0.2 * draw.normal(size=p.shape).astype(np.float32), params)
        losses.append(float(function((params, opt_state), *arguments[1:])[1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[0] - np.log(127)) > 0.1


@pytest.mark.parametrize(("name", "rounds", "message"), [
    ("stepp", 1, "unknown benchmark 'stepp': did you mean 'step'"), ("step", 0, "rounds is 0, expected at least 1")])
def test_wrong_requests(name, rounds, message):
    with pytest.raises(UserError, match=message):
        bench(name, rounds)
