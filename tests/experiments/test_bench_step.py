import jax
import numpy as np
import pytest

from bd3lm_jax.experiments.bench import step as module
from bd3lm_jax.experiments.bench.runner import FIELDS
from bd3lm_jax.experiments.bench.step import OBJECTIVES, STRUCTURES, Case, program

CASE = Case(layers=2, width=32, heads=2, batch=2, length=64, block_size=8, vocab=100)


def random_everywhere(state):
    """Training starts from zeros in many places, where variants could not differ."""
    draw = np.random.default_rng(0)
    return state.replace(params=jax.tree.map(lambda p: p + 0.2 * draw.normal(size=p.shape).astype(np.float32),
                                             state.params))


def first_step(name: str):
    """Loss of the first step of a variant, and how it changes the weights."""
    function, (state, batch) = program(name, CASE, remat="none", abstract=False)
    state = random_everywhere(state)
    after, metrics = jax.jit(function)(state, batch)
    return float(metrics["loss"]), jax.tree.map(lambda new, old: np.asarray(new - old), after.params, state.params)


@pytest.fixture(scope="module")
def two_stream():
    return first_step("two_stream")


@pytest.mark.ci_slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_other_structures_compute_the_same_step(name, two_stream):
    (loss, change), (expected, expected_change) = first_step(name), two_stream
    assert abs(expected - np.log(CASE.vocab - 1)) > 0.1
    assert loss == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(change), jax.tree.leaves(expected_change)):
        big = np.abs(theirs) > 0.9e-3  # the first update of Adam is +-lr wherever the gradient is not tiny
        assert big.any()
        np.testing.assert_allclose(ours[big], theirs[big], atol=1e-4)


def test_the_published_network_in_pytorch_has_the_same_loss(two_stream):
    torch_side = pytest.importorskip("bd3lm_jax.experiments.bench.torch_side", reason="PyTorch is not installed")
    config = module.config_of(CASE, "two_stream", remat="none")
    _, _, state, batch = module.setting(config, abstract=False)
    state, special = random_everywhere(state), module.SpecialIds(CASE.vocab - 1, 0)
    noised = module.noise(config, state, batch, special)
    variant = torch_side.published_step(state.params, config.model, CASE.block_size, config.optim,
                                        noised.xt_BxMxL[:, 0], batch["tokens"], noised.weight_BxMxL[:, 0], special.mask)
    losses = [float(variant.run()) for _ in range(5)]
    assert losses[0] == pytest.approx(two_stream[0], rel=1e-5)
    assert losses[-1] < losses[0]  # it trains


def test_variants_are_what_they_are_called():
    objectives = {name: (make(CASE), noise_samples) for name, (make, noise_samples) in OBJECTIVES.items()}
    assert objectives["ar"][0].causal and objectives["ar"][1] == 1
    assert {name: (objective.block_size, noise_samples) for name,
            (objective, noise_samples) in objectives.items() if name != "ar"} == {
        "mdlm": (64, 1), "two_stream": (8, 1), "two_stream_views2": (8, 2), "two_stream_split": (8, 1)}
    layers = {name: module.config_of(module.SMALL, name, "none").model.decoder_layers for name in OBJECTIVES}
    assert {name: n for name, n in layers.items() if n} == {"two_stream_split": 2}


@pytest.mark.ci_slow
def test_timed_rows(monkeypatch):
    chosen = {name: OBJECTIVES[name] for name in ("ar", "two_stream_views2")}
    monkeypatch.setattr(module, "OBJECTIVES", {**chosen, "two_stream": OBJECTIVES["two_stream"]})
    monkeypatch.setattr(module, "STRUCTURES", {})
    rows = {row["variant"]: row for row in module.timed(CASE, 1, "")}
    for row in rows.values():
        assert set(row) == {"case", "variant", "baseline", *FIELDS}
        assert (row["case"], row["baseline"]) == ("2 x 32, B=2, L=64, S=8, V=100", "ar")
        assert all(row[key] > 0 for key in ("time_ratio", "cpu_ratio", "memory_ratio", "median_ms", "flops_ratio"))
        assert row["mfu"] is None
    assert rows["ar"]["time_ratio"] == rows["ar"]["flops_ratio"] == 1
    assert rows["two_stream_views2"]["flops_ratio"] < rows["two_stream"]["flops_ratio"]


@pytest.mark.ci_slow
def test_counted_rows_are_not_run():
    case = Case(layers=2, width=64, heads=2, batch=1, length=256, block_size=8, vocab=512)
    rows = {row["variant"]: row for row in module.counted(case)}
    assert list(rows) == ["ar", "mdlm", "two_stream", "two_stream_views2", "two_stream_split", "two_pass",
                          "published_structure"]
    assert all(row["median_ms"] is row["memory_ratio"] is row["compile_s"] is None for row in rows.values())
    ratio = {name: row["flops_ratio"] for name, row in rows.items()}
    assert ratio["two_stream_split"] < ratio["two_stream"]
    assert ratio["ar"] == 1 < ratio["two_stream_views2"] < ratio["two_stream"] < ratio["published_structure"]


def test_published_structure_counts_by_hand():
    """Matrix products of one pass over 2L tokens: 12 D^2 weights a layer, all pairs, the output layer on all."""
    case = Case(layers=2, width=64, heads=2, batch=1, length=256, block_size=8, vocab=512)
    tokens, width = 2 * case.length, case.width
    layers = case.layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    adaln = 2 * 128 * (256 + 128) + case.layers * 2 * 128 * 6 * width + 2 * 128 * 2 * width
    expected = 3 * (layers + 2 * tokens * width * case.vocab + adaln)
    function, arguments = program("published_structure", case, remat="none", abstract=True)
    assert module.products(function, *arguments) == pytest.approx(expected, rel=1e-3)


@pytest.mark.ci_slow
def test_compiled_only():
    rows = {row["variant"]: row for row in module.compiled_only(CASE)}
    assert list(rows) == ["two_stream", "published_structure"]
    assert all(row["median_ms"] is None and row["compile_s"] > 0 for row in rows.values())
    assert rows["two_stream"]["memory_ratio"] < 1 == rows["published_structure"]["memory_ratio"]
