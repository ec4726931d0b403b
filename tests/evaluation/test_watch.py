"""`eval --watch` on a run whose checkpoints come and go between its looks, by a script."""

import json
import shutil
import signal
import subprocess
import sys
import types

import pytest
from toy_evaluation import options_of
from toy_runs import environment, toy_config, toy_dict, write_text

from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.log import append, read_lines, read_metrics
from bd3lm_jax.evaluation import watch
from bd3lm_jax.likelihood import evaluate
from bd3lm_jax.training.train import train
from launch.__main__ import main


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps, all of them saved, every second one validated as the watch does."""
    home = tmp_path_factory.mktemp("watch")
    write_text(home / "text.txt", 80)
    train(toy_config(home, {"checkpoint.every": 1, "checkpoint.keep": 9, "eval.every": 2, "eval.rows": 0}),
          str(home / "run"))
    return home / "run"


@pytest.fixture
def script(monkeypatch):
    """`script(event, ...)`: the events happen one after the other when the watch waits; then it waits in vain."""
    def install(*events):
        left = list(events)

        class Scripted(watch.Signals):
            def wait(self, seconds):
                if left:
                    left.pop(0)(self)

        monkeypatch.setattr(watch, "Signals", Scripted)
        return left

    return install


def arrives(whole, run, *steps):
    """An event: steps are there, as by one rename each."""
    def event(_):
        for step in steps:
            shutil.copytree(whole / "checkpoints" / str(step), run / "checkpoints" / f"{step}.part")
            (run / "checkpoints" / f"{step}.part").rename(run / "checkpoints" / str(step))
    return event


def goes(run, *steps):
    return lambda _: [shutil.rmtree(run / "checkpoints" / str(step)) for step in steps]


@pytest.fixture
def run(whole, tmp_path):
    """The run before its first checkpoint."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(whole / name, tmp_path / "run" / name)
    return tmp_path / "run"


def valid(whole):
    return {line["step"]: line["valid/nll"] for line in read_metrics(whole) if "valid/nll" in line}


def test_every_newest_checkpoint_once_with_one_program(whole, run, script, monkeypatch, capsys):
    """1 and 2 come together: only 2 is evaluated. The figures are those that training has logged."""
    traces, original = [], evaluate.make_scores

    def counting(*arguments):
        scores = original(*arguments)
        return lambda *values: traces.append(1) or scores(*values)

    monkeypatch.setattr(evaluate, "make_scores", counting)
    left = script(arrives(whole, run, 1, 2), lambda _: None, arrives(whole, run, 4), goes(run, 1, 2),
                  arrives(whole, run, 6))
    result = watch.watch(str(run), timeout=0, **options_of())
    assert not left and result["ended"] == "last step" and len(traces) == 1
    assert {line["step"]: line["nll"] for line in result["watched"]} == pytest.approx(valid(whole), rel=1e-6)
    assert (result["step"], result["nll"]) == (6, result["watched"][-1]["nll"])
    lines = read_lines(run / watch.FILE)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["asked"] == {  # as the lines of earlier versions
        "data": "", "split": "valid", "data_dir": "", "chunks": "independent", "stride": 0, "first_token": "",
        "end_token": "count", "estimator": "", "draws": 1, "seed": 0, "weights": "ema", "block_size": 0}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in said] == ["step 2", "step 4", "step 6"]


def test_a_watch_that_is_started_again_does_nothing_twice(whole, run, script, monkeypatch):
    script(arrives(whole, run, 2), arrives(whole, run, 6))
    first = watch.watch(str(run), timeout=0, **options_of())
    with open(run / watch.FILE, "a") as file:
        file.write('{"step": 7, "cut off')
    with monkeypatch.context() as patch:
        patch.setattr(watch, "open_run", None)
        assert watch.watch(str(run), timeout=0, **options_of()) == first
    other = watch.watch(str(run), timeout=0, **options_of(seed=1))
    assert [line["step"] for line in other["watched"]] == [6] and other["nll"] != first["nll"]
    lines = read_lines(run / watch.FILE)
    assert [(line["step"], line["asked"]["seed"]) for line in lines] == [(2, 0), (6, 0), (6, 1)]


