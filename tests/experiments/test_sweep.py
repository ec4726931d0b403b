"""Sweeps with a stand-in for the training command: what is run, skipped, resumed, listed and written."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from toy_runs import environment, toy_config, toy_dict, write_text

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core import plots
from bd3lm_jax.core.checksummed import verify_checksum
from bd3lm_jax.core.errors import Preempted, RunError, UserError
from bd3lm_jax.data.tokenizers import ByteTokenizer
from bd3lm_jax.experiments.sweeps import pool
from bd3lm_jax.experiments.sweeps.pool import is_running
from bd3lm_jax.experiments.sweeps.sweep import Point, run_name, sweep
from bd3lm_jax.training import report

USUAL = {"parallel": 1, "index": None, "dry_run": False, "retries": 0, "give_up": None, "baseline": 0}
TRAINER = """
    import json, os, pathlib, signal, sys, time
    stage, nll, workdir = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3].removeprefix("--workdir=")
    order = json.loads((stage / "orders.json").read_text()).get(str(nll), "")
    with open(stage / "calls.txt", "a") as calls:
        print(nll, file=calls)
    words = order.split()
    if words[:1] == ["once"] and (stage / "calls.txt").read_text().split().count(str(nll)) == 1:
        print("error: once")
        sys.stdout.flush()
        signal.raise_signal(signal.SIGKILL) if words[1] == "killed" else sys.exit(int(words[1]))
    path = pathlib.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    steps = 3 if order == "lag" else 6
    (path / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "valid/bits_per_byte": nll / 2}) + "\\n" for step in range(1, steps + 1)))
    if order == "fail":
        print("error: the loss of step 3 is not finite\\nbye")
        sys.exit(1)
    if order == "crash":
        signal.raise_signal(signal.SIGKILL)
    if order == "preempted":
        print("error: saved at step 2")
        sys.exit(42)
    if order == "silent":
        sys.exit(0)
    if order in ("hang", "lag"):
        signal.signal(signal.SIGTERM, lambda *_: (print("error: saved at step 1"), sys.exit(42)))
        (stage / "pid.txt").write_text(str(os.getpid()))
        time.sleep(60)
    valid = {"nll": nll, "nll_ci95": [nll - 0.1, nll + 0.2], "ppl": 2 * nll, "bits_per_byte": nll / 2}
    (path / "report.json").write_text(json.dumps({"step": 6, "valid": valid}))
