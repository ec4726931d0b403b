import pytest

from bd3lm_jax.experiments.bench import data
from bd3lm_jax.experiments.bench.runner import FIELDS


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {'x' * (i % 20)}\n" for i in range(300)))
    return data.run_case(data.Case(batch=4, length=32, batches=3, block_size=8, tokenizer="bytes", path=str(path)), 1)


def test_every_half_and_layout(rows):
    assert [(row["case"].split(" ")[0], row["case"][-4:], row["variant"]) for row in rows] == [
        (half, layout, variant) for layout in ("wrap", "pack")
        for half, variants in (("preparing", ("tokenizer", "prepare")), ("reading", ("memory", "loader")))
        for variant in variants]
    for row in rows:
        assert set(row) == {"case", "variant", "baseline", *FIELDS, "rows_per_s", "tokens_per_s"}
        assert row["memory_ratio"] is None and row["time_ratio"] > 0


def test_rates(rows):
    documents = [f"line {'x' * (i % 20)}\n" for i in range(297)]  # the last 1 % is held out
    tokens = sum(map(len, documents))
    for row in rows:
        seconds = row["median_ms"] / 1e3
        if row["case"].startswith("reading"):
            done = 3 * 4, 3 * 4 * 32
        else:
            assert f"{tokens:,} tokens" in row["case"]
            done = None if "pack" in row["case"] else -(-tokens // 32), tokens
        if done[0] is not None:
            assert row["rows_per_s"] * seconds == pytest.approx(done[0])
        assert row["tokens_per_s"] * seconds == pytest.approx(done[1])
