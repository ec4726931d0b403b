"""Every writer on a disk without room, by a limit of the size of files: one line, exit code 1, nothing left behind."""

import os

import numpy as np
import pytest
from toy_runs import toy_config, toy_dict, write_text

from bd3lm_jax.checkpoints.published import tensors
from bd3lm_jax.core import files, log
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.experiments.bench import full_disk
from bd3lm_jax.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a short run, and the text beside it."""
    home = tmp_path_factory.mktemp("home")
    write_text(home / "text.txt", 60)
    config = toy_config(home, {"train.steps": 1, "diffusion": {**toy_dict(home, {})["diffusion"]}})
    train(config, str(home / "run"))
    return home


@pytest.fixture
def place(run, tmp_path):
    return full_disk.prepare_place(tmp_path, run / "text.txt", run / "run")


@pytest.mark.ci_slow
@pytest.mark.parametrize("name", full_disk.WRITERS)
def test_says_so_and_leaves_nothing(place, name, monkeypatch):
    monkeypatch.setattr(log, "note", lambda text: None)  # what pytest captures is a file too
    assert full_disk.outcome(name, place) == ""


def test_a_writer_that_does_otherwise_is_found(tmp_path, monkeypatch):
    directory = tmp_path / "full"
    directory.mkdir()
    place = full_disk.Place(directory, tmp_path, tmp_path, tmp_path)

    def torn(place):
        (place.directory / "a").write_bytes(bytes(100))

    def wrong_code(place):
        raise UserError("cannot write: File too large; free some space")

    def left(place):
        (place.directory / "b").write_bytes(b"1")
        raise RunError("cannot write: File too large; free some space")

    for function, said in ((torn, "a traceback: OSError"), (wrong_code, "exit code 2"), (left, "it left b"),
                           (lambda place: None, "as if there were room")):
        monkeypatch.setitem(full_disk.WRITERS, "it", function)
        assert said in full_disk.outcome("it", place)


def test_weights_say_why_they_cannot_be_written(tmp_path):
    """The library of safetensors raises an error of its own, which holds the number of the system's."""
    with pytest.raises(OSError) as error, full_disk.full():
        tensors.write_file(tmp_path / "model.safetensors", {"a": np.zeros(1000)})
    assert error.value.strerror == "File too large"


def test_a_device_is_written_and_never_replaced(tmp_path):
    before = os.stat("/dev/null").st_ino
    files.write("/dev/null", b"a")
    assert os.stat("/dev/null").st_ino == before
    if os.path.exists("/dev/full"):
        with pytest.raises(RunError,
                           match="cannot write /dev/full: No space left on device; free some space, or choose"):
            with files.errors("/dev/full", "choose another --out"):
                files.write("/dev/full", b"a")


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").write_bytes(b"old")
    os.symlink(tmp_path / "there", tmp_path / "link")
    files.write(tmp_path / "link", b"new")
    assert os.path.islink(tmp_path / "link") and (tmp_path / "there").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


@pytest.mark.parametrize("number, work_started, kind", [(28, False, RunError), (30, False, UserError),
                                                        (30, True, RunError), (13, False, UserError)])
def test_exit_codes_of_disks(number, work_started, kind):
    with pytest.raises(kind) as error, files.errors("a", "choose another --out", work_started):
        raise OSError(number, "why")
    assert type(error.value) is kind and ("free some space" in str(error.value)) == (number == 28)
