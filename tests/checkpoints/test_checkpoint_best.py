"""Which checkpoints stay: the latest ones and the best by their bound; a step that is chosen by name or number."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_runs import LENGTH, toy_config, write_text

from bd3lm_jax.checkpoints import checkpoint
from bd3lm_jax.checkpoints.checkpoint import CheckpointNotFound, Checkpoints
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.training import report
from bd3lm_jax.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step):
    value = jnp.full(3, step, jnp.float32)
    return TrainState(jnp.int32(step), {"w": value}, {"w": value}, {"m": value})


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def saved(workdir, bounds, keep, keep_best):
    """Steps 1, 2, ... with these bounds; returns the steps that are there after each save."""
    there = []
    with Checkpoints(workdir, keep, keep_best=keep_best) as checkpoints:
        first = (checkpoints.latest_step() or 0) + 1
        for step, bound in enumerate(bounds, first):
            checkpoints.save(step, make_state(step), {}, wait=True, bound=bound)
            there.append(sorted(int(path.name) for path in checkpoints.directory.iterdir() if path.name.isdecimal()))
    return there


def expected(bounds, keep, keep_best):
    """The law by enumeration: after each save the `keep` latest and the `keep_best` lowest of what was there stay."""
    steps, found = [], []
    for step in range(1, len(bounds) + 1):
        steps = [*steps, step]
        known = [s for s in steps if bounds[s - 1] is not None and np.isfinite(bounds[s - 1])]
        best = sorted(known, key=lambda s: (bounds[s - 1], -s))[:keep_best]
        steps = sorted({*steps[-keep:], *best})
        found.append(steps)
    return found


@pytest.mark.parametrize("bounds, keep, keep_best", [
    ((3.0, 1.0, 2.0, 5.0, 4.0), 2, 1), ((3.0, None, 2.0, None, 4.0), 1, 2), ((1.0, 1.0, 1.0, None), 1, 1),
    ((None, float("nan"), float("inf"), None, 2.0, None), 1, 2), ((1.0, 2.0, 3.0), 1, 0)])
def test_the_best_stays_beside_the_latest(tmp_path, bounds, keep, keep_best):
    assert saved(tmp_path, bounds, keep, keep_best) == expected(bounds, keep, keep_best)


def test_a_run_that_goes_on_still_knows_the_best(tmp_path):
    saved(tmp_path, (2.0, 1.0, 3.0), 1, 1)
    assert saved(tmp_path, (4.0, 5.0), 1, 1) == [[2, 4], [2, 5]]
    assert saved(tmp_path, (0.5, None), 1, 1) == [[6], [6, 7]]
    with Checkpoints(tmp_path, 1, read_only=True) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (6, 7)


def test_a_step_by_name_and_number(tmp_path):
    saved(tmp_path, (2.0, 1.0, 3.0), 3, 0)
    with Checkpoints(tmp_path, 3, read_only=True) as checkpoints:
        for which, step in (("latest", 3), ("best", 2), (1, 1)):
            assert int(checkpoints.restore(ABSTRACT, which)[0].step) == step
            tree, _, found = checkpoints.restore_params("ema", ABSTRACT.ema, which)
            assert found == step and tree["w"][0] == step
        with pytest.raises(CheckpointNotFound,
                           match="no step 4 in .*: there are 1, 2, 3; give one of these as --step") as error:
            checkpoints.restore(ABSTRACT, 4)
        assert error.value.exit_code == 2


def test_without_validation_there_is_no_best(tmp_path):
    saved(tmp_path, (None, None), 2, 1)
    with Checkpoints(tmp_path, 2, read_only=True) as checkpoints:
        assert checkpoints.best_step() is None
        with pytest.raises(CheckpointNotFound,
                           match="was validated, so that none is the best: there are 1, 2; give one of these"):
            checkpoints.restore(ABSTRACT, "best")


def test_a_chosen_step_that_is_damaged_is_never_replaced_by_another(tmp_path):
    saved(tmp_path, (2.0, 1.0, 3.0), 3, 0)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "params")
    with Checkpoints(tmp_path, 3) as checkpoints:
        for which in (2, "best"):
            with pytest.raises(RunError, match="checkpoints/2 is damaged .*: there are 1, 2, 3; give another --step"):
                checkpoints.restore(ABSTRACT, which)
    assert (tmp_path / "checkpoints" / "2").exists()


def test_a_changed_bound_is_damage(tmp_path):
    """A bound is part of the sealed record: a flipped digit cannot make another step the best."""
    saved(tmp_path, (2.0, 1.5), 2, 1)
    path = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"bound": 2.0', '"bound": 1.0'))
    with Checkpoints(tmp_path, 2, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 2


def test_steps_of_earlier_versions_have_no_bound(tmp_path):
    saved(tmp_path, (2.0, 3.0), 2, 0)
    path = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    record = json.loads(path.read_text())["record"]
    del record["bound"]
    path.write_text(json.dumps(checkpoint._with_hash(record)))
    with Checkpoints(tmp_path, 2, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 2
        assert int(checkpoints.restore(ABSTRACT, 1)[0].step) == 1


@pytest.mark.ci_slow
def test_training_keeps_its_best(tmp_path, monkeypatch):
    """Validated every second step, with a learning rate that grows until it spoils the weights. What is logged as
    valid/nll tells which step is to stay; the last one is compared by the same rows and noise as the others."""
    write_text(tmp_path / "text.txt", 80)
    changes = {"train.steps": 8, "eval.every": 2, "checkpoint.every": 1, "checkpoint.keep": 1, "eval.rows": 4,
               "eval.report_rows": 3, "optim.ema_decay": 0.0, "optim.lr": 1.0, "optim.warmup_steps": 8}
    bounds, original = {}, Checkpoints.save

    def save(self, step, *arguments, bound, **options):
        bounds[step] = bound
        return original(self, step, *arguments, bound=bound, **options)

    monkeypatch.setattr(Checkpoints, "save", save)
    train(toy_config(tmp_path, changes), str(tmp_path / "run"))
    logged = {line["step"]: line["valid/nll"] for line in read_metrics(tmp_path / "run") if "valid/nll" in line}
    assert {step: bound for step, bound in bounds.items() if bound is not None and step < 8} == {
        step: nll for step, nll in logged.items() if step < 8}
    assert bounds[8] != logged[8], "the last validation is of three rows"
    assert report.read(tmp_path / "run")["valid"]["tokens"] == 3 * LENGTH
    best = min((step for step in bounds if bounds[step] is not None), key=bounds.get)
    assert best < 8, "the learning rate is meant to spoil the weights"
    with Checkpoints(tmp_path / "run", 1, read_only=True) as checkpoints:
        assert checkpoints.steps() == [best, 8] and checkpoints.best_step() == best


def test_a_published_checkpoint_has_no_steps():
    from bd3lm_jax.checkpoints.restore import refuse_step

    refuse_step("model", "latest")
    with pytest.raises(UserError, match="has no steps: leave --step=best out"):
        refuse_step("model", "best")