"""


class Stage:
    """A sweep of the learning rate with a stand-in for training: run i has NLL i + 1; `orders` by NLL say otherwise."""

    def __init__(self, directory):
        self.directory, self.workdir = directory, directory / "sweeps" / "toy"
        self.overrides = [{"optim.lr": lr} for lr in (0.001, 0.01, 0.1)]
        self.orders = {}
        (directory / "trainer.py").write_text(textwrap.dedent(TRAINER))

    @property
    def points(self):
        command = (sys.executable, str(self.directory / "trainer.py"), str(self.directory))
        return [Point(changes, toy_config(self.directory, changes), (*command, f"{i + 1:.1f}"))
                for i, changes in enumerate(self.overrides)]

    def sweep(self, **settings):
        (self.directory / "orders.json").write_text(json.dumps(self.orders))
        (self.directory / "calls.txt").write_text("")
        return sweep(self.points, str(self.workdir), **USUAL | settings)

    def calls(self):
        return sorted(map(float, (self.directory / "calls.txt").read_text().split()))

    def hanging(self):
        """Waits until a run hangs; its process id."""
        path, deadline = self.directory / "pid.txt", time.monotonic() + 120
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline, "no run began"
            time.sleep(0.02)
        return int(path.read_text())

    def status(self):
        return [run["status"] for run in json.loads((self.workdir / "status.json").read_text())["runs"]]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "POLL_S", 0.02)
    return Stage(tmp_path)


def test_all_runs_are_trained_and_their_table_written(stage):
    result = stage.sweep()
    assert stage.calls() == [1.0, 2.0, 3.0]
    assert (result["sweep"], result["ok"], list(result["runs"][0])) == ("toy", True, [
        "name", "status", "overrides", "step", "valid_nll", "nll_ci95", "valid_ppl", "bits_per_byte",
        "bits_per_byte_comparable", "workdir", "log", "error", "retries", "difference", "difference_ci95"])
    second = result["runs"][1]
    assert [second[key] for key in ("name", "overrides", "valid_nll", "nll_ci95", "step")] == [
        "optim.lr=0.01", {"optim.lr": 0.01}, 2.0, [1.9, 2.2], 6]
    assert verify_checksum((stage.workdir / "status.json").read_bytes()) == json.loads(json.dumps(result))
    with open(stage.workdir / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[2] == {"run": "2", "name": "optim.lr=0.1", "optim.lr": "0.1", "valid_nll": "3.0",
                       "valid_ppl": "6.0", "bits_per_byte": "1.5", "step": "6", "status": "finished", "low": "2.9",
                       "high": "3.2", "difference": "", "difference_low": "", "difference_high": ""}
    lines = (stage.workdir / "table.md").read_text().splitlines()
    assert lines[0] == "| run | lr | nats/token | 95 % interval | perplexity | bits/byte | status |"
    assert lines[1] == "|" + " --- |" * 7
    assert lines[2] == "| 0 | 0.001 | 1.0000 | 0.9000 .. 1.2000 | 2.00 | 0.5000 | finished |"
    assert (stage.workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in stage.workdir.iterdir() if "=" not in path.name}
    assert names == {"logs", "status.json", "table.csv", "table.md", "sweep.png"}


def test_finished_runs_are_skipped_and_repeat_their_result(stage):
    first = stage.sweep()
    assert stage.sweep() == first and stage.calls() == []
    stage.overrides.append({"optim.lr": 0.5})  # one more point leaves the others as they are
    assert stage.sweep()["runs"][:3] == first["runs"] and stage.calls() == [4.0]


def test_more_steps_go_on_with_finished_runs(stage):
    stage.sweep()
    report_path = stage.workdir / "optim.lr=0.01" / "report.json"
    told = json.loads(report_path.read_text())
    report_path.write_text(json.dumps(told | {"step": 3}))
    assert [run["status"] for run in stage.sweep(dry_run=True)["runs"]] == ["finished", "waiting", "finished"]
    stage.sweep()
    assert stage.calls() == [2.0]


def test_failures_are_listed_and_do_not_stop_the_others(stage, capsys):
    stage.overrides += [{"optim.lr": 0.2}, {"optim.lr": 0.3}]
    stage.orders = {"1.0": "fail", "2.0": "crash", "3.0": "silent", "4.0": "preempted"}
    result = stage.sweep(parallel=2)
    assert stage.calls() == [1.0, 2.0, 3.0, 4.0, 5.0] and not result["ok"]
    assert [(run["status"], run["error"]) for run in result["runs"]] == [
        ("failed", "the loss of step 3 is not finite"), ("failed", "killed by SIGKILL: it wrote nothing"),
        ("failed", "exit code 0, but its directory holds no report.json: it wrote nothing"),
        ("stopped", "saved at step 2"), ("finished", None)]
    assert "optim.lr=0.001: failed: the loss of step 3 is not finite" in capsys.readouterr().err
    assert "| 0 | 0.001 |  |  |  |  | failed |" in (stage.workdir / "table.md").read_text()
    stage.orders = {}
    assert stage.sweep()["ok"] and stage.calls() == [1.0, 2.0, 3.0, 4.0]


def test_dry_run_lists_and_writes_nothing(stage, capsys):
    result = stage.sweep(dry_run=True)
    assert [run["status"] for run in result["runs"]] == ["waiting"] * 3 and result["ok"]
    assert stage.calls() == [] and not stage.workdir.exists()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("2  waiting") and lines[-1].endswith(f" 3.0 --workdir={stage.workdir}/optim.lr=0.1")
    stage.sweep(index=1)
    assert [run["status"] for run in stage.sweep(dry_run=True)["runs"]] == ["waiting", "finished", "waiting"]


def test_index_trains_one_and_keeps_what_others_did(stage):
    stage.orders = {"1.0": "fail"}
    assert not stage.sweep(index=0)["ok"]
    result = stage.sweep(index=2)
    assert stage.calls() == [3.0] and result["ok"]
    assert stage.status() == ["failed", "waiting", "finished"]
    assert result["runs"][0]["error"] == "the loss of step 3 is not finite"
    with pytest.raises(UserError, match="index is 3, the sweep has runs 0 to 2"):
        stage.sweep(index=3)
    with pytest.raises(UserError, match="parallel is 0, expected at least 1"):
        stage.sweep(parallel=0)


def test_array_jobs_at_the_same_time_lose_nothing(stage):
    threads = [threading.Thread(target=sweep, args=(stage.points, str(stage.workdir)),
                                kwargs=USUAL | {"index": i}) for i in range(3)]
    (stage.directory / "orders.json").write_text("{}")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stage.status() == ["finished"] * 3 and stage.calls() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("number", "error", "message"), [
    (signal.SIGTERM, Preempted, "stopped by SIGTERM; .*run the same command again"),
    (signal.SIGINT, KeyboardInterrupt, None),
])
def test_signals_let_runs_save_and_the_next_call_goes_on(stage, number, error, message):
    stage.orders = {"2.0": "hang"}

    def interrupt():
        stage.hanging()
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(error, match=message):
        stage.sweep(retries=3)
    thread.join()
    assert stage.status() == ["finished", "stopped", "waiting"] and stage.calls() == [1.0, 2.0]
    stage.orders = {}
    assert stage.sweep()["ok"] and stage.calls() == [2.0, 3.0]


def test_after_the_sweep_was_killed_its_runs_are_not_trained_twice(stage):
    """SIGKILL leaves the run that was training; the next call passes it by, the one after its end goes on with it."""
    stage.orders = {"1.0": "hang"}
    (stage.directory / "orders.json").write_text(json.dumps(stage.orders))
    code = ("import pathlib, sys; sys.path.insert(0, sys.argv[2]); from test_sweep import Stage; "
            "s = Stage(pathlib.Path(sys.argv[1])); s.orders = {'1.0': 'hang'}; s.sweep()")
    owner = subprocess.Popen([sys.executable, "-c", code, str(stage.directory), str(Path(__file__).parent)],
                             env=environment())
    orphan = stage.hanging()
    owner.kill()
    owner.wait()
    assert stage.sweep(dry_run=True)["runs"][0]["status"] == "running"
    result = stage.sweep()
    assert [run["status"] for run in result["runs"]] == ["running", "finished", "finished"] and not result["ok"]
    assert "another process trains it" in result["runs"][0]["error"] and stage.calls() == [2.0, 3.0]
    os.kill(orphan, signal.SIGKILL)
    while is_running(stage.workdir / "logs" / "optim.lr=0.001.log"):
        time.sleep(0.02)
    listed = stage.sweep(dry_run=True)["runs"][0]
    assert (listed["status"], listed["error"]) == ("stopped", "its process is gone")
    stage.orders = {}
    assert stage.sweep()["ok"] and stage.calls() == [1.0]


def test_a_run_of_another_config_is_refused_before_anything_starts(stage):
    config = rundir.resolve(toy_config(stage.directory, {"optim.lr": 0.1, "train.batch_size": 16}), ByteTokenizer())
    rundir.create_or_validate(stage.workdir / "optim.lr=0.1", config, ByteTokenizer())
    with pytest.raises(UserError, match=r"lr=0.1 holds a run of another config \(train.batch_size: 8 != 16; here != "
                                         "there"):
        stage.sweep()
    assert stage.calls() == []


def test_a_run_of_the_same_config_goes_on(stage):
    """The vocabulary, which the tokenizer decides, and what may differ when a run goes on do not count."""
    config = rundir.resolve(toy_config(stage.directory, {"optim.lr": 0.1, "log.every": 3}), ByteTokenizer())
    rundir.create_or_validate(stage.workdir / "optim.lr=0.1", config, ByteTokenizer())
    assert stage.sweep()["ok"] and stage.calls() == [1.0, 2.0, 3.0]


def test_equal_points_are_refused(stage):
    stage.overrides = [{"optim.lr": 1}, {"optim.lr": 0.5}, {"optim.lr": 1.0}]
    with pytest.raises(UserError, match="runs 0 and 2 of the sweep are the same .optim.lr=1 and optim.lr=1.0."):
        stage.sweep()


@pytest.mark.parametrize(("overrides", "message"), [
    ([{"arg": "seed=1"}, {"seed": 1, "optim.lr": 0.5}, {"seed": 1}],
     "runs 0 and 2 of the sweep have the same name 'seed=1', and would share a directory .*name one more key"),
    ([{"arg": "base"}, {}], "runs 0 and 1 of the sweep have the same name 'base'"),
    *(([{}, {"arg": name}], f"run 1 of the sweep has the name '{name}', which is not free")
      for name in ("logs", "status.json", "status.tmp", "table.csv", "table.md", "sweep.png", ".", "..")),
])
def test_names_that_runs_or_files_share_are_refused(stage, overrides, message):
    """Their configs differ, as get_config of the word that "arg" gives may do."""
    points = [Point(changes, toy_config(stage.directory, {"seed": 7 + i}), ("false",))
              for i, changes in enumerate(overrides)]
    with pytest.raises(UserError, match=message):
        sweep(points, str(stage.workdir), **USUAL)
    assert not stage.workdir.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"runs": [{}]}', b'{"runs": 3}', b'\xff{"runs": []}', None])
def test_a_damaged_status_costs_only_what_it_alone_knew(stage, capsys, content):
    """None: every entry has lost its error. Which runs are finished stands in their own directories."""
    stage.orders = {"1.0": "fail"}
    stage.sweep()
    path = stage.workdir / "status.json"
    path.write_bytes(path.read_bytes().replace(b'"error"', b'"errer"') if content is None else content)
    listed = stage.sweep(dry_run=True)
    assert [run["status"] for run in listed["runs"]] == ["waiting", "finished", "finished"]
    stage.orders = {}
    result = stage.sweep()
    assert result["ok"] and stage.calls() == [1.0]
    assert verify_checksum(path.read_bytes()) == json.loads(json.dumps(result))
    assert capsys.readouterr().err.count(f"warning: {path} is damaged") == 1


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b'{"step": "6"}', b'{"step": 6, "valid": 1}', b"\xff"])
def test_a_run_with_a_damaged_report_is_run_again(stage, capsys, content):
    expected = stage.sweep()
    path = stage.workdir / "optim.lr=0.01" / "report.json"
    path.write_bytes(content)
    assert [run["status"] for run in stage.sweep(dry_run=True)["runs"]] == ["finished", "waiting", "finished"]
    assert stage.sweep() == expected and stage.calls() == [2.0]
    assert capsys.readouterr().err.count(f"warning: {path} is damaged and passed over") == 1


def test_a_directory_that_cannot_be_written(stage):
    stage.workdir.parent.mkdir()
    stage.workdir.write_text("a file")
    with pytest.raises(RunError, match=r"cannot write in .*toy: .*; choose another --workdir"):
        stage.sweep()


def test_names_are_readable_stable_and_distinct():
    assert run_name({"optim.lr": 1e-4, "diffusion.block_size": 16}) == "diffusion.block_size=16+optim.lr=0.0001"
    assert run_name({"optim.lr": 1e-4, "seed": 1}) == run_name({"seed": 1, "optim.lr": 1e-4})
    assert run_name({"arg": "algo=ar,size=tiny", "seed": 1}) == "algo=ar+size=tiny+seed=1"
    assert run_name({"arg": "a+b"}) != run_name({"arg": "a,b"})
    assert run_name({}) == "base" and run_name({"model.adaln": False}) == "model.adaln=False"
    values = ["a/b", "a b", "a-b", "a,b=c", "..", "é", "x" * 300, "x" * 301, (1, 2), (1, 3), "1.0", "1e-05"]
    names = [run_name({"data.path": value}) for value in values]
    assert len(set(names)) == len(values) and max(map(len, names)) < 150
    assert all("/" not in name and name.isascii() and " " not in name for name in names)
    assert run_name({"a": "x,b=y"}) != run_name({"a": "x", "b": "y"})
    assert run_name({"a": "x+b=y"}) != run_name({"a": "x", "b": "y"})


@pytest.mark.parametrize(("overrides", "xlabel", "drawn"), [
    ([{"optim.lr": lr, "seed": seed} for lr, seed in itertools.product((0.1, 0.01, 0.001), (0, 1))], "learning rate",
     {"seed 0": [0.001, 0.01, 0.1], "seed 1": [0.001, 0.01, 0.1]}),
    ([{"optim.schedule": "cosine"}, {}], "",
     {"": ["BD3-LM, S = 4, schedule constant", "BD3-LM, S = 4, schedule cosine"]}),
    ([{"optim.schedule": "cosine"}, {"optim.schedule": "wsd", "optim.lr": 0.1}], "learning rate",
     {"schedule cosine": [0.01], "schedule wsd": [0.1]}),
])
def test_plot_has_the_finished_runs_by_what_was_swept(stage, monkeypatch, overrides, xlabel, drawn):
    calls = []
    monkeypatch.setattr(plots, "nll_intervals", lambda path, *rest: calls.append(rest))
    stage.overrides = overrides
    stage.sweep(parallel=3)
    title, label, curves = calls[0]
    assert title == f"Runs of the sweep {stage.workdir.name}"
    assert (label, {name: [x for x, *_ in points] for name, points in curves.items()}) == (xlabel, drawn)
    by_nll = sorted(point[1:] for points in curves.values() for point in points)
    assert by_nll == [(nll, nll - 0.1, nll + 0.2) for nll in map(float, range(1, len(overrides) + 1))]


def test_an_interval_that_is_not_known_is_drawn_as_a_point(stage, monkeypatch):
    stage.sweep()
    path = stage.workdir / "optim.lr=0.01" / "report.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"valid": told["valid"] | {"nll_ci95": [None, None]}}))
    result = stage.sweep()
    assert result["ok"] and result["runs"][1]["nll_ci95"] == [None, None]
    assert "| 1 | 0.01 | 2.0000 | none | 4.00 |" in (stage.workdir / "table.md").read_text()


@pytest.mark.ci_slow
def test_a_real_sweep(tmp_path):
    """Three toy runs through the command line: one fails, and the others' likelihoods are those of their reports."""
    write_text(tmp_path / "text.txt", 100)
    (tmp_path / "toy.py").write_text(textwrap.dedent(f"""
        def get_config():
            return {toy_dict(tmp_path, {})!r}

        def sweep():
            for lr in (1e-2, 1e-3, 1e30):
                yield {{"optim.lr": lr}}
    """))
    words = [sys.executable, "-m", "launch", "sweep", f"--config={tmp_path}/toy.py", f"--workdir={tmp_path}/sweep",
             "--parallel=2", "--config.train.steps=4"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [run["status"] for run in result["runs"]] == ["finished", "finished", "failed"], done.stderr
    assert "is not finite" in result["runs"][2]["error"]
    for run in result["runs"][:2]:
        valid = report.read(run["workdir"])["valid"]
        assert valid["nll"] == run["valid_nll"] and run["nll_ci95"][0] < run["valid_nll"] < run["nll_ci95"][1]
        assert rundir.read(run["workdir"])[0].optim.lr == run["overrides"]["optim.lr"]
