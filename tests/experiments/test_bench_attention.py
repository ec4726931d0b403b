import jax
import numpy as np
import pytest
from grids import some

from bd3lm_jax.experiments.bench import attention as module
from bd3lm_jax.experiments.bench.attention import Case, dense_mask, flat, growth, needed_flops, problem, run_case
from bd3lm_jax.experiments.bench.runner import FIELDS, row_of

CASE = Case(heads=2, length=32, block_size=4)


def two_stream_mask(length: int, size: int) -> np.ndarray:
    """Written out: `length` noised tokens, then the clean ones without their last block."""
    tokens = [("noised", i // size) for i in range(length)] + [("clean", i // size) for i in range(length - size)]
    seen = {("noised", "noised"): lambda q, k: q == k, ("noised", "clean"): lambda q, k: k < q,
            ("clean", "clean"): lambda q, k: k <= q, ("clean", "noised"): lambda q, k: False}
    return np.array([[seen[q[0], k[0]](q[1], k[1]) for k in tokens] for q in tokens])


def attention_gradients(q, k, v, d_out, mask):
    """dq, dk, dv of masked softmax attention, `[B, N, H, Dh]`, by hand."""
    scale = q.shape[-1] ** -0.5
    scores = np.where(mask, np.einsum("bqhd,bkhd->bhqk", q, k) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bqhd,bkhd->bhqk", d_out, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    return (np.einsum("bhqk,bkhd->bqhd", ds, k), np.einsum("bhqk,bqhd->bkhd", ds, q),
            np.einsum("bhqk,bqhd->bkhd", p, d_out))


@pytest.fixture(scope="module")
def expected():
    arrays = [x.astype(np.float64) for x in flat(*problem(CASE)[1:])]
    return attention_gradients(*arrays, two_stream_mask(CASE.length, CASE.block_size))


def test_the_mask_and_what_it_needs():
    mask = two_stream_mask(CASE.length, CASE.block_size)
    np.testing.assert_array_equal(dense_mask(problem(CASE)[0]), mask)
    assert needed_flops(CASE) == 3 * 4 * mask.sum() * CASE.heads * 64


@pytest.mark.parametrize("backend", some(["dense", "blocked"], 1))
def test_variants_compute_the_gradients(backend, expected):
    spec, qkv, cotangents = problem(CASE)
    noised, clean = module.backend_variant("name", backend, CASE, spec, qkv, cotangents).run()
    for ours, *theirs in zip(expected, noised, clean):
        np.testing.assert_allclose(np.concatenate([theirs[0][:, 0], theirs[1]], axis=1), ours, atol=1e-5)


def test_pytorch_computes_the_gradients(expected):
    torch_side = pytest.importorskip("bd3lm_jax.experiments.bench.torch_side", reason="PyTorch is not installed")
    spec, qkv, cotangents = problem(CASE)
    variants = torch_side.attention_variants(*flat(qkv, cotangents), dense_mask(spec), CASE.length, CASE.block_size,
                                             flops=7.0)
    assert variants[0].name == "torch_sdpa" and variants[0].flops == 7.0
    for ours, theirs in zip(expected, variants[0].run()):
        np.testing.assert_allclose(theirs.transpose(1, 2).numpy(), ours, atol=1e-5)


def test_the_mask_of_flex_attention():
    torch_side = pytest.importorskip("bd3lm_jax.experiments.bench.torch_side", reason="PyTorch is not installed")
    index = torch_side.torch.arange(2 * 32 - 4)
    mask = torch_side.two_stream_mask(32, 4)(None, None, index[:, None], index[None])
    np.testing.assert_array_equal(mask.numpy(), two_stream_mask(32, 4))


def test_rows():
    rows = run_case(CASE, 1, "", interpret=False)
    assert [row["variant"] for row in rows] == ["dense", "blocked"]
    for row in rows:
        assert set(row) == {"case", "variant", "baseline", *FIELDS} and row["baseline"] == "dense"
        assert row["time_ratio"] > 0 and row["memory_ratio"] > 0 and row["flops_ratio"] > 0
    pairs = (2 * CASE.length - CASE.block_size) ** 2  # the dense mask computes all of them, 6 products each
    assert module.backend_variant("name", "dense", CASE, *problem(CASE)).flops == 6 * 2 * pairs * CASE.heads * 64


def test_a_backend_that_cannot_run_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(module, "attend", _without(module.attend, "splash"))
    assert [row["variant"] for row in run_case(CASE, 1, "", interpret=False)] == ["dense", "blocked"]
    assert "splash left out: no such kernel here" in capsys.readouterr().err


def _without(attend, missing: str):
    def call(backend, *args):
        if backend == missing:
            raise module.UserError("no such kernel here")
        return attend(backend, *args)
    return call


def test_growth_is_over_that_of_the_formula():
    short, long = Case(3, 64, 16), Case(3, 256, 16)
    rows = [row_of(str(case), name, baseline, median_ms=ms, cpu_ms=2 * ms, temp_mib=mib)
            for case, name, baseline, ms, mib in (
                (short, "blocked", "dense", 5.0, 4.0), (long, "blocked", "dense", 68.0, 16.0),
                (long, "blocked", "torch_sdpa", 9.0, 9.0), (short, "other", "dense", 1.0, 1.0))]
    row, = growth(short, long, rows)
    assert (row["case"], row["variant"], row["baseline"]) == ("growth L=64 -> 256, S=16", "blocked", "L^2 + L S")
    expected = (256 * 272) / (64 * 80)  # 13.6 = 68 / 5
    assert row["time_ratio"] == row["cpu_ratio"] == pytest.approx(68 / 5 / expected) == pytest.approx(1)
    assert row["memory_ratio"] == pytest.approx(4 / expected)
    assert row["median_ms"] is None