def test_nothing_in_the_run_directory_changes(whole, tmp_path, script):
    def contents(directory):
        return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
                for path in directory.rglob("*") if path.name != watch.FILE}

    shutil.copytree(whole, tmp_path / "run")
    before = contents(tmp_path / "run")
    script()
    watch.watch(str(tmp_path / "run"), timeout=0, **options_of())
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_that_goes_while_it_is_read_is_passed_over(whole, run, script, monkeypatch):
    original = Checkpoints._record

    def deleting(self, step):
        if step == 3:
            shutil.rmtree(self.directory / "3", ignore_errors=True)
        return original(self, step)

    monkeypatch.setattr(Checkpoints, "_record", deleting)
    script(arrives(whole, run, 2), arrives(whole, run, 3), arrives(whole, run, 6))
    result = watch.watch(str(run), timeout=0, **options_of())
    assert [line["step"] for line in result["watched"]] == [2, 6]


def test_a_damaged_checkpoint_is_told_once(whole, run, script, capsys):
    def damaged(_):
        shutil.copytree(whole / "checkpoints" / "3", run / "checkpoints" / "3")
        shutil.rmtree(run / "checkpoints" / "3" / "ema")

    script(damaged, lambda _: None, arrives(whole, run, 6))
    result = watch.watch(str(run), timeout=0, **options_of())
    assert [line["step"] for line in result["watched"]] == [6]
    assert capsys.readouterr().err.count("checkpoints/3 is damaged") == 1


def test_a_damaged_last_checkpoint_is_waited_for_until_it_is_saved_anew(whole, run, script, capsys):
    """Training that goes on from an earlier step replaces it; until then the watch has not seen the last step."""
    def damaged(_):
        shutil.copytree(whole / "checkpoints" / "6", run / "checkpoints" / "6")
        shutil.rmtree(run / "checkpoints" / "6" / "ema")

    left = script(damaged, lambda _: None, goes(run, 6), arrives(whole, run, 5), arrives(whole, run, 6))
    result = watch.watch(str(run), timeout=0, **options_of())
    assert not left and result["ended"] == "last step"
    assert [line["step"] for line in result["watched"]] == [5, 6] and result["nll"] == pytest.approx(valid(whole)[6])
    assert capsys.readouterr().err.count("checkpoints/6 is damaged") == 1


def test_a_damaged_last_checkpoint_alone_is_no_end(whole, run, script):
    arrives(whole, run, 5)(None)
    shutil.copytree(whole / "checkpoints" / "6", run / "checkpoints" / "6")
    shutil.rmtree(run / "checkpoints" / "6" / "ema")
    script()
    with pytest.raises(RunError, match="no checkpoint came in"):
        watch.watch(str(run), timeout=0.01, **options_of())


def test_it_waits_for_a_run_but_not_for_ever(tmp_path, whole, run, script, capsys):
    script()
    with pytest.raises(RunError, match="no checkpoint came in .*absent within 0.01 s"):
        watch.watch(str(tmp_path / "absent"), timeout=0.01, **options_of())
    assert "waiting for a run in" in capsys.readouterr().err and not (tmp_path / "absent").exists()
    arrives(whole, run, 2)(None)
    result = watch.watch(str(run), timeout=0.01, **options_of())
    assert (result["ended"], result["step"]) == ("nothing new", 2)


def test_a_signal_ends_it_between_and_within_evaluations(whole, run, script, monkeypatch):
    script(arrives(whole, run, 2), lambda signals: signals.received.append(signal.SIGTERM))
    result = watch.watch(str(run), timeout=0, **options_of())
    assert (result["ended"], [line["step"] for line in result["watched"]]) == ("SIGTERM", [2])
    original = evaluate.Evaluator._documents

    def interrupted(self, rows, ids):
        signal.raise_signal(signal.SIGINT)
        return original(self, rows, ids)

    monkeypatch.setattr(evaluate.Evaluator, "_documents", interrupted)
    script(arrives(whole, run, 6))
    result = watch.watch(str(run), timeout=0, **options_of())
    assert (result["ended"], [line["step"] for line in result["watched"]]) == ("SIGINT", [2])
    assert [line["step"] for line in read_lines(run / watch.FILE)] == [2]


