"""`--plan` as a person starts it: figures against closed forms and against what is really allocated and counted."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from grids import some
from places import ROOT

from bd3lm_jax.core import hardware
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.tokenizers import get_tokenizer
from bd3lm_jax.planning import compilers, flops, hlo, plan
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training import memory
from configs import owt
from launch.__main__ import main
from launch.arguments import load_config

CONFIG = "configs/tiny.py:algo=ar"
SMALL = ("--config.model.num_layers=2", "--config.model.hidden_size=64", "--config.model.num_heads=2",
         "--config.data.seq_len=64",
         "--config.data.tokenizer=bpe:1151", "--config.train.batch_size=16", "--config.compute.dtype=float32")
MATRICES = 1152 * 64 + 2 * (4 + 2 * 4) * 64 * 64 + 64 * 1152  # embedding, two layers, output layer
VECTORS = 2 * (2 * 64 + 5 * 64) + 64 + 1152  # norms and biases
PARAMS = MATRICES + VECTORS
STATE = {"params": 1, "optimiser": 2, "ema": 1, "gradients": 1}  # in copies of the weights


def run(*flags: str) -> dict:
    done = subprocess.run([sys.executable, "-m", "launch", "train", "--plan", f"--config={CONFIG}", *SMALL, *flags],
                          cwd=ROOT, text=True, capture_output=True, timeout=300,
                          env=os.environ | {"BD3LM_CACHE": "/nowhere"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "temporaries" in done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def four():
    """By the CPU compiler."""
    return run("--mesh=data=4", "--mfu=0.5", "--accelerator=H100")


def test_sizes(four):
    assert (four["devices"], four["mesh"]) == (4, {"data": 4, "fsdp": 1, "tensor": 1, "expert": 1, "slices": 1})
    assert (four["params"], four["compiler"]) == (PARAMS, "cpu")
    held = four["bytes_per_device"]
    assert four["estimate"]["bytes_per_device"] == held
    for kind, copies in STATE.items():
        assert held[kind] == pytest.approx(copies * 4 * PARAMS, abs=16)  # and counters
    assert held["batch"] == 3 * 4 * 64 * 4
    assert held["total"] == sum(size for kind, size in held.items() if kind != "total")


def test_gradients_are_what_devices_send(four):
    """Each sends its gradient round a ring once to add and once to share, and a few norms and counts besides."""
    sent = sum(traffic["bytes"] for traffic in four["communication"].values())
    assert 2 * 3 / 4 * 4 * PARAMS == pytest.approx(sent, rel=0.01)


def test_speed_is_flops_over_peak(four):
    config = load_config(CONFIG, SMALL)
    needed = flops.train_step(plan.resolve_config(config)[0].model, config.diffusion, batch=16, length=64,
                              noise_samples=1)
    assert four["flops_per_step"] == needed
    assert [row["device"] for row in four["expected"]] == ["H100"]
    check_speeds(four, 0.5)


def test_a_curriculum_is_planned_by_its_parts():
    """Of 10 steps 2 with blocks of 4 tokens, 5 of 16 and 3 of 4 again."""
    flags = ("--config.train.steps=10", "--config.train.block_sizes=((0,4),(2,16),(7,4))",
             "--config.diffusion.block_size=4")
    config = plan.resolve_config(load_config("configs/tiny.py", (*SMALL, *flags)))[0]
    found = plan.phases(config)
    assert {size: part for size, (part, _) in found.items()} == {4: pytest.approx(0.5), 16: pytest.approx(0.5)}
    for size, (_, work) in found.items():
        objective = dataclasses.replace(config.diffusion, block_size=size)
        assert work == flops.train_step(config.model, objective, batch=16, length=64, noise_samples=1)
    plain = plan.resolve_config(load_config("configs/tiny.py", SMALL))[0]
    assert plan.phases(plain)[plain.block_size][0] == 1
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    assert set(plan.phases(short)) == {4}


def check_speeds(found, utilisation):
    sent = sum(traffic["bytes"] for traffic in found["communication"].values())
    for row in found["expected"]:
        device = hardware.ACCELERATORS[row["device"]]
        compute_s = found["flops_per_step"] / (4 * utilisation * device.peak_flops)
        links_s = sent / device.links_bandwidth
        assert row["tokens_per_s"] == pytest.approx(16 * 64 / max(compute_s, links_s), rel=1e-3)
        assert row["bound_by"] == ("compute" if compute_s > links_s else "links") and row["fits"] is True


@pytest.mark.ci_slow
def test_split_weights():
    split = run("--mesh=fsdp=4", "--accelerator=H200")
    for kind, copies in STATE.items():
        assert split["bytes_per_device"][kind] == pytest.approx(copies * 4 * (MATRICES / 4 + VECTORS), abs=16)
    assert split["communication"]["all-gather"]["bytes"] > 3 / 4 * 4 * (64 + 1) * 1152


@pytest.mark.parametrize(("flag", "message"), [
    ("--mesh=data=4,fsdp", "--mesh: 'fsdp' is not one of data=N, fsdp=N, tensor=N, expert=N, slices=N"),
    ("--mesh=rows=4", "--mesh: 'rows=4' is not one of"),
    ("--mesh=data=-1,fsdp=-1", "at most one -1"),
    ("--accelerator=v7", "value should be one of <v4|v5e|v5p|v6e|H100|H200>"),
    ("--mfu=0", "--mfu=0"),
    ("--config.model.vocab_size=1000", "smaller than the 1152 ids"),
    ("--config.data.tokenizer=bpe:9", "expected bpe:N with N at least 257"),
])
def test_bad_input(capsys, monkeypatch, flag, message):
    monkeypatch.chdir(ROOT)
    code = main(["train", "--plan", *SMALL, flag])
    out, err = capsys.readouterr()
    assert (code, out, len(err.splitlines())) == (2, "", 1) and message in err


@pytest.mark.parametrize(("mesh", "message"), some([
    ("data=3", "mesh.data x mesh.fsdp = 3 does not divide a batch of 16 rows"),
    ("tensor=4", "mesh.tensor=4 does not divide model.num_heads=2"),
], 0))
def test_a_mesh_that_train_refuses(mesh, message):
    done = subprocess.run([sys.executable, "-m", "launch", "train", "--plan", *SMALL, f"--mesh={mesh}"], cwd=ROOT,
                          text=True, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_target_without_its_compiler_or_slice(monkeypatch):
    config = load_config("configs/tiny.py", ("--config.mesh.data=3",))
    monkeypatch.setattr(compilers, "has_tpu_compiler", lambda: False)
    with pytest.raises(UserError, match="needs the TPU compiler: pip install"):
        plan.plan(config, target="v5e", utilisation=0.4)
    monkeypatch.setattr(compilers, "has_tpu_compiler", lambda: True)
    with pytest.raises(UserError, match="the mesh has 3 devices, a slice of v5e has 1, 4, 8, 16"):
        plan.plan(config, target="v5e", utilisation=0.4)


# Programs that stand for libtpu, and what is said of them.
FAILING = {
    "import os; os.abort()": "exit code -6",
    "import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)": "two",
    "print('no figures')": "exit code 0",
}


@pytest.mark.parametrize(("code", "said"), FAILING.items())
def test_a_failing_tpu_compiler_leaves_the_estimate(monkeypatch, capsys, code, said):
    """Whatever happens in its process; the plan goes on with one line."""
    ask = compilers._ask
    monkeypatch.setattr(compilers, "_ask", lambda command, question: ask([sys.executable, "-c", code], question))
    monkeypatch.setattr(compilers, "compile_for_cpu", lambda program: compilers.CompiledCost(10, {}, 0.0))
    program = SimpleNamespace(config=load_config(CONFIG, SMALL), special=SpecialIds(1, 0), num_params=1,
                              mesh=SimpleNamespace(shape={}))
    assert plan._figures(program, "", "v4") == plan._figures(program, "v4", "v4") == {"cpu": (10, {}, 0.0)}
    lines = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert lines == [f"the TPU compiler failed: {said}; its figures are estimated"] * 2


def test_figures_of_tpus_and_gpus(monkeypatch):
    """TPUs have those of their compiler, GPUs the estimate, which also fills in what a compiler cannot say."""
    config = load_config(CONFIG, SMALL)
    program = SimpleNamespace(config=config, mesh=SimpleNamespace(size=4))
    monkeypatch.setattr(memory, "tpu_padding", lambda program: 1000)
    sent = {"all-reduce": hlo.Traffic(1, 6e12)}
    found = {"v4": compilers.CompiledCost(2**36, None, 0.0), "cpu": compilers.CompiledCost(2**34, sent, 0.0)}
    rows = {name: plan._expected(program, hardware.ACCELERATORS[name], found, 1.0, 0.5)
            for name in ("v4", "v5p", "H100")}
    assert [(row["compiler"], row["fits"]) for row in rows.values()] == [("v4", False), ("v4", True), ("cpu", True)]
    assert [row["bytes_needed"] for row in rows.values()] == [2**36, 2**36, 2**34]
    del found["v4"]
    assert plan._expected(program, hardware.ACCELERATORS["v4"], found, 1.0, 0.5)["bytes_needed"] == 2**34 + 1000
    assert [row["step_ms"] for row in rows.values()] == pytest.approx([20e3, 10e3, 6e15 / 450e9])


def test_vocabularies_are_those_of_the_tokenizers():
    config = load_config("configs/owt.py", ())
    assert plan.resolve_config(config)[0].model.vocab_size == 50258
    bpe = load_config("configs/tiny.py", ("--config.data.tokenizer=bpe:300",))
    resolve_config, special = plan.resolve_config(bpe)
    trained = get_tokenizer("bpe:300", lambda: [" ".join(f"word{i} is {i * i}" for i in range(99))])
    assert (resolve_config.model.vocab_size, special.mask, special.end) == (
        trained.vocab_size, trained.mask_id, trained.end_id)
    assert owt.get_config().model.vocab_size == -1


def test_without_it_a_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(compilers, "has_tpu_compiler", lambda: False)
    assert plan._tpu_to_ask("", 4) is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and ".[tpu_compile]" in said[0]


@pytest.mark.libtpu
def test_the_tpu_compiler_is_asked():
    pytest.importorskip("libtpu")
    found = run("--mesh=data=2,fsdp=2", "--accelerator=v5e")
    assert (found["compiler"], [row["device"] for row in found["expected"]]) == ("v5e", ["v5e"])
    assert found["communication"]["all-gather"]["bytes"] > 1 / 2 * 4 * 64 * 1152
    assert found["bytes_per_device"]["total"] > found["bytes_per_device"]["params"] * 4
    assert found["expected"][0]["fits"] is True


@pytest.mark.libtpu
def test_the_tpu_compiler_is_asked_by_itself():
    pytest.importorskip("libtpu")
    found = run("--mesh=data=4")
    assert [row["compiler"] for row in found["expected"]] == ["v4"] * 4 + ["cpu"] * 2
    assert found["compiler"] == "v4" and "TPUs by TPU compiler (v4), GPUs by estimate" in " ".join(
        found["stderr"].split())
    sent = sum(traffic["bytes"] for traffic in found["communication"].values())
    assert 2 * 3 / 4 * 4 * PARAMS == pytest.approx(sent, rel=0.01)
    assert found["bytes_per_device"]["total"] != found["estimate"]["bytes_per_device"]["total"]
    check_speeds(found, 0.4)


@pytest.mark.libtpu
def test_the_tpu_compiler_runs_out_of_memory():
    pytest.importorskip("libtpu")
    found = run("--accelerator=v5e", "--config.train.batch_size=65536")
    assert found["bytes_per_device"]["total"] > hardware.ACCELERATORS["v5e"].memory
    assert found["expected"][0]["fits"] is False and found["communication"] is None
