"""`train` in the directory of a run that is finished: its stored report, at once, if it is the one that is wanted."""

import json
from types import SimpleNamespace

import pytest
from toy_runs import toy_config, write_text

from bd3lm_jax.training import report
from bd3lm_jax.training.train import train


def same(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("wall_s", "step_ms", "tokens_per_s")}


@pytest.mark.ci_slow
def test_its_stored_report_at_once_or_again_where_other_settings_are_wanted(tmp_path, monkeypatch, capsys):
    write_text(tmp_path / "text.txt", 100)
    changes = {"train.steps": 2, "eval.num_samples": 1}
    first = train(toy_config(tmp_path, changes), tmp_path / "run")
    stored = (tmp_path / "run" / report.REPORT).read_bytes()
    capsys.readouterr()

    closings = []
    monkeypatch.setattr(report, "write_report", lambda *run: closings.append(run))
    again = train(toy_config(tmp_path, changes), tmp_path / "run")
    shown = capsys.readouterr().err
    assert same(again) == same(first) and not closings
    assert "is finished, step 2: valid nll" in shown and f"Delete {tmp_path / 'run' / report.REPORT} to make" in shown

    def repeats(**other) -> bool:
        closings.clear()
        train(toy_config(tmp_path, changes | other), tmp_path / "run")
        return bool(closings)

    assert not repeats(**{"log.every": 5, "data.workers": 2})  # decides nothing of a report
    assert repeats(**{"eval.mc_samples": 3}), "more draws are another report"
    foreign = json.loads(stored)
    foreign["settings"]["config_sha256"] = "0" * 64
    (tmp_path / "run" / report.REPORT).write_text(json.dumps(foreign))
    assert repeats(), "a report that was copied here is none of this run"
    del foreign["settings"]
    (tmp_path / "run" / report.REPORT).write_text(json.dumps(foreign))
    assert repeats(), "one of an earlier version does not say what it is of"
    (tmp_path / "run" / report.REPORT).write_text("{")
    assert repeats(), "a damaged one is made again"
    (tmp_path / "run" / report.REPORT).write_bytes(stored)
    assert not repeats()
    assert train(toy_config(tmp_path, changes | {"train.steps": 3}), tmp_path / "run")["step"] == 3


def test_what_belongs_to_a_finished_run_must_be_there(tmp_path):
    """A run without the figures by document is compared with nothing. (That of a damaged checkpoint: test_train.py.)"""
    config = toy_config(tmp_path, {"train.steps": 2})
    path = tmp_path / "run"
    path.mkdir()
    (path / "documents.npz").write_bytes(b"")
    (path / report.REPORT).write_text(json.dumps({"step": 2, "valid": {"nll": 1.0, "bits_per_byte": 2.0},
                                                  "settings": report._settings(config)}))
    run = SimpleNamespace(config=config, workdir=path)
    assert report.read_finished_report(run)["valid"]["nll"] == 1.0
    (path / "documents.npz").unlink()
    assert report.read_finished_report(run) is None
