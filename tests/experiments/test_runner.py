import types

import jax
import jax.numpy as jnp
import pytest

from bd3lm_jax.experiments.bench import runner
from bd3lm_jax.experiments.bench.runner import FIELDS, Limit, Variant, check_limits, compare, compiled


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a variant runs; CPU seconds are twice the others."""
    clock = types.SimpleNamespace(seconds=0.0, ran=[])
    fake = types.SimpleNamespace(perf_counter=lambda: clock.seconds, process_time=lambda: 2 * clock.seconds)
    monkeypatch.setattr(runner, "time", fake)
    return clock


def timed(clock, name: str, seconds: list[float], **fields) -> Variant:
    """A variant whose runs take these seconds, the first one before the clock."""
    left = iter(seconds)

    def run():
        clock.ran.append(name)
        clock.seconds += next(left)

    return Variant(name, run, **fields)


def test_variants_take_turns_and_rounds_are_paired(clock):
    slow = timed(clock, "slow", [99, 8, 2, 30])
    fast = timed(clock, "fast", [99, 4, 4, 10])
    rows = {row["variant"]: row for row in compare("case", [fast, slow], "fast", 3)}
    assert clock.ran == ["fast", "slow"] * 4
    assert rows["slow"]["time_ratio"] == rows["slow"]["cpu_ratio"] == 2  # the median of 2, 0.5 and 3
    assert (rows["slow"]["median_ms"], rows["slow"]["cpu_ms"]) == (8000, 16000)
    assert (rows["fast"]["time_ratio"], rows["fast"]["median_ms"]) == (1, 4000)


def test_a_row_has_every_field(clock):
    rows = compare("case", [timed(clock, "a", [1, 1]), Variant("b", None)], "a", 1)
    assert [set(row) for row in rows] == 2 * [{"case", "variant", "baseline", *FIELDS}]
    assert all(row["case"] == "case" and row["baseline"] == "a" for row in rows)
    assert all(rows[1][field] is None for field in FIELDS)


def test_parts_share_the_time_and_the_flops_but_not_the_memory(clock):
    whole = timed(clock, "whole", [1, 4], flops=10.0, temp_bytes=2**20)
    pair = timed(clock, "pair", [1, 6], flops=12.0, temp_bytes=2**21, parts=2)
    row = compare("case", [whole, pair], "whole", 1)[1]
    assert (row["time_ratio"], row["median_ms"], row["flops_ratio"]) == (0.75, 3000, 0.6)
    assert (row["memory_ratio"], row["temp_mib"]) == (2, 2)


def test_further_pairs(clock):
    variants = [timed(clock, name, [1, seconds]) for name, seconds in (("a", 8), ("b", 4), ("c", 1))]
    rows = compare("case", variants, "a", 1, pairs=[("c", "b")])
    assert [(row["variant"], row["baseline"], row["time_ratio"]) for row in rows] == [
        ("a", "a", 1), ("b", "a", 0.5), ("c", "a", 0.125), ("c", "b", 0.25)]


def test_utilisation_counts_what_is_needed(clock, monkeypatch):
    monkeypatch.setattr(runner.jax, "devices", lambda: [types.SimpleNamespace(device_kind="NVIDIA H200")])
    row, = compare("case", [timed(clock, "a", [1, 4], flops=1e18, flops_needed=1.978e15, parts=2)], "a", 1)
    assert row["mfu"] == pytest.approx(0.5)  # half of it in half the time, at 989 TFLOP/s


def test_what_does_not_fit_is_left_out(clock, capsys):
    def too_large():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    rows = compare("case", [timed(clock, "a", [1, 1]), Variant("big", too_large, temp_bytes=8)], "a", 1)
    assert (rows[1]["time_ratio"], rows[1]["median_ms"]) == (None, None)
    assert "big does not fit" in capsys.readouterr().err

    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compare("case", [Variant("broken", broken)], "broken", 1)


def test_compiled_carries_its_state():
    def step(state, amount):
        return state + amount, state.sum()

    variant = compiled("sum", step, (jnp.zeros(4), jnp.ones(4)), carries=True)
    assert [float(variant.run()[1]) for _ in range(3)] == [0, 4, 8]
    again = compiled("same", step, (jnp.zeros(4), jnp.ones(4)), carries=False)
    assert [float(again.run()[1]) for _ in range(2)] == [0, 0]


def test_compiled_counts_products_and_memory():
    def products(a, b):
        return jnp.sort(a @ b) @ b

    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 128))]
    variant = compiled("two products", products, abstract, carries=False)
    assert variant.run is None and variant.compile_s > 0
    assert variant.flops == 2 * 2 * 64 * 128 * 128
    assert variant.temp_bytes >= 64 * 128 * 4  # the product between the two


def test_judged():
    rows = [runner.row_of("L=8, S=2", "b", "a", time_ratio=1.0), runner.row_of("L=8, S=2", "b", "c", time_ratio=9.0),
            runner.row_of("L=9, S=2", "b", "a", time_ratio=3.0), runner.row_of("L=8, S=2", "b", "a")]
    result = check_limits(rows, [Limit("L=8", "b", "a", "time_ratio", 1.0), Limit("S=2", "b", "a", "time_ratio", 2.0)])
    assert [(row["time_ratio"], limit.value, met) for limit, row, met in result] == [
        (1.0, 1.0, True), (1.0, 2.0, True), (3.0, 2.0, False)]
