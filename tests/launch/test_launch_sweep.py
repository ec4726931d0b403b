"""`python -m launch sweep`: from sweep() of a config file to the points that the library gets."""

import json
import sys

import numpy as np
import pytest
from places import ROOT

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.experiments.sweeps.early_stopping import StoppingRule
from launch.__main__ import main
from launch.sweep import load_points


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def config_file(tmp_path):
    def write(body: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text("import numpy as np\nfrom configs.tiny import get_config\n" + body)
        return str(path)

    return write


def test_points_hold_config_and_command(config_file):
    path = config_file("def sweep():\n"
                       "    for lr in np.array([1e-3, 2e-3]):\n"
                       "        yield {'optim.lr': lr, 'model.adaln': False, 'data.cache_dir': 'a b',\n"
                       "               'diffusion.count_probs': [1, 2, 3, 4], 'train.batch_size': np.int64(4)}\n")
    first, second = load_points(path, ["--config.train.steps=7"])
    assert second.overrides == {"optim.lr": 0.002, "model.adaln": False, "data.cache_dir": "a b",
                                "diffusion.count_probs": (1, 2, 3, 4), "train.batch_size": 4}
    assert json.dumps(second.overrides) and not isinstance(second.overrides["optim.lr"], np.generic)
    assert second.command == (sys.executable, "-m", "launch", "train", f"--config={path}", "--config.train.steps=7",
                              "--config.optim.lr=0.002", "--config.model.adaln=False", "--config.data.cache_dir=a b",
                              "--config.diffusion.count_probs=(1, 2, 3, 4)", "--config.train.batch_size=4")
    config = second.config
    assert (config.optim.lr, config.model.adaln, config.data.cache_dir) == (0.002, False, "a b")
    assert (config.train.steps, config.train.batch_size) == (7, 4)
    assert config.diffusion.count_probs == (1.0, 2.0, 3.0, 4.0) and first.config.optim.lr == 0.001


def test_arg_chooses_what_get_config_is_called_with(config_file):
    path = config_file("def sweep():\n    yield from ({'arg': f'algo={a}', 'seed': 3} for a in ('ar', 'mdlm'))\n")
    ar, mdlm = load_points(path, [])
    assert (ar.config.diffusion.kind, mdlm.config.block_size, mdlm.config.seed) == ("ar", 128, 3)
    assert ar.command[4:] == (f"--config={path}:algo=ar", "--config.seed=3")
    assert ar.overrides == {"arg": "algo=ar", "seed": 3}


def test_args_of_the_command_line_apply_to_all(config_file):
    path = config_file("def sweep():\n    yield {'optim.lr': 0.1}\n")
    point, = load_points(f"{path}:block_size=16", [])
    assert point.config.block_size == 16 and point.command[4] == f"--config={path}:block_size=16"


@pytest.mark.parametrize(("body", "argv", "message"), [
    ("", (), "has no function sweep(): write one that yields the changed keys of each run, e.g. def sweep(): yield"),
    ("def sweep(x):\n    yield {}\n", (), "takes arguments, expected none"),
    ("def sweep():\n    return []\n", (), "yields nothing"),
    ("def sweep():\n    return 3\n", (), "'int' object is not iterable"),
    ("def sweep():\n    yield ('optim.lr', 1)\n", (), "yields ('optim.lr', 1), expected a dict of changed keys"),
    ("def sweep():\n    yield {1: 1}\n", (), "yields {1: 1}, expected a dict"),
    ("def sweep():\n    raise ValueError('no such size')\n", (), "no such size"),
    ("def sweep():\n    yield {}\n    yield {'optim.lrr': 1}\n", (),
     "run 1 of sweep() in '{path}': unknown config key 'optim.lrr': did you mean 'optim.lr'?"),
    ("def sweep():\n    yield {'optim.lr': 'high'}\n", (), "run 0 of sweep()"),
    ("def sweep():\n    yield {'train.steps': 1.5}\n", (), "invalid literal for int()"),
    ("def sweep():\n    yield {'train.steps': 0}\n", (), "train.steps is 0, expected at least 1"),
    ("def sweep():\n    yield {'optim.lr': None}\n", (), "'optim.lr' is None, expected a number, a text or a tuple"),
    ("def sweep():\n    yield {'arg': 'algo=gpt'}\n", (), "expected one of bd3lm, mdlm, ar"),
    ("def sweep():\n    yield {'arg': 'algo=ar'}\n", (":block_size=4",), "'arg' is given on the command line and by"),
    ("def sweep():\n    yield {'model.adaln': True}\n", ("--noconfig.model.adaln",), "'model.adaln' is given on the"),
    ("def sweep():\n    yield {'seed': 1}\n    yield {'seed': 0}\n    yield {}\n", (),
     "runs 1 and 2 of the sweep are the same (seed=0 and base): leave one out"),
    ("def sweep():\n    yield {}\n", ("--index=1",), "index is 1, the sweep has runs 0 to 0"),
    ("def sweep():\n    yield {}\n", ("--index=-1",), "--index=-1"),
    ("def sweep():\n    yield {}\n", ("--parallel=0",), "--parallel=0"),
    ("def sweep():\n    yield {}\n", ("--retries=-1",), "--retries=-1"),
    ("def sweep():\n    yield {}\n", ("--early_stopping=0",), "early_stopping is 0.0, expected bits per byte above 0"),
    ("def sweep():\n    yield {}\n", ("--early_stopping=nan",),
     "early_stopping is nan, expected bits per byte above 0"),
    ("def sweep():\n    yield {}\n", ("--early_stopping=1", "--early_stopping_after=1"),
     "early_stopping_after is 1.0, expected a part of"),
    ("def sweep():\n    yield {}\n", ("--early_stopping_after=0.2",),
     "--early_stopping_after goes with --early_stopping: add it"),
    ("def sweep():\n    yield {}\n", ("--baseline=1",), "baseline is 1, the sweep has runs 0 to 0"),
    ("def sweep():\n    yield {}\n", ("--baseline=worst",), "baseline is 'worst', expected the number of a run or"),
])
def test_bad_sweeps_start_nothing(config_file, tmp_path, capsys, body, argv, message):
    path = config_file(body)
    argv = list(argv)
    spec = path + (argv.pop() if argv and argv[0].startswith(":") else "")
    code = main(["sweep", f"--config={spec}", f"--workdir={tmp_path}/sweep", *argv])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert message.replace("{path}", path) in err
    assert not (tmp_path / "sweep").exists()


def test_dry_run_of_the_shipped_sweep(tmp_path, capsys):
    code = main(["sweep", "--dry_run", f"--workdir={tmp_path}/blocks", "--config.train.steps=300"])
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert code == 0 and result["sweep"] == "blocks"
    assert [(run["name"], run["status"], run["overrides"]) for run in result["runs"]] == [
        (f"diffusion.block_size={size}", "waiting", {"diffusion.block_size": size}) for size in (1, 4, 16)]
    assert f"--config.diffusion.block_size=16 --workdir={tmp_path}/blocks/diffusion.block_size=16" in err


def test_the_library_is_told_what_was_asked(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("bd3lm_jax.experiments.sweeps.sweep.sweep", lambda points, workdir, **settings: calls.append(
        (len(points), workdir, settings)) or {"sweep": "x", "runs": [], "ok": False})
    assert main(["sweep", "--parallel=2", "--index=1"]) == 1
    assert main(["sweep", "--workdir=here"]) == 1
    assert main(["sweep", "--workdir=here", "--retries=0", "--early_stopping=0.1", "--early_stopping_after=0.25",
                 "--baseline=best"]) == 1
    usual = {"parallel": 1, "index": None, "dry_run": False, "retries": 2, "give_up": None, "baseline": 0}
    assert calls == [(3, "runs/sweeps/tiny", usual | {"parallel": 2, "index": 1}), (3, "here", usual),
                     (3, "here", usual | {"retries": 0, "give_up": StoppingRule(0.1, 0.25), "baseline": "best"})]


def test_missing_config_file():
    with pytest.raises(UserError, match="'configs/tinny.py' does not exist: did you mean 'configs/tiny.py'"):
        load_points("configs/tinny.py", [])
