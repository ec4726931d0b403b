"""Evaluation against its forward passes, at toy size: both variants run and do the same work."""

from bd3lm_jax.experiments.bench import evaluate
from bd3lm_jax.experiments.bench.runner import FIELDS
from bd3lm_jax.experiments.bench.step import Case


def test_both_variants():
    rows = evaluate.run_case(Case(layers=1, width=32, heads=2, batch=2, length=32, block_size=4, vocab=300), 1)
    assert [row["variant"] for row in rows] == ["forward", "evaluate"]
    assert all(set(row) == {"case", "variant", "baseline", *FIELDS} and row["time_ratio"] > 0 for row in rows)
