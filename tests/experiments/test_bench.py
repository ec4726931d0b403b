"""The `bench` function: schema of the result, files, and one-line errors for requests that cannot be met."""

import json
import sys

import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.experiments import bench as package
from bd3lm_jax.experiments.bench import bench, loss
from bd3lm_jax.experiments.bench.runner import FIELDS, Limit, row_of


def test_result_files_and_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss, "PAPER", loss.Case(vocab=64, width=8, positions=16))
    monkeypatch.setattr(loss, "LIMITS", (Limit("V=64", "chunked", "naive", "temp_mib", 1e-9),))
    result = bench("loss", 1, "", tmp_path / "new")
    assert set(result) == {"bench", "device", "versions", "rows"} and result["bench"] == "loss"
    assert set(result["versions"]) == {"jax", "jaxlib", "flax", "optax"}
    assert all(set(row) == {"case", "variant", "baseline", *FIELDS} for row in result["rows"])
    assert json.loads((tmp_path / "new" / "loss.json").read_text()) == result
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().err
    assert "masked_chunked" in said and "MISSED: chunked to naive: temp_mib" in said


def test_picture_shows_ratios_to_the_first_baseline():
    rows = [row_of("c", "a", "a", cpu_ratio=1.0, time_ratio=1.0, memory_ratio=1.0),
            row_of("c", "b", "a", cpu_ratio=0.5), row_of("c", "b", "other", cpu_ratio=7.0),
            row_of("c", "empty", "a", memory_ratio=0.0)]
    assert package._panels(rows) == {"CPU time": {("c", "a"): 1.0, ("c", "b"): 0.5},
                                     "temporary memory": {("c", "a"): 1.0}}


@pytest.mark.parametrize(("name", "rounds", "against", "message"), [
    ("stepp", 1, "", "unknown benchmark 'stepp': did you mean 'step'"),
    ("step", 0, "", "rounds is 0, expected at least 1"),
    ("step", 1, "torhc", "benchmark 'step' cannot run against 'torhc': known: torch"),
    ("loss", 1, "torch", "benchmark 'loss' cannot run against 'torch': leave --baseline out"),
])
def test_wrong_requests(tmp_path, name, rounds, against, message):
    with pytest.raises(UserError, match=message):
        bench(name, rounds, against, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pytorch_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"--baseline=torch needs a package that is missing: pip install 'bd3lm_jax\[b"):
        bench("step", 1, "torch", tmp_path)


def test_a_directory_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the directory --out=.*file: File exists"):
        bench("loss", 1, "", tmp_path / "file")
