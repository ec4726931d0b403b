"""`python -m launch tpu`: which flags reach the engine, and what is checked before any file is written."""

import json
import shlex
from pathlib import Path

import pytest
from places import ROOT

from launch.__main__ import main

GCLOUD = ("--accelerator=v5litepod-16", "--project=p", "--zone=us-central1-a", "--shared_dir=/mnt/runs")
SLURM = ("--engine=slurm", "--accelerator=H100:8")
TRAIN = ("train", "--config=configs/tiny.py", "--mesh=data=-1,fsdp=4", "--config.train.batch_size=32")


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def launch(capsys, tmp_path, *argv):
    code = main(["tpu", f"--out={tmp_path / 'out'}", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_shows_and_writes_everything(capsys, tmp_path):
    code, out, err = launch(capsys, tmp_path, *GCLOUD, "--name=mine", "--spot", "--slices=2", "--", *TRAIN,
                            "--mesh=data=-1,fsdp=4,slices=2")
    assert code == 0
    (line,) = out.splitlines()
    result = json.loads(line)
    assert (result["engine"], result["chips"], result["hosts"], result["slices"]) == ("gcloud", 32, 8, 2)
    assert list(result["actions"]) == ["create", "run", "logs", "resume", "delete"]
    for action, commands in result["actions"].items():
        assert f"# {action}: " in err
        assert all(command in err for command in commands)
    assert result["files"] == [str(tmp_path / "out" / "cluster.sh")]
    script = Path(result["files"][0]).read_text()
    assert all(command in script for commands in result["actions"].values() for command in commands)
    request = next(command for command in result["actions"]["create"] if "queued-resources create" in command)
    assert {"mine", "--node-count=2", "--spot", "--project=p"} <= set(shlex.split(request))


def test_the_command_learns_that_it_has_company(capsys, tmp_path):
    """--distributed is added where there are several hosts, once, and nowhere else."""
    for accelerator, given, count in (("v5litepod-16", (), 1), ("v5litepod-16", ("--distributed",), 1),
                                      ("v5litepod-8", (), 0)):
        code, out, _ = launch(capsys, tmp_path, *GCLOUD, f"--accelerator={accelerator}", "--action=run", "--", *TRAIN,
                              *given)
        (command,) = json.loads(out)["actions"]["run"]
        assert code == 0 and command.count("--distributed") == count
    code, out, _ = launch(capsys, tmp_path, *GCLOUD, "--action=run", "--", "eval", "--workdir=runs/tiny")
    assert code == 0 and "eval --workdir=runs/tiny --distributed" in json.loads(out)["actions"]["run"][0]


def test_the_command_may_be_written_in_full(capsys, tmp_path):
    code, out, _ = launch(capsys, tmp_path, *SLURM, "--", "python", "-m", "launch", *TRAIN)
    assert code == 0
    script = (tmp_path / "out" / "job.slurm").read_text()
    assert f".venv/bin/python -m launch {shlex.join(TRAIN)} &" in script
    assert json.loads(out)["files"] == [str(tmp_path / "out" / name) for name in ("job.slurm", "cluster.sh")]


def test_a_sweep_becomes_an_array(capsys, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("from configs.tiny import get_config\n\n\ndef sweep():\n    for lr in (1e-3, 2e-3, 3e-3):\n"
                      "        yield {'optim.lr': lr}\n")
    code, _, _ = launch(capsys, tmp_path, *SLURM, "--", "sweep", f"--config={config}")
    script = (tmp_path / "out" / "job.slurm").read_text()
    assert code == 0 and "#SBATCH --array=0-2\n" in script and f'sweep --config={config} --index="$SLURM_ARR' in script
    code, out, _ = launch(capsys, tmp_path, *GCLOUD, "--accelerator=v6e-8", "--action=run", "--", "sweep",
                          f"--config={config}", "--index=1")
    assert code == 0 and "--index=1" in json.loads(out)["actions"]["run"][0]


def test_the_examples_of_the_documentation(capsys, tmp_path):
    text = (ROOT / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    examples = [line for line in text.splitlines() if line.startswith("python -m launch tpu ")]
    assert {"gcloud", "xpk", "skypilot", "slurm"} == {line.split("--engine=")[1].split()[0] for line in examples}
    for line in examples:
        code, _, err = launch(capsys, tmp_path, *shlex.split(line, comments=True)[4:])
        assert code == 0, err


BAD = [
    ((*GCLOUD, "--"), "no command: after --"),
    ((*GCLOUD,), "no command: after --"),
    ((*GCLOUD, "train"), "unexpected argument 'train'"),
    ((*GCLOUD, "--", "tarin"), "'tarin' is no command for a cluster: did you mean 'train'?"),
    ((*GCLOUD, "--", "sample", "--workdir=x"), "'sample' is no command for a cluster"),
    ((*GCLOUD, "--", "train", "--wordir=x"), "'wordir'. Did you mean: workdir"),
    ((*GCLOUD, "--", "train", "--config.optim.lrr=1"), "did you mean 'optim.lr'?"),
    ((*GCLOUD, "--", "train", "--plan"), "needs no cluster"),
    ((*GCLOUD, "--", "train", "--mesh=data=3"), "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 does not fit 16 devices"),
    ((*GCLOUD, "--", "train", "--mesh=data=1,fsdp=4,data=1"), "--mesh: 'data' is given twice, 1 and 1: leave one out"),
    ((*GCLOUD, "--", "train", "--mesh=data=" + "9" * 5000), "is not one of data=N, fsdp=N"),
    ((*GCLOUD, "--slices=2", "--", "train", "--mesh=data=32"), "does not fit 32 devices"),
    ((*GCLOUD, "--slices=2", "--", "train", "--mesh=data=16,slices=3"), "--slices=2, but mesh.slices=3: add slices=2"),
    ((*GCLOUD, "--", "train", "--mesh=data=8,expert=2"), "model.kind='dit' has none"),
    ((*GCLOUD, "--", "train", "--mesh=tensor=16"), "mesh.tensor=16 does not divide model.num_heads"),
    ((*GCLOUD, "--", "train", "--mesh=data=16", "--config.train.batch_size=24"), "does not divide a batch of 24 rows"),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--estimator=nonsense"), "unknown estimator 'nonsense': known: "),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--split=foo"), "unknown split 'foo': known: test, train, valid"),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--context_mode=slinding"),
     "--context_mode=slinding: did you mean 'sliding'"),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--stride=3"), "--stride=3 has no effect"),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--target_ci=3"), "--target_ci=3: expected a part of the nll"),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--step=last"), "--step=last: expected latest, best or"),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--temperature=1"), "--temperature does not go with a likelihood"),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--curve", "--stride=4"), "--stride does not go with --curve"),
    ((*GCLOUD, "--", "eval", "--workdir=a,b", "--data=all", "--baseline=c"), "--baseline does not go with --data=all"),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--num_processes=2"), "--num_processes needs its companions"),
    ((*GCLOUD, "--", "train", *TRAIN[1:], "--num_processes=2"), "--num_processes needs its companions"),
    ((*GCLOUD, "--", "eval"), "--workdir is missing"),
    ((*GCLOUD, "--", "eval", "--workdir=runs/tiny", "--watch"), "eval --watch has one host, and the accelerator has 4"),
    ((*GCLOUD, "--", "eval", "--samples=a.json"), "eval --samples has one host, and the accelerator has 4"),
    ((*SLURM, "--", "eval", "--workdir=runs/tiny", "--task=gsm9k"), "unknown task 'gsm9k': did you mean 'gsm8k'?"),
    ((*SLURM, "--", "eval", "--workdir=runs/tiny", "--watch", "--step=3"), "--step does not go with --watch"),
    ((*GCLOUD, "--accelerator=v5litepod-17", "--", *TRAIN), "v5litepod comes in 1, 4, 8, 16"),
    ((*GCLOUD[1:], "--", *TRAIN), "--accelerator is missing"),
    ((GCLOUD[0], "--", *TRAIN), "--project is missing"),
    ((*GCLOUD, "--engine=glcoud", "--", *TRAIN), "unknown engine 'glcoud': did you mean 'gcloud'?"),
    ((*GCLOUD, "--action=dleete", "--", *TRAIN), "did you mean 'delete'?"),
    ((*GCLOUD, "--run", "--", *TRAIN), "--run does one action"),
    ((*GCLOUD, "--slices=0", "--", *TRAIN), "--slices=0"),
    ((*GCLOUD, "--", "sweep"), "one host each, and the accelerator has 4"),
    ((*SLURM, "--", "sweep", "--index=1"), "--index does not go with engine 'slurm'"),
    ((*SLURM, "--", "sweep", "--config.mesh.data=3"), "does not fit 8 devices"),
    (("--accelerator=v4", "--", *TRAIN), "unknown accelerator 'v4'"),
]


@pytest.mark.parametrize(("argv", "said"), BAD)
def test_bad_usage_writes_nothing(capsys, tmp_path, argv, said):
    code, out, err = launch(capsys, tmp_path, *argv)
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", 1) and lines[0].startswith("error: "), err
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("argv", "said"), [
    (("--num_processes=2",), "--num_processes goes with --distributed"),
    (("--distributed", "--num_processes=2"), "--num_processes needs its companions"),
    (("--distributed", "--coordinator=h:1"), "--coordinator needs its companions"),
])
@pytest.mark.parametrize("command", [("train",), ("eval", "--workdir=x")])
def test_flags_of_many_processes(capsys, command, argv, said):
    code = main([*command, *argv])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "") and said in captured.err
