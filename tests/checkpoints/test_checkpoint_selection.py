"""Steps that a run deletes while they are read: no damage, and the newest one is read instead."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PARAMS = {"w": jnp.arange(4.0)}


def save(workdir, steps, keep, bounds=None):
    with Checkpoints(workdir, keep, keep_best=1 if bounds else 0) as checkpoints:
        for step in steps:
            state = TrainState(step=jnp.int32(step), params={"w": PARAMS["w"] + step}, ema={}, opt_state={})
            checkpoints.save(step, state, {}, bound=bounds and bounds[step])


def read(workdir, which, monkeypatch, meanwhile, at="params"):
    """(params, step, warnings) of a reader; `meanwhile()` happens once, before it reads an item of its first step."""
    original, warnings = Checkpoints._restore_items, []

    def restored(self, step, **arguments):
        if at in arguments:
            monkeypatch.setattr(Checkpoints, "_restore_items", original)
            meanwhile()
        return original(self, step, **arguments)

    monkeypatch.setattr(Checkpoints, "_restore_items", restored)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    with Checkpoints(workdir, 1, read_only=True, warn=warnings.append) as checkpoints:
        params, _, step = checkpoints.restore_params("params", abstract, which)
    return np.asarray(params["w"]), step, warnings


@pytest.mark.parametrize("at", ["meta", "params"])
def test_the_latest_step_that_training_deletes_meanwhile_gives_way_to_the_newest(tmp_path, monkeypatch, at):
    save(tmp_path, [1, 2], keep=2)
    w, step, warnings = read(tmp_path, "latest", monkeypatch, lambda: save(tmp_path, [3, 4, 5], keep=1), at)
    assert step == 5 and not warnings
    np.testing.assert_array_equal(w, np.arange(4.0) + 5)


def test_the_best_step_is_looked_for_anew_as_well(tmp_path, monkeypatch):
    save(tmp_path, [1, 2], keep=1, bounds={1: 3.0, 2: 4.0})
    w, step, warnings = read(tmp_path, "best", monkeypatch,
                             lambda: save(tmp_path, [3, 4], keep=1, bounds={3: 2.0, 4: 2.5}))
    assert step == 3 and not warnings and w[0] == 3


def test_a_numbered_step_is_told_to_be_gone(tmp_path, monkeypatch):
    save(tmp_path, [1, 2], keep=2)
    with pytest.raises(UserError) as error:
        read(tmp_path, 1, monkeypatch, lambda: save(tmp_path, [3, 4], keep=2))
    assert error.value.exit_code == 2 and "damaged" not in str(error.value)
    assert "step 1 in" in str(error.value) and "was deleted while it was read" in str(error.value)
    assert "there are 3, 4; give one of these" in str(error.value)


def test_a_directory_that_goes_away_as_a_whole_has_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, [1, 2], keep=2)
    with pytest.raises(UserError, match="no checkpoint in .*: train first"):
        read(tmp_path, "latest", monkeypatch, lambda: [shutil.rmtree(tmp_path / "checkpoints" / x) for x in "12"])


def test_steps_that_never_stay_end_after_some_looks(tmp_path, monkeypatch):
    """Each is deleted when it is read, and a later one is there."""
    save(tmp_path, [1], keep=1)
    original, coming = Checkpoints._restore_items, iter(range(2, 100))

    def restored(self, step, **arguments):
        save(tmp_path, [next(coming)], keep=1)
        return original(self, step, **arguments)

    monkeypatch.setattr(Checkpoints, "_restore_items", restored)
    with pytest.raises(UserError, match="was deleted while it was read, the last time 20: run the same command again"):
        with Checkpoints(tmp_path, 1, read_only=True) as checkpoints:
            checkpoints.restore_params("params", PARAMS)


def test_what_is_there_and_cannot_be_read_is_damaged_all_the_same(tmp_path, monkeypatch):
    save(tmp_path, [1, 2], keep=2)

    def damage():
        for step in "12":
            shutil.rmtree(tmp_path / "checkpoints" / step / "params")

    with pytest.raises(RunError, match=r"none of the checkpoints \[1, 2\]"):
        read(tmp_path, "latest", monkeypatch, damage)
