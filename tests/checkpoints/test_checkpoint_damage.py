"""Checkpoints whose files are not what was saved: found, skipped, set aside, and told of."""

import os
import shutil

import pytest
from toy_checkpoints import abstract, assert_equal, make_state, restore, saved

from bd3lm_jax.checkpoints.checkpoint import Checkpoints
from bd3lm_jax.core.errors import RunError, UserError

# Reads that fail leave coroutines behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("item", ["params", "ema", "opt"])
@pytest.mark.parametrize("position", [0.3, 0.7])
def test_flipped_bit_falls_back_to_the_previous_step(tmp_path, item, position):
    directory = saved(tmp_path, [1, 2])
    path = largest(directory / "2" / item)
    flip_bit(path, int(position * path.stat().st_size))
    state, _, warnings = restore(tmp_path)
    assert_equal(state, make_state(1))
    assert len(warnings) == 1 and "checkpoints/2 is damaged" in warnings[0] and "\n" not in warnings[0]


def test_flipped_bit_is_named_by_its_array(tmp_path):
    directory = saved(tmp_path, [1, 2])
    path = largest(directory / "2" / "params")
    flip_bit(path, path.stat().st_size // 2)
    assert "params/blocks/qkv/kernel differs from its fingerprint" in restore(tmp_path, read_only=True)[2][0]


def change_meta(step):
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"seed": 2', '"seed": 3'))


DAMAGE = {
    "meta changed": change_meta,
    "meta cut": lambda step: os.truncate(step / "meta" / "metadata", 40),
    "meta gone": lambda step: shutil.rmtree(step / "meta"),
    "array data cut": lambda step: os.truncate(largest(step / "params"), 100),
    "array data gone": lambda step: largest(step / "params").unlink(),
    "item gone": lambda step: shutil.rmtree(step / "opt"),
    "half deleted": lambda step: [shutil.rmtree(step / name) for name in ("opt", "meta", "params")],
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_step_is_skipped_moved_away_and_saved_again(tmp_path, damage):
    directory = saved(tmp_path, [1, 2])
    DAMAGE[damage](directory / "2")
    state, _, warnings = restore(tmp_path, read_only=True)
    assert_equal(state, make_state(1))
    assert len(warnings) == 1 and (directory / "2").exists()
    with Checkpoints(tmp_path, keep=1, warn=warnings.append) as checkpoints:
        assert_equal(checkpoints.restore(abstract(make_state(0)))[0], make_state(1))
        assert checkpoints.steps() == [1] and (directory / ".damaged" / "2").exists()
        checkpoints.save(2, make_state(2), {})
    assert_equal(restore(tmp_path)[0], make_state(2))


def test_half_written_step_is_never_seen(tmp_path):
    directory = saved(tmp_path, [1, 2])
    os.rename(directory / "2", directory / "2.orbax-checkpoint-tmp-0")
    state, _, warnings = restore(tmp_path)
    assert_equal(state, make_state(1))
    assert not warnings


def test_nothing_readable_is_an_error_and_moves_nothing(tmp_path):
    directory = saved(tmp_path, [1, 2])
    for step in ("1", "2"):
        shutil.rmtree(directory / step / "params")
    with pytest.raises(RunError, match=r"none of the checkpoints \[1, 2\]") as error:
        restore(tmp_path)
    assert error.value.exit_code == 1 and (directory / "1").exists() and (directory / "2").exists()


def test_warnings_go_to_stderr(tmp_path, capsys):
    directory = saved(tmp_path, [1, 2])
    shutil.rmtree(directory / "2" / "opt")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.restore(abstract(make_state(0)))
    assert "checkpoints/2 is damaged" in capsys.readouterr().err


def test_other_format_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("bd3lm_jax.checkpoints.checkpoint.FORMAT", 99)
    saved(tmp_path, [1])
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 99, this version reads 1"):
        restore(tmp_path)
