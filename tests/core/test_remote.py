"""Inputs of other file systems, by the one of fsspec that lies in memory: every reader, copies, and what goes wrong."""

import errno
import json

import fsspec
import pytest
from toy_runs import toy_config

from bd3lm_jax.core import remote, untrusted_files
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.data.corpora import open_corpus
from bd3lm_jax.data.density.file import Annotations
from bd3lm_jax.evaluation.settings import read_object
from bd3lm_jax.evaluation.tasks.math500 import MATH500
from bd3lm_jax.evaluation.tasks.task import read_problems
from bd3lm_jax.generation.sample_files import read as read_samples
from launch.infill import read_texts

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]


def put(path: str, content: str) -> str:
    MEMORY.pipe_file(path, content.encode())
    return f"memory:/{path}"


def test_a_local_path_is_itself(tmp_path):
    assert remote.fetch(tmp_path / "x") == tmp_path / "x"
    assert remote.fetch(str(tmp_path)) == tmp_path


def test_a_name_that_looks_like_a_scheme_and_is_there_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory:").mkdir()
    (tmp_path / "memory:" / "x").write_text("here")
    assert remote.fetch("memory://x").read_text() == "here"


def test_a_copy_is_made_once_for_each_state(monkeypatch):
    url = put("/texts/a.txt", "one")
    copied, plain = [], type(MEMORY).get_file
    monkeypatch.setattr(type(MEMORY), "get_file", lambda *args: copied.append(args[1]) or plain(*args))
    first = remote.fetch(url)
    assert first.name == "a.txt" and first.read_text() == "one" and remote.fetch(url) == first
    assert len(copied) == 1
    put("/texts/a.txt", "two!")
    assert remote.fetch(url).read_text() == "two!" and first.read_text() == "one"


def test_a_directory_is_copied_whole_and_a_copy_that_was_cut_short_is_completed(monkeypatch):
    put("/d/train.txt", "a\nb\n")
    put("/d/more/valid.txt", "c\n")
    plain = type(MEMORY).get_file

    def fails_once(self, name, target, **kwargs):
        monkeypatch.setattr(type(MEMORY), "get_file", plain)
        raise ConnectionError("the line was cut")

    monkeypatch.setattr(type(MEMORY), "get_file", fails_once)
    with pytest.raises(UserError, match="^cannot read memory://d: the line was cut$"):
        remote.fetch("memory://d")
    copy = remote.fetch("memory://d")
    assert {str(path.relative_to(copy)): path.read_text() for path in copy.rglob("*") if path.is_file()} == {
        "train.txt": "a\nb\n", "more/valid.txt": "c\n"}


@pytest.mark.parametrize("path", ["memory://texts", "memory://texts/train.txt"])
def test_documents_are_those_of_the_same_local_text(path, tmp_path):
    (tmp_path / "texts").mkdir()
    for name, text in (("train.txt", "one\ntwo\nthree\n"), ("valid.txt", "four\n")):
        put(f"/texts/{name}", text)
        (tmp_path / "texts" / name).write_text(text)
    here = toy_config(tmp_path, {"data.source": "text", "data.path": path.replace("memory:/", str(tmp_path))}).data
    there = toy_config(tmp_path, {"data.source": "text", "data.path": path}).data
    for split in ("train", "valid"):
        found, expected = open_corpus(there, split), open_corpus(here, split)
        assert list(found.documents()) == list(expected.documents()) != []
        assert found.fingerprint() == expected.fingerprint()


SPANS = {"text": "abc", "spans": [[0, 1]]}
PROBLEM = {"problem": "1+1?", "answer": "2", "unique_id": "a", "solution": "", "subject": "", "level": 1}


@pytest.mark.parametrize("read, content, expected", [
    (read_object, json.dumps({"steps": 3}), {"steps": 3}), (read_texts, "a [3] b\n", ["a [3] b"]),
    (lambda path: read_samples(path).texts, json.dumps({"text": "abc"}), ["abc"]),
    (lambda path: Annotations(remote.fetch(path)).find("abc"), json.dumps(SPANS), [(0, 1)]),
    (lambda path: len(read_problems(MATH500, path).problems), json.dumps(PROBLEM), 1),
])
def test_every_reader_of_inputs(read, content, expected):
    assert read(put("/inputs/file.jsonl", content)) == expected


def test_a_copy_is_read_with_the_limits_of_local_files():
    with pytest.raises(OSError, match="more than 3 bytes"):
        untrusted_files.read_bytes(remote.fetch(put("/big", "long")), 3)


def test_a_package_that_is_missing_is_named():
    fsspec.register_implementation("missing", "no_such_package.System", errtxt="Please install no-such-package",
                                   clobber=True)
    with pytest.raises(UserError, match=r"^missing://b/x: missing:// cannot be read here \(Please install no-such-"
                                        r"package\): install what is missing, or give a local copy$"):
        remote.fetch("missing://b/x")


@pytest.mark.parametrize("url", ["memory://nothing", "memory://empty", "file:///dev/zero"])
def test_what_cannot_be_read_is_one_line(url):
    MEMORY.makedirs("/empty")
    with pytest.raises(UserError, match=f"^cannot read {url}: [^\\n]+$"):
        remote.fetch(url)


def test_names_that_lead_out_of_the_directory_are_refused(cache, monkeypatch):
    put("/d/../evil.txt", "x")
    names = {"/d/../evil.txt": {"type": "file", "size": 1}}
    monkeypatch.setattr(type(MEMORY), "info", lambda self, path: {"type": "directory"})
    monkeypatch.setattr(type(MEMORY), "find", lambda self, path, detail: names)
    with pytest.raises(UserError, match="no file of that name"):
        remote.fetch("memory://d")
    assert not list(cache.rglob("evil*"))


def test_a_full_disk_is_a_run_error(cache, monkeypatch):
    def full(self, name, target, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    url = put("/a", "x")
    monkeypatch.setattr(type(MEMORY), "get_file", full)
    with pytest.raises(RunError, match="cannot copy memory://a to .*No space left on device; free some space"):
        remote.fetch(url)
    assert not [path for path in cache.rglob("*") if path.is_file()]
