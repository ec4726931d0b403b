"""Files are whole: what stands there after a failed write is what stood there before, and nothing else."""

import errno
import os

import pytest

from bd3lm_jax.core import files


def test_replaces_a_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    files.write(path, b"one")
    files.write(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write(path, b"one")
    with pytest.raises(OSError), files.atomic_replace(path) as temporary:
        temporary.write_bytes(b"hal")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["a.json"]


def test_an_unchanged_file_is_not_written_again(tmp_path):
    path = tmp_path / "a.json"
    files.write(path, b"one")
    before = os.stat(path).st_ino
    files.write(path, b"one")
    assert os.stat(path).st_ino == before


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    path, order = tmp_path / "a.json", []
    synced, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (order.append(("sync", os.readlink(f"/proc/self/fd/{d}"))), synced(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("name", str(a))), replace(a, b)))
    files.write(path, b"one")
    (first, written), (second, named), third = order
    assert (first, second) == ("sync", "name") and written == named and third == ("sync", str(tmp_path))


def test_temporary_names_differ_between_hosts_with_the_same_process_id(monkeypatch):
    names = set()
    for host in ("a", "b"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        names |= {files.temporary_name("x") for _ in range(2)}
    assert len(names) == 4
