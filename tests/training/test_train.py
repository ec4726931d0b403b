import json
import shutil

import jax
import numpy as np
import pytest
from toy_fed import fed
from toy_runs import AR, losses, network, run_python, steps_saved, toy_config, toy_dict, write_text

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.data.corpora import load_documents
from bd3lm_jax.data.loader import row_ids
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.likelihood import paired
from bd3lm_jax.training import program
from bd3lm_jax.training.train import train

RESULT = {"workdir", "step", "train_nll", "valid_nll", "valid_ppl", "tokens_per_s", "step_ms", "params", "wall_s"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("train")
    write_text(directory / "text.txt", 80)
    return directory


@pytest.fixture(scope="module")
def whole(home):
    """A run of six steps that nothing disturbed, its result, and how often its step was traced."""
    workdir, traces, original = home / "whole", [], program.make_step

    def counting(*arguments):
        step = original(*arguments)
        return lambda state, batch: traces.append(1) or step(state, batch)

    program.make_step = counting
    try:
        result = train(toy_config(home, {"checkpoint.every": 3, "eval.every": 3}), str(workdir))
    finally:
        program.make_step = original
    return workdir, result, len(traces)


def continued(whole, directory):
    """A copy of the undisturbed run that has lost its last checkpoint, as if it had been stopped at step 3."""
    shutil.copytree(whole[0], directory)
    shutil.rmtree(directory / "checkpoints" / "6")
    return directory


@pytest.mark.ci_slow
def test_a_run_too_short_for_its_warm_up(home, tmp_path, capsys):
    """The default config with a few steps: a shorter warm-up and a note, one full step at least, the final rate
    last."""
    config = toy_config(home, {"optim.schedule": "wsd", "optim.warmup_steps": 45, "train.steps": 4})
    result = train(config, str(tmp_path / "run"))
    assert result["step"] == 4 and rundir.read(tmp_path / "run")[0].optim.warmup_steps == 45
    rates = [line["train/lr"] for line in read_metrics(tmp_path / "run") if "train/lr" in line]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 0.0])
    assert "optim.warmup_steps=45 leaves no room within train.steps=4: warming up over 0" in capsys.readouterr().err
    assert train(toy_config(home, {"optim.schedule": "wsd", "optim.warmup_steps": 45, "train.steps": 6}),
                 str(tmp_path / "run"))["step"] == 6


def test_result_and_run_directory(whole):
    workdir, result, traces = whole
    assert set(result) == RESULT
    assert (result["workdir"], result["step"]) == (str(workdir), 6)
    assert result["valid_ppl"] == pytest.approx(np.exp(result["valid_nll"]))
    assert all(result[key] > 0 for key in ("train_nll", "valid_nll", "tokens_per_s", "step_ms", "params", "wall_s"))
    names = {path.name for path in workdir.iterdir()}
    assert names == {"config.json", "tokenizer.json", "metrics.jsonl", "report.json", paired.DOCUMENTS, "checkpoints",
                     "plots", "train.lock"}
    documents = paired.read(workdir)
    assert documents.nats_N.sum() / documents.tokens_N.sum() == pytest.approx(result["valid_nll"], rel=1e-9)
    texts = load_documents(rundir.read(workdir)[0].data, "valid")
    assert documents.tokens_N.tolist() == [len(text.encode()) + 1 for text in texts]  # bytes, and an end each
    assert steps_saved(workdir) == [3, 6]
    assert traces == 1


def test_metrics(whole):
    workdir, result, _ = whole
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    keys = {"step", "train/loss", "train/nll", "train/grad_norm", "train/lr", "train/masked_fraction",
            "train/tokens_per_s"}
    valid = {f"valid/{name}" for name in ("nll", "nll_low", "nll_high", "ppl", "bits_per_byte")}
    valid |= {f"valid/nll_at_{k}_masked" for k in (1, 2, 3, 4)}
    for line in lines:
        assert set(line) == (keys | valid if line["step"] in (3, 6) else keys)
        assert line["train/loss"] == line["train/nll"] and line["train/lr"] == pytest.approx(1e-2)
    assert lines[0]["train/loss"] == pytest.approx(np.log(257), rel=0.05)  # the head starts at zero
    assert lines[-1]["train/nll"] == result["train_nll"] < 5.0
    assert lines[-1]["valid/nll_low"] < lines[-1]["valid/nll"] == result["valid_nll"] < lines[-1]["valid/nll_high"]


