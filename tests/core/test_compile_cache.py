"""Compiled programs on disk: the same numbers, and never in the way."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from toy_runs import ROOT, environment, losses, write_text

from bd3lm_jax.core import compile_cache, paths

X86 = ("processor : 0\nvendor_id : GenuineIntel\nmodel name : Xeon\nflags : fpu sse4_2 avx2\ncpu MHz : {}\n\n"
       "processor : 1\n")
TRAIN = """
import sys
from pathlib import Path
import bd3lm_jax
from toy_runs import toy_config
directory, workdir = map(Path, sys.argv[1:])
bd3lm_jax.train.train(toy_config(directory, {"train.steps": 8, "eval.num_samples": 1}), workdir)
"""


@pytest.fixture
def settings(monkeypatch):
    """As where neither the user nor these tests chose a directory."""
    before = {name: getattr(jax.config, name) for name in (
        "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs")}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def chosen() -> str | None:
    compile_cache.enable()
    return jax.config.jax_compilation_cache_dir


def test_on_by_default_bounded_and_private(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "cache"))
    path = Path(chosen())
    assert path.parent == tmp_path / "cache" and path.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_max_size == 2 << 30


def test_what_the_user_chose_stays(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(compile_cache.VARIABLE, "off")
    assert chosen() is None
    monkeypatch.delenv(compile_cache.VARIABLE)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert chosen() == str(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()


def test_no_place_is_no_error(settings, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "file"))
    assert chosen() is None
    monkeypatch.setenv("BD3LM_CACHE", "gs://bucket/cache")
    assert chosen() is None


@pytest.mark.parametrize("home", ["", "/proc/nowhere"])
def test_without_a_home_it_is_where_prepared_data_is(home, settings, monkeypatch, tmp_path):
    monkeypatch.delenv("BD3LM_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", home)
    path = Path(chosen())
    assert path.parent == paths.default_cache() and path.parent.parent == tmp_path
    jax.config.update("jax_compilation_cache_dir", None)
    path.parent.chmod(0o777)  # which others can write
    assert chosen() is None


def test_a_directory_that_others_can_write_is_not_trusted(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path))
    path = compile_cache.directory()
    path.mkdir()
    path.chmod(0o777)
    assert chosen() is None
    path.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda uid=os.getuid(): uid + 1)  # somebody else's name, and owner
    compile_cache.directory().symlink_to(path)
    assert chosen() is None


def test_machines_of_another_kind_have_another_directory(tmp_path):
    """A home may be shared by machines; what the clock says at the moment does not count."""
    paths = [tmp_path / name for name in ("one", "faster", "older", "none")]
    for path, text in zip(paths, (X86.format(2000), X86.format(2900), X86.format(2000).replace(" avx2", ""))):
        path.write_text(text)
    one, faster, older, none = map(compile_cache.cpu, map(str, paths))
    assert one == faster and len({one, older, none}) == 3


def test_programs_written_in_part_are_removed(settings, monkeypatch, tmp_path):
    """A kill between a program and its stamp would keep jax from ever writing to the directory again."""
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path))
    path = compile_cache.directory()
    path.mkdir(mode=0o700)
    for name, program, stamp in (("whole", b"code", bytes(8)), ("unstamped", b"co", None), ("torn", b"code", b""),
                                 ("empty", b"", bytes(8))):
        (path / f"{name}-cache").write_bytes(program)
        if stamp is not None:
            (path / f"{name}-atime").write_bytes(stamp)
    assert chosen() == str(path)
    assert {file.name for file in path.iterdir()} - {".lockfile"} == {"whole-cache", "whole-atime"}


@pytest.mark.ci_slow
def test_numbers_are_the_same_bit_for_bit(tmp_path):
    """Without the cache; by two processes that fill it at a time; and from it, where nothing is compiled anew."""
    write_text(tmp_path / "text.txt", 200)
    env = {key: value for key, value in environment().items() if not key.startswith(("JAX_COMP", "JAX_PERS"))}
    env |= {"BD3LM_CACHE": str(tmp_path / "programs")}

    def start(name: str, mode: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", TRAIN, tmp_path, tmp_path / name], cwd=ROOT, text=True,
                                env=env | {compile_cache.VARIABLE: mode}, stderr=subprocess.PIPE)

    def end(*processes: subprocess.Popen) -> None:
        for process in processes:
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0 and "arning" not in said, said

    def programs() -> set[str]:
        return {file.name for file in tmp_path.glob("programs/programs-*/*-cache")}

    end(start("off", "off"))
    assert not programs()
    end(start("cold", "on"), start("beside", "on"))
    filled = programs()
    assert any("step" in name for name in filled)
    end(start("warm", "on"))
    assert programs() == filled
    expected = losses(tmp_path / "off")
    assert len(expected) == 8
    for name in ("cold", "beside", "warm"):
        assert losses(tmp_path / name) == expected
        for file in ("report.json", "samples/step_8.txt"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "off" / file).read_bytes()
