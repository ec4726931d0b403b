"""What is added from outside the package, each in one file of examples/plugins: it does what it says."""

import csv
import dataclasses
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import ROOT
from safetensors.numpy import load_file
from toy_docs import FENCE
from toy_lm import make_ids, make_lm, masked
from toy_runs import run_python, toy_dict, write_text

import bd3lm_jax
from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published import FORMATS, ModelSpec
from bd3lm_jax.core import plugins
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.data import corpora
from bd3lm_jax.data.corpora import SOURCES
from bd3lm_jax.diffusion import AR, OBJECTIVES
from bd3lm_jax.diffusion.schedule import SCHEDULES
from bd3lm_jax.generation import stream
from bd3lm_jax.generation.options import make_options
from bd3lm_jax.generation.sampling import SAMPLERS
from bd3lm_jax.models import build, trunk
from bd3lm_jax.models.gpt2 import GPT2Config
from bd3lm_jax.training.trackers import TRACKERS
from bd3lm_jax.training.train import train
from launch.__main__ import main

FOLDER = ROOT / "examples" / "plugins"
REGISTRIES = (OBJECTIVES, SCHEDULES, SAMPLERS, SOURCES, FORMATS, TRACKERS)


@pytest.fixture
def example(request):
    """The module that the test names is imported, and forgotten with what it has registered."""
    before = [dict(registry) for registry in REGISTRIES]
    name = f"examples.plugins.{request.param}"
    yield importlib.import_module(name)
    sys.modules.pop(name)
    for registry, old in zip(REGISTRIES, before):
        for key in set(registry) - set(old):
            del registry[key]


def of(name: str):
    return pytest.mark.parametrize("example", [name], indirect=True)


def test_the_page_shows_the_files():
    page = (ROOT / "docs" / "extend.md").read_text()
    shown = {block[2].strip() for block in FENCE.finditer(page) if block[1] == "python"}
    assert shown == {file.read_text().strip() for file in FOLDER.glob("*.py")}


@of("schedule")
def test_the_schedule_is_consistent(example):
    schedule, t = SCHEDULES["early"], jnp.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(schedule.mask_prob(t), 1 - (1 - t) ** 2, rtol=1e-5)
    slope = jax.vmap(jax.grad(schedule.mask_prob))(t)
    np.testing.assert_allclose(schedule.weight(t), slope / schedule.mask_prob(t), rtol=1e-5)
    np.testing.assert_allclose(schedule.inverse(schedule.mask_prob(t)), t, rtol=1e-5)


@pytest.mark.ci_slow
@of("schedule")
def test_the_schedule_trains(example, tmp_path):
    write_text(tmp_path / "text.txt", 60)
    config = toy_dict(tmp_path, {"train.steps": 1, "diffusion.corruption": "bernoulli", "diffusion.schedule": "early"})
    assert 0 < train(config, tmp_path / "run")["valid_nll"] < 10


@of("sampler")
def test_the_sampler_goes_from_right_to_left(example):
    events = stream.stream(make_lm(masked(4)), None, 1, 8, make_options(sampler="right_to_left", min_length=8))
    revealed = [event.revealed for event in events if event.revealed]
    assert revealed == [[3], [2], [1], [0], [7], [6], [5], [4]]


@of("objective")
def test_the_likelihood_of_the_objective_is_that_of_what_the_network_reads(example):
    ids, fields = make_ids(2, 8), dataclasses.asdict(masked(4))

    def nll(objective):
        return np.asarray(make_lm(objective).nll(ids, draws=2).per_token)

    plain, mixed = nll(masked(4)), nll(OBJECTIVES["smoothed"](**fields, part=0.9))
    np.testing.assert_allclose(nll(OBJECTIVES["smoothed"](**fields, part=0.0)), plain, atol=1e-5)
    assert np.abs(mixed - plain).max() > 1e-3