def test_going_on_gives_the_same_losses_bit_for_bit(home, whole, tmp_path):
    """First half in one call with fewer steps, second half in another, which validates and logs in between."""
    workdir = str(tmp_path / "run")
    train(toy_config(home, {"train.steps": 3}), workdir)
    assert steps_saved(workdir) == [3]
    train(toy_config(home, {"checkpoint.every": 2}), workdir)
    assert losses(workdir) == losses(whole[0])


def test_a_finished_run_only_reports(home, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    again = train(toy_config(home), str(tmp_path / "run"))
    assert again["valid_nll"] == whole[1]["valid_nll"] and again["step_ms"] is None
    assert read_metrics(tmp_path / "run") == read_metrics(whole[0])


def test_fewer_steps_than_are_done_are_refused(home, whole):
    with pytest.raises(UserError, match="is at step 6.*train.steps=4"):
        train(toy_config(home, {"train.steps": 4}), str(whole[0]))


def test_a_damaged_newest_checkpoint_costs_only_its_steps(home, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    (workdir / "checkpoints" / "6" / "meta" / "metadata").write_text("{")
    train(toy_config(home), str(workdir))
    assert "warning: checkpoint" in (shown := capsys.readouterr().err) and "continuing from step 3" in shown
    assert losses(workdir) == losses(whole[0]) and steps_saved(workdir) == [3, 6]


def test_another_config_is_refused_with_the_keys_that_differ(home, whole):
    before = (whole[0] / "config.json").read_text()
    with pytest.raises(UserError) as error:
        train(toy_config(home, {"optim.lr": 0.5, "diffusion.block_size": 8}), str(whole[0]))
    assert error.value.exit_code == 2
    assert "diffusion.block_size: 8 != 4" in str(error.value) and "optim.lr: 0.5 != 0.01" in str(error.value)
    assert (whole[0] / "config.json").read_text() == before


def test_a_directory_of_something_else_is_left_alone(home, tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5" / "params").touch()
    with pytest.raises(UserError, match="holds checkpoints and no config.json"):
        train(toy_config(home), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_loss_that_is_not_finite_names_step_and_rows(home, whole, tmp_path, monkeypatch):
    """From step 5 on the network returns NaN; the checkpoint of step 3 stays, and the run can go on from it."""
    workdir, original = continued(whole, tmp_path / "run"), program.make_step

    def breaking(*arguments):
        step = original(*arguments)

        def broken(state, batch):
            new, metrics = step(state, batch)
            late = state.step >= 4
            return new, {**metrics, "loss": jax.numpy.where(late, jax.numpy.nan, metrics["loss"]),
                         "finite": metrics["finite"] & ~late}
        return broken

    monkeypatch.setattr(program, "make_step", breaking)
    config = toy_config(home)
    rows = prepare(config.data, "train", 4, prepare_tokenizer(config.data))
    ids = ", ".join(map(str, row_ids(len(rows), 8, config.seed, 4)))
    message = f"the loss of step 5 is not finite .*rows {ids} of the training split.*optim.lr"
    with pytest.raises(RunError, match=message) as error:
        train(config, str(workdir))
    assert error.value.exit_code == 1
    assert steps_saved(workdir) == [3] and max(losses(workdir)) == 4


@pytest.mark.ci_slow
def test_a_diverging_run_stops(home, tmp_path):
    with pytest.raises(RunError, match="the loss of step [2-6] is not finite"):
        train(toy_config(home, {"optim.lr": 1e30, "optim.clip_norm": 0.0}), str(tmp_path / "run"))
    assert steps_saved(tmp_path / "run") == []


def test_a_save_that_fails_is_an_error_of_the_run(home, whole, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    workdir = continued(whole, tmp_path / "run")
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(RunError, match="could not save .*No space left on device; the last complete .* is step 3"):
        train(toy_config(home), str(workdir))
    assert steps_saved(workdir) == [3]


@pytest.mark.ci_slow
def test_a_save_that_fails_in_the_background_ends_the_run_before_the_next_one(home, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "_wait_for_checkpointers", full)  # what the background waits for
    with pytest.raises(RunError, match="could not save a checkpoint .*No space left on device"):
        train(toy_config(home, {"train.steps": 200, "checkpoint.every": 20, "eval.every": 200}), str(tmp_path / "run"))
    assert 20 <= max(losses(tmp_path / "run")) < 40


def test_a_work_directory_that_cannot_be_made(home, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in .*file/run: Not a directory"):
        train(toy_config(home), str(tmp_path / "file" / "run"))


@pytest.mark.ci_slow
def test_starting_from_a_run_of_another_block_size(home, whole, tmp_path, capsys):
    """The weights of the first step are the average of the other run: the loss starts where that one had come to."""
    changes = {"diffusion.block_size": 8, "train.init_from": str(whole[0]), "train.steps": 1, "optim.lr": 1e-9}
    train(toy_config(home, changes), str(tmp_path / "run"))
    assert f"starting from the weights of {whole[0]}, step 6" in capsys.readouterr().err
    model, params = network(toy_config(home))
    shapes = jax.eval_shape(lambda: params)
    with Checkpoints(whole[0], 1, read_only=True) as there, Checkpoints(tmp_path / "run", 1, read_only=True) as here:
        old, new = (checkpoints.restore_params("ema", shapes)[0] for checkpoints in (there, here))
    for left, right in zip(jax.tree.leaves(old), jax.tree.leaves(new)):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_starting_from_a_run_with_another_tokenizer_is_refused(home, whole, tmp_path):
    with pytest.raises(UserError, match="tokenizer .* does not match train.init_from="):
        train(toy_config(home, {"train.init_from": str(whole[0]), "data.tokenizer": "bpe:270"}), str(tmp_path / "run"))


@pytest.mark.ci_slow
def test_autoregressive_run(home, tmp_path):
    result = train(toy_config(home, {"diffusion": AR, "model.adaln": False, "train.steps": 2}), str(tmp_path / "run"))
    assert result["step"] == 2 and result["valid_nll"] < np.log(257)


# ---- processes


# Runs of one process, one after the other: configs and work directories, and where it is recorded what they were fed.
RUNS = """
import json, sys
from toy_fed import record
from bd3lm_jax.config import Config
from bd3lm_jax.training.train import train
record(sys.argv[2])
print(json.dumps([train(Config.from_dict(config), workdir)["valid_nll"]
                  for config, workdir in json.loads(sys.argv[1])]))
"""
MESHES = {"one": (1, {}), "data": (8, {"mesh.data": 8}), "fsdp": (8, {"mesh.data": 1, "mesh.fsdp": 8}),
          "all": (8, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.slices": 2})}


@pytest.mark.ci_slow
def test_devices_and_meshes_give_the_same_losses(home, tmp_path):
    """Five steps on one device and on eight in three meshes, on the same rows; the last one also writes samples.

    Then two more steps on each, all from the checkpoint that the one device wrote.
    """
    found, rows = {}, {}
    for name, (devices, mesh) in MESHES.items():
        workdir, more, changes = tmp_path / name, tmp_path / f"{name}-more", {"model.num_layers": 3} | mesh
        runs = [(toy_dict(home, changes | {"train.steps": 5, "eval.num_samples": int(name == "all")}), str(workdir)),
                (toy_dict(home, changes | {"train.steps": 7}), str(more))]
        if name != "one":  # which has nothing to go on from: seven steps at once
            shutil.copytree(tmp_path / "one", more)
        done = run_python(RUNS, json.dumps(runs), tmp_path / f"{name}.fed", devices=devices, timeout=600)
        assert done.returncode == 0, done.stderr
        assert ("continuing from step 5" in done.stderr) == (name != "one")
        found[name] = [*losses(workdir).values(), *losses(more).values(), *json.loads(done.stdout.splitlines()[-1])]
        rows[name] = fed(tmp_path / f"{name}.fed")
    assert len(found["one"]) == 5 + 7 + 2 and sorted(rows["one"]) == list(range(7))
    assert {len(step) for step in rows["one"].values()} == {3 * 8}  # tokens, segments and positions of every row
    for name in MESHES:
        np.testing.assert_allclose(found[name], found["one"], rtol=0, atol=1e-5)
        assert rows[name] == rows["one"]