def test_a_line_after_one_that_was_cut_off_is_whole(tmp_path):
    append(tmp_path / "a.jsonl", {"x": 1})
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"x": ')
    append(tmp_path / "a.jsonl", {"x": float("nan")})
    append(tmp_path / "a.jsonl", {"x": 3})
    assert read_lines(tmp_path / "a.jsonl") == [{"x": 1}, {"x": None}, {"x": 3}]
    with pytest.raises(RunError, match="cannot write .*: Is a directory"):
        append(tmp_path, {})


@pytest.mark.parametrize("wrong, said", [
    ({"estimator": "exakt"}, "exact"), ({"block_size": 3}, "block_size is 3, expected 4"),
    ({"data": "nowhere.txt"}, "--data=nowhere.txt is no file")])
def test_what_cannot_be_is_refused_before_the_first_checkpoint(run, script, wrong, said):
    script()
    with pytest.raises(UserError, match=said):
        watch.watch(str(run), timeout=0, **options_of(**wrong))


def test_a_published_checkpoint_is_refused(monkeypatch):
    monkeypatch.setattr(watch.hf, "is_published", lambda path: True)
    with pytest.raises(UserError, match="model is a published checkpoint: --watch follows a run that trains"):
        watch.watch("model", timeout=0, **options_of())


RUN = """
import json, sys
from bd3lm_jax.config import Config
from bd3lm_jax.training.train import train
train(Config.from_dict(json.loads(sys.argv[1])), sys.argv[2])
"""


def left_by(run):
    """What training leaves: log lines without their speed, sealed records and file names of the checkpoints."""
    lines = [{key: value for key, value in line.items() if key != "train/tokens_per_s"} for line in read_metrics(run)]
    records = {path.parts[-3]: json.loads(path.read_text()) for path in run.glob("checkpoints/*/meta/metadata")}
    return lines, records, sorted(path.name for path in run.iterdir() if path.name != watch.FILE)


@pytest.mark.ci_slow
def test_a_run_does_not_notice_that_it_is_watched(tmp_path):
    """Two runs in processes of their own, one of them watched from here while it saves after every second step: the
    records (fingerprints of all arrays), the losses and the files are the same."""
    write_text(tmp_path / "text.txt", 80)
    config = json.dumps(toy_dict(tmp_path, {"train.steps": 60, "checkpoint.every": 2, "checkpoint.keep": 1,
                                            "eval.every": 10}))
    for name in ("alone", "watched"):
        process = subprocess.Popen([sys.executable, "-c", RUN, config, str(tmp_path / name)], env=environment())
        if name == "watched":
            result = watch.watch(str(tmp_path / name), timeout=240, **options_of())
            assert result["ended"] == "last step" and result["step"] == 60
        assert process.wait(300) == 0
    assert left_by(tmp_path / "watched") == left_by(tmp_path / "alone")


# ---- the command


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `eval` with a watch that ended in a certain way: (exit code, stdout, stderr, what the watch was given)."""
    def call(ended, *argv):
        given = []
        monkeypatch.setitem(sys.modules, "bd3lm_jax.evaluation.watch", types.SimpleNamespace(
            FILE="watch.jsonl", watch=lambda workdir, **words: given.append((workdir, words)) or {"ended": ended}))
        code = main(["eval", *argv])
        return code, *capsys.readouterr(), given

    return call


@pytest.mark.parametrize("ended, code, said", [
    ("last step", 0, ""), ("nothing new", 0, ""), ("SIGTERM", 42, "run the same command again"),
    ("SIGINT", 130, "interrupted")])
def test_the_result_is_said_however_it_ended(command, ended, code, said):
    found, out, err, given = command(ended, "--workdir=w", "--watch", "--split=valid", "--watch_timeout=9")
    assert (found, json.loads(out.splitlines()[-1])) == (code, {"ended": ended}) and said in err
    assert given == [("w", options_of() | {"timeout": 9.0})]


@pytest.mark.parametrize("argv, said", [
    (("--watch", "--baseline=v"), "--baseline does not go with --watch"),
    (("--watch", "--distributed"), "--distributed does not go with --watch"),
    (("--watch", "--step=3"), "--step does not go with --watch"),
    (("--watch_timeout=3",), "--watch_timeout goes with --watch"),
    (("--step=first",), "--step=first: expected latest, best or the number of a step")])
def test_flags_that_do_not_go_with_it(command, argv, said):
    code, _, err, given = command("", "--workdir=w", *argv)
    assert code == 2 and said in err and not given