@of("objective")
def test_the_objective_trains_is_validated_and_samples(example, tmp_path):
    write_text(tmp_path / "text.txt", 60)
    nested = toy_dict(tmp_path, {"train.steps": 1})
    nested["diffusion"] |= {"kind": "smoothed", "part": 0.5}
    result = train(nested, tmp_path / "run")
    assert 0 < result["train_nll"] < 10 and 0 < result["valid_nll"] < 10
    sample, = bd3lm_jax.load(tmp_path / "run").generate(length=8)
    assert len(sample.tokens) <= 8 and sample.nfe > 0


@of("corpus")
def test_the_corpus_has_every_sum_once(example):
    documents = {split: list(SOURCES["sums"](None, split).documents()) for split in corpora.SPLITS}
    everything = sum(documents.values(), [])
    assert len(everything) == len(set(everything)) == 3600 and all(documents.values())
    assert all(int(a) + int(b) == int(c) for a, _, b, _, c in map(str.split, everything))
    assert len({SOURCES["sums"](None, split).fingerprint() for split in documents}) == 3


@of("tracker")
def test_the_tracker_gets_every_line_and_goes_on(example, tmp_path):
    write_text(tmp_path / "text.txt", 60)
    for steps in (2, 4):
        train(toy_dict(tmp_path, {"train.steps": steps, "log.trackers": ("csv",)}), tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [float(row["train/loss"]) for row in rows] == [line["train/loss"] for line in lines]
    assert [row["valid/nll"] != "" for row in rows] == ["valid/nll" in line for line in lines] == [0, 1, 0, 1]


@pytest.mark.parametrize("where", ["open", "metrics", "close"])
def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(where, tmp_path, monkeypatch, capsys):
    calls = []

    class Failing:
        def __init__(self, *arguments):
            self.call("open")

        def metrics(self, step, values):
            self.call("metrics")

        def close(self):
            self.call("close")

        def call(self, name):
            calls.append(name)
            if name == where:
                raise OSError("no network")

    monkeypatch.setitem(TRACKERS, "failing", Failing)
    write_text(tmp_path / "text.txt", 60)
    config = toy_dict(tmp_path, {"train.steps": 2, "log.trackers": ("failing",)})
    assert train(config, tmp_path / "run")["step"] == 2
    assert calls == {"open": ["open"], "metrics": ["open", "metrics"],
                     "close": ["open", "metrics", "metrics", "close"]}[where]
    warning = "warning: tracker 'failing' failed and gets nothing more: OSError: no network"
    assert capsys.readouterr().err.count(warning) == 1


def test_an_unknown_tracker_is_one_line(tmp_path):
    write_text(tmp_path / "text.txt", 60)
    with pytest.raises(UserError, match="unknown tracker log.trackers 'tensorbord'"):
        train(toy_dict(tmp_path, {"log.trackers": ("tensorbord",)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


FAMILY = GPT2Config(vocab_size=13, num_layers=2, hidden_size=8, num_heads=2, intermediate_size=12, dropout=0.0,
                    positions=16)


def family_params():
    """Random everywhere: values that begin at zero would hide what is mixed up."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: trunk.init(build(FAMILY, jnp.float32), jax.random.key(0)))
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), shapes)
    params["embed"]["embedding"][FAMILY.vocab_size:] = 0  # padding, which no file holds
    return params


def write_family(path, objective):
    hf.write_model(path, ModelSpec(FAMILY, objective, 16, 12), family_params(), dtype="float32", max_shard=10**9,
                   model_type="my_gpt", files={})


@of("checkpoint_family")
@pytest.mark.parametrize("objective, model_type", [
    (AR(bos=False), "my_gpt"), (masked(4), "bd3lm_my_gpt"), (masked(16), "bd3lm_my_gpt")], ids=["ar", "blocks", "row"])
def test_a_family_of_checkpoints_goes_out_and_in(example, tmp_path, objective, model_type):
    write_family(tmp_path / "out", objective)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type
    spec, params = hf.read_model(tmp_path / "out")
    assert spec == ModelSpec(FAMILY, objective, 16, 12)
    jax.tree.map(np.testing.assert_array_equal, params, family_params())
    stored, blocks = load_file(tmp_path / "out" / "model.safetensors"), family_params()["blocks"]
    np.testing.assert_array_equal(stored["layers.1.qkv.weight"], blocks["qkv"]["kernel"][1].reshape(8, 24).T)
    np.testing.assert_array_equal(stored["layers.0.out.weight"], blocks["out"]["kernel"][0].reshape(8, 8).T)
    assert stored["tokens.weight"].shape == (13, 8) and len(stored) == 4 + 2 * 12


def test_a_family_is_converted_by_its_file_alone(tmp_path, monkeypatch, capsys):
    """From a folder that holds a copy of the file and nothing else."""
    name = "family_of_my_own"
    (tmp_path / f"{name}.py").write_bytes((FOLDER / "checkpoint_family.py").read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        importlib.import_module(name)
        write_family(tmp_path / "out", masked(4))
        del FORMATS["my_gpt"], sys.modules[name]
        with pytest.raises(UserError, match="model_type is 'my_gpt', supported: bd3lm"):
            bd3lm_jax.load(tmp_path / "out")
        assert main(["convert", f"--import={name}", "--from=out", "--to=again", "--check=0"]) == 0, capsys.readouterr()
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
        lm = bd3lm_jax.load(tmp_path / "again")
        assert lm.logits(jnp.full((1, 8), 12)).shape == (1, 8, 13)
    finally:
        FORMATS.pop("my_gpt", None)
        sys.modules.pop(name, None)
        plugins._requested.clear()


NETWORK_RUN = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
import network
import bd3lm_jax
from bd3lm_jax.core.schema import MeshConfig
from bd3lm_jax.models import sharding_rules
from bd3lm_jax.parallel import sharding
from bd3lm_jax.planning import flops
from bd3lm_jax.training.train import train
from configs import common, tiny
from toy_runs import LENGTH, toy_dict
preset = tiny.get_config("block_size=4")
common.set_model(preset, "relu")
values = toy_dict(folder, {"model": preset.model.to_dict(), "train.steps": 2, "mesh.data": 1, "mesh.fsdp": 2,
                           "mesh.tensor": 2, "diffusion.block_size": 4})
common.set_size(preset, "tiny")
result = train(values, folder / "run")
lm = bd3lm_jax.load(folder / "run")
places = sharding.param_shardings(lm.params, sharding.make_mesh(MeshConfig(1, 2, 2)), sharding_rules(lm.config.model))
kernel = lm.params["blocks"]["widen"]["kernel"]
counted = flops.parts(lm.config.model, lm.config.diffusion, batch=8, length=LENGTH, noise_samples=1)
print(json.dumps({"layers": preset.model.num_layers, "nll": result["train_nll"], "flops": counted.layers,
                  "part": places["blocks"]["widen"]["kernel"].shard_shape(kernel.shape),
                  "tokens": len(lm.generate(num=1, length=16)[0].tokens)}))
"""


@pytest.mark.ci_slow
def test_the_network_trains_on_four_devices_samples_and_is_counted(tmp_path):
    """Its file alone, copied into another folder."""
    (tmp_path / "network.py").write_bytes((FOLDER / "network.py").read_bytes())
    write_text(tmp_path / "text.txt", 60)
    done = run_python(NETWORK_RUN, tmp_path, devices=4)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == 1 and 0 < found["nll"] < 10 and 0 < found["tokens"] <= 16
    assert found["part"] == [2, 16, 24]
    length, size, width, hidden = 32, 4, 32, 48
    keys_values, token = 4 * width**2, 2 * (4 * width**2 + 2 * width * hidden)
    assert found["flops"] == 8 * (2 * length * token + (length - size) * (token + keys_values))
