import json

import pytest

from bd3lm_jax import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def test_loss_curve_draws_every_logged_key(tmp_path, drawn):
    lines = [{"step": 10, "train/loss": 3.0, "train/nll": 4.0}, {"step": 20, "train/loss": 2.0, "valid/nll": 3.5},
             {"step": 30, "train/loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = plots.loss_curve(tmp_path)
    assert path == tmp_path / "plots" / "loss.png" and path.read_bytes().startswith(PNG)
    curves = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert curves == {"training loss": [[10, 3.0], [20, 2.0]], "training NLL": [[10, 4.0]],
                      "validation NLL": [[20, 3.5]]}


def test_loss_curve_of_a_run_without_metrics(tmp_path, drawn):
    assert plots.loss_curve(tmp_path).exists()
    assert not drawn[0].axes[0].lines


def test_nll_by_count(tmp_path, drawn):
    path = plots.nll_by_count(tmp_path / "deep" / "k.png", [1, 2, 3], [1.0, 1.5, 1.75])
    assert path.read_bytes().startswith(PNG)
    assert drawn[0].axes[0].lines[0].get_xydata().tolist() == [[1, 1.0], [2, 1.5], [3, 1.75]]
