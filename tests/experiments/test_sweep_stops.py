"""What a sweep starts again, what it gives up and how it compares its runs, with a stand-in for training."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from test_sweep import Stage
from toy_runs import environment, toy_dict, write_text

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.experiments.sweeps import pool, sweep
from bd3lm_jax.experiments.sweeps.early_stopping import StoppingRule
from bd3lm_jax.likelihood import paired

LONG = 400  # steps of the run that is killed


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "POLL_S", 0.02)
    monkeypatch.setattr(sweep, "WATCH_S", 0.0)
    return Stage(tmp_path)


def outcome(result) -> list[tuple]:
    return [(run["status"], run["retries"]) for run in result["runs"]]


def test_what_was_preempted_stuck_or_killed_is_started_again(stage, capsys):
    stage.overrides += [{"optim.lr": 0.2}, {"optim.lr": 0.3}]
    stage.orders = {"1.0": "once 42", "2.0": "once killed", "3.0": "preempted", "4.0": "fail", "5.0": "once 75"}
    result = stage.sweep(retries=2, parallel=2)
    assert outcome(result) == [("finished", 1), ("finished", 1), ("stopped", 2), ("failed", 0), ("finished", 1)]
    assert stage.calls() == [1.0] * 2 + [2.0] * 2 + [3.0] * 3 + [4.0] + [5.0] * 2 and not result["ok"]
    told = capsys.readouterr().err
    assert "optim.lr=0.001: stopped: once; starting it again (1 of 2 retries)" in told
    assert "optim.lr=0.1: stopped: saved at step 2; starting it again (2 of 2 retries)" in told
    again = stage.sweep(retries=1)  # a call of its own has retries of its own
    assert stage.calls() == [3.0] * 2 + [4.0] and outcome(again)[2:4] == [("stopped", 3), ("failed", 0)]


@pytest.mark.parametrize("index", [None, 2])
def test_a_hopeless_run_is_given_up_and_goes_on_when_asked_without(stage, capsys, index):
    """Bits per byte are 0.5, 1 and 1.5; the third run is behind the first by 1 at half of its steps."""
    rule = StoppingRule(margin=0.6, after=0.5)
    stage.orders = {"3.0": "lag"}
    if index is not None:
        stage.sweep(index=0)
        stage.sweep(index=1)
    result = stage.sweep(give_up=rule, index=index, retries=2)
    assert stage.status() == ["finished", "finished", "given up"] and result["ok"]
    reason = "1.5000 bits per byte at step 3, 1.0000 behind optim.lr=0.001; allowed: 0.6"
    assert result["runs"][2]["error"] == reason and stage.calls()[-1] == 3.0
    assert f"optim.lr=0.1: told to stop: {reason}" in capsys.readouterr().err
    assert "| 2 | 0.1 |  |  |  |  | given up |" in (stage.workdir / "table.md").read_text()
    assert [run["status"] for run in stage.sweep(dry_run=True)["runs"]] == ["finished", "finished", "given up"]
    assert stage.sweep(give_up=rule)["ok"] and stage.calls() == []  # it would be hopeless again
    stage.orders = {}
    assert stage.sweep(give_up=StoppingRule(margin=1.1, after=0.5), index=2)["ok"] and stage.calls() == [3.0]
    assert stage.status() == ["finished"] * 3


def test_a_given_up_run_goes_on_without_the_rule(stage):
    stage.orders = {"2.0": "lag"}
    stage.sweep(give_up=StoppingRule(margin=0.1, after=0.0), index=0)
    assert stage.sweep(give_up=StoppingRule(margin=0.1, after=0.0), index=1)["runs"][1]["status"] == "given up"
    stage.orders = {}
    assert stage.sweep()["ok"] and stage.calls() == [2.0, 3.0]


def test_only_runs_of_equal_training_are_held_against_each_other(stage):
    stage.overrides = [{"train.batch_size": 16}, {"train.steps": 12}, {}]
    # the report of the second has step 6
    assert stage.sweep(give_up=StoppingRule(margin=0.1, after=0.0))["ok"] is False
    assert [run["status"] for run in stage.sweep(dry_run=True)["runs"]] == ["finished", "failed", "finished"]


A = {"a": {2: 1.0, 4: 0.9, 6: 0.8}, "b": {2: 1.2, 4: 0.7}}


@pytest.mark.parametrize(("margin", "after", "ours", "others", "reason"), [
    (0.5, 0.0, {}, A, None),
    (0.5, 0.0, {2: 9.0}, {}, None),
    (0.5, 0.0, {2: 9.0}, {"a": {}}, None),
    (0.5, 0.0, {2: 1.5}, A, None),  # as far as is allowed
    (0.4, 0.0, {2: 1.5}, A, "1.5000 bits per byte at step 2, 0.5000 behind a; allowed: 0.4"),
    (0.4, 0.5, {2: 1.5}, A, None),  # too early to tell
    (0.4, 0.2, {2: 1.5}, A, "1.5000 bits per byte at step 2, 0.5000 behind a; allowed: 0.4"),
    (0.4, 0.0, {2: 9.0, 4: 1.0}, A, None),  # it has caught up
    (0.4, 0.0, {2: 1.0, 4: 1.2}, A, "1.2000 bits per byte at step 4, 0.5000 behind b; allowed: 0.4"),
    (0.4, 0.0, {6: 1.25, 8: 1.2}, A, "1.2500 bits per byte at step 6, 0.4500 behind a; allowed: 0.4"),
    (0.4, 0.0, {3: 9.0}, A, None),  # no other was validated there
    (0.4, 0.0, {2: np.inf}, A, "inf bits per byte at step 2, inf behind a; allowed: 0.4"),
    (0.4, 0.0, {2: np.inf}, {"a": {2: np.inf}}, None),
    (0.4, 0.0, {2: -5.0}, A, None),
])
def test_verdicts_worked_out_by_hand(margin, after, ours, others, reason):
    assert StoppingRule(margin, after).verdict(10, ours, others) == reason


class Found:
    """Stands for evaluate.Measured and data.prepare.Rows."""

    def __init__(self, documents_UxN, tokens_N, text=(1, 2)):
        self.documents_UxN, self.tokens_N = np.array(documents_UxN, float), np.array(tokens_N, float)
        self.text = text

    def stream(self):
        return np.array(self.text, np.int32)


def test_differences_are_those_of_a_paired_t_test(tmp_path):
    """Documents of equal length; one that nothing scored counts for nothing."""
    from scipy.stats import ttest_rel

    draw = np.random.default_rng(0)
    tokens_N = np.append(np.full(30, 8.0), 0)
    sides = []
    for name, shift in (("a", 0.0), ("b", 0.7)):
        nats_UxN = draw.normal(20 + shift, 3, size=(4, 31)) * (tokens_N > 0)
        (tmp_path / name).mkdir()
        paired.save(tmp_path / name, Found(nats_UxN, tokens_N), Found([], []))
        sides.append(nats_UxN.mean(0)[:30])
    first, second = (paired.read(tmp_path / name) for name in "ab")
    expected = ttest_rel(sides[1], sides[0])
    low, high = expected.confidence_interval()
    np.testing.assert_allclose(paired.difference(second, first),
                               np.array([np.mean(sides[1] - sides[0]), low, high]) / 8, rtol=1e-9)
    assert paired.read(tmp_path) is None
    for other in (Found(np.ones((1, 31)), tokens_N, text=(1, 3)), Found(np.ones((1, 31)), np.ones(31))):
        paired.save(tmp_path, other, other)
        assert paired.difference(first, paired.read(tmp_path)) is None


@pytest.mark.parametrize(("baseline", "number", "signs"), [(0, 0, "++"), (2, 2, "--"), ("best", 0, "++")])
def test_the_table_compares_with_the_baseline(stage, baseline, number, signs):
    """Run i has i + 1 nats a token more in each of 40 documents of 3 or 5 tokens, and noise that cancels."""
    stage.sweep()
    tokens_N = np.resize([3.0, 5.0], 40)
    noise_N = np.random.default_rng(0).normal(size=40)
    for i, changes in enumerate(stage.overrides):
        nats_N = (i + 1) * tokens_N + noise_N
        paired.save(stage.workdir / sweep.run_name(changes), Found([nats_N], tokens_N), Found([], []))
    runs = stage.sweep(baseline=baseline)["runs"]
    for i, run in enumerate(runs):
        expected = None if i == number else pytest.approx(i - number)
        assert run["difference"] == expected
        assert run["difference_ci95"] == (None if i == number else [expected, expected])
    lines = (stage.workdir / "table.md").read_text().splitlines()
    assert f"| 95 % interval | less run {number} | perplexity |" in lines[0]
    cells = [line.split("|")[5].strip() for line in lines[2:5]]
    assert cells[number] == "" and "".join(cell[0] for cell in cells if cell) == signs
    assert cells[1] == {0: "+1.0000 ± 0.0000", 2: "-1.0000 ± 0.0000"}[number]


def test_a_baseline_that_is_not_there(stage):
    stage.orders = {"1.0": "fail"}
    assert {run["difference"] for run in stage.sweep(baseline=0)["runs"]} == {None}
    with pytest.raises(UserError, match="baseline is 3, the sweep has runs 0 to 2"):
        stage.sweep(baseline=3)
    with pytest.raises(UserError, match="retries is -1, expected at least 0"):
        stage.sweep(retries=-1)


def test_a_disk_that_is_full(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*documents.npz: .*; free some disk space"):
        paired.save(tmp_path / "gone", Found([[1.0]], [1.0]), Found([], []))


@pytest.mark.ci_slow
def test_six_real_runs_with_one_killed_half_way(tmp_path):
    """The second call goes on where the killed one had saved, completes, and shows what `eval --baseline` finds."""
    write_text(tmp_path / "text.txt", 100)
    (tmp_path / "toy.py").write_text(textwrap.dedent(f"""
        import os
        from toy_runs import slow_down

        if "SLOWLY" in os.environ:
            slow_down(0.05)

        def get_config():
            return {toy_dict(tmp_path, {"checkpoint.every": 20, "eval.mc_samples": 2})!r}

        def sweep():
            for lr in (1e-2, 3e-3, 1e-3):
                for seed in (0, 1):
                    longer = {{"train.steps": {LONG}}} if (lr, seed) == (1e-2, 1) else {{}}
                    yield {{"optim.lr": lr, "seed": seed}} | longer
    """))
    command = [sys.executable, "-m", "launch", "sweep", f"--config={tmp_path}/toy.py", f"--workdir={tmp_path}/sweep",
               "--parallel=2", "--retries=0"]
    settings = {"text": True, "env": environment() | {"COLUMNS": "200"}, "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE}
    victim = tmp_path / "sweep" / f"optim.lr=0.01+seed=1+train.steps={LONG}"
    first = subprocess.Popen(command, **settings | {"env": settings["env"] | {"SLOWLY": "1"}})
    while max((int(path.name) for path in (victim / "checkpoints").glob("*") if path.name.isdecimal()), default=0) < 40:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.02)
    os.kill(process_of(f"--workdir={victim}"), signal.SIGKILL)
    said, told = first.communicate(timeout=900)
    runs = json.loads(said)["runs"]
    assert first.returncode == 1 and [run["status"] for run in runs] == ["finished", "failed"] + ["finished"] * 4, told
    assert runs[1]["error"].startswith("killed by SIGKILL")
    steps = [line["step"] for line in read_metrics(victim)]
    second = subprocess.run(command, timeout=900, **settings)
    assert second.returncode == 0, second.stderr
    runs = json.loads(second.stdout)["runs"]
    assert [run["status"] for run in runs] == ["finished"] * 6 and 20 <= max(steps) < LONG
    assert "continuing from step" in (tmp_path / "sweep" / "logs" / f"{victim.name}.log").read_text()
    assert [line["step"] for line in read_metrics(victim)] == list(range(1, LONG + 1))
    table = [line for line in (tmp_path / "sweep" / "table.md").read_text().splitlines() if line.endswith("finished |")]
    assert len(table) == 6 and all(f"{run['valid_nll']:.4f}" in line and f"{run['valid_nll']:.4f}" in second.stderr
                                   for run, line in zip(runs, table))
    told = subprocess.run([sys.executable, "-m", "launch", "eval", f"--workdir={runs[2]['workdir']}", "--split=valid",
                           f"--baseline={runs[0]['workdir']}", "--mc_samples=2"], timeout=300, **settings)
    against = json.loads(told.stdout.splitlines()[-1])["against"]
    assert runs[2]["difference"] == pytest.approx(against["difference"], abs=1e-6)
    for ours, theirs in zip(runs[2]["difference_ci95"], against["difference_ci95"]):  # errors of draws by other means
        assert ours - runs[2]["difference"] == pytest.approx(theirs - against["difference"], rel=0.3)


def process_of(argument: str) -> int:
    """The process id of the training that has this argument."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if argument in words and "train" in words:
                return int(path.parent.name)
    raise AssertionError(f"no training with {argument}")
