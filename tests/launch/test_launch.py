"""The command line: help, one clean line for bad input, exit codes, and what each command hands to the library."""

import importlib
import importlib.machinery
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from places import ROOT

from bd3lm_jax.core.errors import Preempted, RunError, UserError
from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions, Target, TextOptions
from launch.__main__ import COMMANDS, main

TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "cache"))


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def stand_in(monkeypatch, module: str, **attributes) -> None:
    """A module whose functions a command will call instead of the real ones."""
    fake = types.ModuleType(module)
    fake.__spec__ = importlib.machinery.ModuleSpec(module, None)  # which looking a module up asks for
    vars(fake).update(attributes)
    monkeypatch.setitem(sys.modules, module, fake)
    parent, _, child = module.rpartition(".")
    monkeypatch.setattr(importlib.import_module(parent), child, fake, raising=False)


# ---- help


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_usage_lists_every_command(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == 0
    for name, line in COMMANDS.items():
        assert f"{name} " in out and line in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert f"python -m launch {command}" in out
    names = {word.split("=")[0] for word in out.split("Flags:")[0].split() if word.startswith("--")}
    assert all(name in out.split("Flags:")[1] or name.startswith("--config.") for name in names)


def test_help_does_not_import_jax():
    code = ("import sys; from launch.__main__ import main; main([]); main(['train', '--help']); "
            "sys.exit('jax' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


# ---- bad usage


BAD = [
    (("trian",), "unknown command 'trian': did you mean 'train'?"),
    (("train", "--wordir=x"), "'wordir'. Did you mean: workdir"),
    (("train", "tiny"), "unexpected argument 'tiny'"),
    (("train", f"--config={TINY}x"), "does not exist"),
    (("train", "--config=configs/tinny.py"), "did you mean 'configs/tiny.py'?"),
    (("train", "--config=LICENSE"), "LICENSE' is not a Python file"),
    (("train", "--config=setup.cfg.py"), "does not exist"),
    (("train", "--config"), "config file '' does not exist"),
    (("train", f"--config={TINY}:foo"), "unknown config argument 'foo': known are block_size=N"),
    (("train", f"--config={TINY}:block_size=x"), "block_size=x: expected a positive whole number"),
    (("train", "--config.optim.lrr=1"), "unknown config key 'optim.lrr': did you mean 'optim.lr'?"),
    (("train", "--config.steps=1"), "train.steps"),
    (("train", "--config.optm.rate=1"), "did you mean 'optim'?"),
    (("train", "--config.optim.learning_rate=1"), "did you mean 'optim.lr'?"),
    (("train", "--config.diffusion.schedule=cosine"), "diffusion.schedule='cosine' has no effect with"),
    (("train", "--batch_size=4"), "'batch_size'. Did you mean: --config.train.batch_size"),
    (("sample", "--max_new_tokens=9"), "'max_new_tokens'. Did you mean: length"),
    (("train", "--config.zebra=1"), "known: checkpoint, compute, data"),
    (("train", "--config.train.steps=many"), "--config.train.steps=many: invalid literal for int()"),
    (("train", "--config.train.steps=1.5"), "invalid literal for int()"),
    (("train", "--config.model.adaln=perhaps"), "--config.model.adaln=perhaps"),
    (("train", "--config.diffusion.count_probs=(1, 'a')"), "config key 'diffusion.count_probs' is 'a' (str)"),
    (("train", "--config.train.steps=0"), "train.steps is 0, expected at least 1"),
    (("train", "--config.diffusion.block_size=3"), "block_size=3 does not divide data.seq_len=128"),
    (("train", "--config.data.source=autsen"), "data.source is 'autsen'"),
    (("train", "--mesh=rows=8"), "--mesh: 'rows=8' is not one of data=N, fsdp=N, tensor=N"),
    (("train", "--accelerator=v5e"), "--accelerator goes with --plan"),
    (("train", "--plan", "--accelerator=v3"), "value should be one of <v4|v5e|v5p|v6e|H100|H200>"),
    (("train", "--plan", "--mfu=1.5"), "--mfu=1.5"),
    (("prepare", "--split=tets"), "unknown split 'tets': did you mean 'test'?"),
    (("prepare", "--config.data.tokenizer=gpt3"), "gpt3"),
    (("eval",), "--workdir is missing"),
    (("eval", "--workdir=x", "--mc_samples=0"), "--mc_samples=0"),
    (("eval", "--workdir=x", "--weights=emma"), "--weights=emma"),
    (("sample",), "--workdir is missing"),
    (("sample", "--workdir=x", "--num_samples=0"), "--num_samples=0"),
    (("sample", "--workdir=x", "--top_p=1.5"), "--top_p=1.5"),
    (("sample", "--workdir=x", "--temperature=warm"), "--temperature=warm"),
    (("bench", "--rounds=0"), "--rounds=0"),
    (("doctor", "--fix"), "'fix'"),
]


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert err.splitlines()[-1] == lines[0], "the error is the last thing said"
    assert message in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(("content", "message"), [
    (None, "does not exist"), (b"", "expected at least 2"), (b"one line\n", "expected at least 2"),
    (b"good\nbad \xff\n", "byte 0xff at offset 9"),
])
def test_bad_text_file(capsys, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run(capsys, "prepare", "--config.data.source=text", f"--config.data.path={path}",
                         "--config.data.tokenizer=bytes")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1] and str(path) in err


@pytest.mark.parametrize(("source", "message"), [
    ("def get_config(:\n", "line 1"),
    ("x = 1\n", "has no function get_config"),
    ("def get_config():\n    return {'train': {}, 'optimizer': {}}\n", "unknown config key 'optimizer'"),
])
def test_bad_config_file(capsys, tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    code, out, err = run(capsys, "train", f"--config={path}")
    assert (code, out) == (2, "")
    assert message in err and len(err.splitlines()) == 1


def test_config_without_args_says_so(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return {}\n")
    code, _, err = run(capsys, "train", f"--config={path}:small")
    assert code == 2 and "takes no args" in err and len(err.splitlines()) == 1


# ---- exit codes


@pytest.mark.parametrize(("error", "code", "said"), [
    (UserError("wrong input:\n  two lines"), 2, "error: wrong input: two lines\n"),
    (RunError("disk full"), 1, "error: disk full\n"),
    (Preempted("saved at step 7"), 42, "error: saved at step 7\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (ModuleNotFoundError("No module named 'rich'", name="rich"), 1, "error: the package 'rich' is not installed: "
     "pip install -e .\n"),
])
def test_exit_codes(capsys, monkeypatch, error, code, said):
    def diagnose():
        raise error

    stand_in(monkeypatch, "bd3lm_jax.evaluation.doctor", diagnose=diagnose)
    assert run(capsys, "doctor") == (code, "", said)


def test_unexpected_error_keeps_its_traceback(capsys, monkeypatch):
    stand_in(monkeypatch, "bd3lm_jax.evaluation.doctor", diagnose=lambda: {}["lost"])
    code, out, err = run(capsys, "doctor")
    assert (code, out) == (1, "")
    assert "Traceback" in err and "KeyError: 'lost'" in err


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_fails_with_its_report(capsys, monkeypatch, ok, code):
    stand_in(monkeypatch, "bd3lm_jax.evaluation.doctor", diagnose=lambda: {"ok": ok})
    assert run(capsys, "doctor")[:2] == (code, json.dumps({"ok": ok}) + "\n")


# ---- what the commands hand over


def recorder(calls: list, returns):
    def call(*args, **kwargs):
        calls.append((args, kwargs))
        return returns

    return call


def test_train_gets_the_config_and_a_workdir_named_after_it(capsys, monkeypatch):
    calls = []
    stand_in(monkeypatch, "bd3lm_jax.training.train", train=recorder(calls, {"step": 5}))
    assert run(capsys, "train", "--config.train.steps", "5", "--config.optim.lr=1e-2")[:2] == (0, '{"step": 5}\n')
    assert run(capsys, "train", "--config=configs/austen.py:algo=ar", "--workdir=elsewhere")[0] == 0
    ((first, workdir), options), ((second, elsewhere), _) = calls
    assert (first.train.steps, first.optim.lr, workdir) == (5, 0.01, "runs/tiny")
    assert options == {"profile": False, "stuck_after": 1800.0}
    assert (second.diffusion.kind, elsewhere) == ("ar", "elsewhere")


def test_train_takes_a_mesh_and_a_profile(capsys, monkeypatch):
    calls = []
    stand_in(monkeypatch, "bd3lm_jax.training.train", train=recorder(calls, {}))
    assert run(capsys, "train", "--mesh=data=-1,fsdp=4", "--profile")[0] == 0
    ((config, _), options), = calls
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (-1, 4, 1)
    assert options == {"profile": True, "stuck_after": 1800.0}


def test_plan_trains_nothing(capsys, monkeypatch):
    calls, trained = [], []
    stand_in(monkeypatch, "bd3lm_jax.training.train", train=recorder(trained, {}))
    stand_in(monkeypatch, "bd3lm_jax.planning.plan", plan=recorder(calls, {"params": 1}))
    assert run(capsys, "train", "--plan")[:2] == (0, '{"params": 1}\n')
    assert run(capsys, "train", "--plan", "--accelerator=v5p", "--mfu=0.6", "--mesh=data=8")[0] == 0
    (_, first), ((config,), second) = calls
    assert (first, second) == ({"target": "", "utilisation": 0.4}, {"target": "v5p", "utilisation": 0.6})
    assert config.mesh.data == 8 and not trained


def test_eval_hands_every_flag_over(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr("bd3lm_jax.evaluation.evaluate_run.evaluate_run", recorder(calls, {"nll": 1.0}))
    code, out, _ = run(capsys, "eval", "--workdir=w", "--split=valid", "--data=d.txt", "--estimator=nll",
                       "--draws=3", "--seed=4", "--weights=params", "--batch=5", "--target_ci=0.5%", "--max-draws=9",
                       "--against=v",
                       "--chunks=sliding", "--stride=7", "--data-dir=d", "--first_token=skip", "--end_token=skip")
    assert (code, json.loads(out)) == (0, {"nll": 1.0})
    assert calls == [(("w",), {
        "text": TextOptions("d.txt", "valid", "d", "sliding", 7, "skip", "skip"), "model": ModelOptions("params", 5),
        "estimator": EstimatorOptions("nll", 3, 4, Target(0.005, 9)), "baseline": "v"})]
    assert run(capsys, "eval", "--workdir=w", "--target_ci=0.02")[0] == 0
    assert calls[-1][1]["estimator"].target == Target(0.02, 64)


@pytest.mark.parametrize("target", ["tight", "0", "200%", "-1%"])
def test_eval_targets_that_are_no_fraction(capsys, target):
    code, _, err = run(capsys, "eval", "--workdir=w", f"--target_ci={target}")
    assert code == 2 and f"--target_ci={target}: expected a part of the nll" in err


def test_prepare_counts_rows_and_tokens(capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line number {i}\n" for i in range(200)))
    code, out, _ = run(capsys, "prepare", "--config.data.source=text", f"--config.data.path={path}",
                       "--config.data.tokenizer=bytes", "--config.data.seq_len=64", "--config.data.valid_fraction=0.1")
    result = json.loads(out)
    sizes = [len(f"line number {i}\n") for i in range(200)]
    assert code == 0
    assert result["tokens"] == {"train": sum(sizes[:180]), "valid": sum(sizes[180:])}
    assert result["rows"] == {split: -(-tokens // 64) for split, tokens in result["tokens"].items()}
    assert all(Path(directory).is_dir() for directory in result["path"].values())
    assert len(set(result["hash"].values())) == 2


def test_bench_lists_and_runs(capsys, monkeypatch):
    calls, module = [], types.SimpleNamespace(__doc__="Steps of training.\n\nAt length.")
    stand_in(monkeypatch, "bd3lm_jax.experiments.bench", bench=recorder(calls, {"ratio": 1.5}),
             BENCHES={"step": module})
    code, out, err = run(capsys, "bench")
    assert (code, out) == (0, '{"benches": ["step"]}\n') and "Steps of training." in err and not calls
    for words in (("step", "--rounds=3"), ("--rounds=3", "step"), ("--name=step", "--rounds=3")):
        assert run(capsys, "bench", *words)[:2] == (0, '{"ratio": 1.5}\n')
    assert calls == [(("step", 3, "", "runs/bench", ""), {})] * 3
    assert run(capsys, "bench", "step", "--baseline=torch", "--out=d")[0] == 0
    assert calls[-1] == (("step", 7, "torch", "d", ""), {})


@pytest.mark.parametrize("words", [("step", "loss"), ("--name=step", "loss")])
def test_bench_takes_one_name(capsys, words):
    code, out, err = run(capsys, "bench", *words)
    assert (code, out, err) == (2, "", "error: unexpected argument 'loss': flags are written --name=value\n")
