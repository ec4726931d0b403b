"""Large texts are prepared in parts: killed and started again, or by several processes, the result is the same."""

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.data import manifest, parts
from bd3lm_jax.data.corpora import Corpus
from bd3lm_jax.data.dialogues import Dialogue
from bd3lm_jax.data.prepare import prepare, prepare_corpus
from bd3lm_jax.data.tokenizers import ByteTokenizer, get_tokenizer

BLOCK, PART = 8, 2000


@pytest.fixture
def text_config(data_config, tmp_path):
    """300 documents, some of them long, in a dozen parts of PART characters."""
    path = tmp_path / "some.txt"
    path.write_text("".join(f"{i} " + "abcdéfgh"[i % 8] * (1 + 7 * i % 150) + "\n" for i in range(300)))
    return lambda **changes: data_config(source="text", path=str(path), **changes)


def content(rows):
    return {file.name: file.read_bytes() for file in rows.path.iterdir()}


def one_part(make_config, tmp_path, tokenizer, **changes):
    """What an undisturbed build in a single part gives, in another cache."""
    return content(prepare(make_config(cache_dir=str(tmp_path / "whole"), **changes), "train", BLOCK, tokenizer))


@pytest.mark.parametrize("layout, tokenizer", [("wrap", "gpt2"), ("pack", "bytes")])
def test_parts_and_workers_change_nothing(text_config, tmp_path, monkeypatch, layout, tokenizer):
    tokenizer = get_tokenizer(tokenizer, tuple)
    expected = one_part(text_config, tmp_path, tokenizer, packing=layout)
    monkeypatch.setattr(parts, "PART_CHARS", PART)
    for workers in (1, 2):
        data, calls = text_config(packing=layout, cache_dir=str(tmp_path / f"of{workers}")), []
        rows = prepare(data, "train", BLOCK, tokenizer, lambda *counts: calls.append(counts), workers)
        assert content(rows) == expected
        assert len(calls) > 8 and calls == sorted(calls)
        assert os.listdir(rows.path.parent) == [rows.path.name]


def test_a_text_of_one_part_touches_no_disk_and_starts_no_process(text_config, monkeypatch):
    monkeypatch.setattr(parts, "_encode_with", None)
    monkeypatch.setattr(parts, "_path", None)
    prepare(text_config(), "train", BLOCK, ByteTokenizer(), workers=4)


def test_dialogues_in_parts(data_config, tmp_path, monkeypatch):
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"prompt": "why? " * (i % 7), "response": f"so {i}"}) + "\n"
                            for i in range(200)))

    def make(**changes):
        return data_config(source="sft", path=str(path), packing="pad", **changes)

    expected = one_part(make, tmp_path, ByteTokenizer())
    monkeypatch.setattr(parts, "PART_CHARS", PART)
    assert content(prepare(make(), "train", BLOCK, ByteTokenizer())) == expected


def stop_after(number):
    def progress(documents, tokens):
        progress.calls += 1
        if progress.calls == number:
            raise KeyboardInterrupt
    progress.calls = 0
    return progress


def count_encoded(monkeypatch):
    """A list that grows by one with every part that is tokenised here."""
    encoded, encode = [], parts.encode
    monkeypatch.setattr(parts, "encode", lambda *args: encoded.append(1) or encode(*args))
    return encoded


def test_goes_on_with_the_parts_that_are_there(text_config, tmp_path, monkeypatch):
    expected = one_part(text_config, tmp_path, ByteTokenizer())
    monkeypatch.setattr(parts, "PART_CHARS", PART)
    encoded = count_encoded(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prepare(text_config(), "train", BLOCK, ByteTokenizer(), stop_after(5))
    assert len(encoded) == 5
    kept = next((tmp_path / "cache").glob("*.parts"))
    files = sorted(kept.glob("*.npz"))
    assert len(files) == 5
    files[1].write_bytes(files[1].read_bytes()[:-40])  # cut
    damaged = bytearray(files[3].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    files[3].write_bytes(damaged)
    total = []
    rows = prepare(text_config(), "train", BLOCK, ByteTokenizer(), lambda *counts: total.append(counts))
    assert content(rows) == expected
    assert len(encoded) == len(total) + 2  # the two that were damaged, and none of the other three
    assert os.listdir(rows.path.parent) == [rows.path.name]


def test_parts_of_another_text_are_not_taken(text_config, tmp_path, monkeypatch):
    """A source that changed although its fingerprint says it did not."""
    monkeypatch.setattr(parts, "PART_CHARS", 40)
    texts = [f"document {i} of ten" for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(Corpus(lambda: iter(texts), lambda: "same"), "text", "train", text_config(), BLOCK,
                       ByteTokenizer(), stop_after(4))
    texts[0] = "Document 0 of ten"
    rows = prepare_corpus(Corpus(lambda: iter(texts), lambda: "same"), "text", "train", text_config(), BLOCK,
                          ByteTokenizer())
    assert ByteTokenizer().decode(rows.stream()) == "\n".join(texts) + "\n"


def test_a_line_that_cannot_be_read_leaves_nothing(data_config, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_CHARS", PART)
    lines = [json.dumps({"text": "words " * 20}) for _ in range(100)] + ["no json"]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "valid.jsonl").write_text(lines[0])
    with pytest.raises(UserError, match="line 101 is not JSON"):
        prepare(data_config(source="jsonl", path=str(tmp_path)), "train", BLOCK, ByteTokenizer())
    assert os.listdir(tmp_path / "cache") == []


def test_a_killed_worker_is_one_line_and_its_work_is_kept(text_config, tmp_path, monkeypatch):
    expected = one_part(text_config, tmp_path, ByteTokenizer())
    monkeypatch.setattr(parts, "PART_CHARS", PART)

    def kill(documents, tokens):
        for child in multiprocessing.active_children():
            child.kill()
            child.join()

    with pytest.raises(RunError, match="one of 2 workers was killed.* fewer --num_workers"):
        prepare(text_config(), "train", BLOCK, ByteTokenizer(), kill, 2)
    left = os.listdir(tmp_path / "cache")
    assert len(left) == 1 and left[0].endswith(".parts")
    assert content(prepare(text_config(), "train", BLOCK, ByteTokenizer())) == expected
    assert not list((tmp_path / "cache").glob("*.part*"))


KILLED = """
import multiprocessing, sys, time
from bd3lm_jax.config import DataConfig
from bd3lm_jax.data import parts
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.tokenizers import ByteTokenizer
if __name__ == "__main__":
    parts.PART_CHARS = int(sys.argv[2])
    def progress(documents, tokens):
        print(documents, *(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(0.05)
    prepare(eval(sys.argv[1]), "train", 8, ByteTokenizer(), progress, int(sys.argv[3]))
"""


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.ci_slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")
def test_sigkill_again_and_again(text_config, tmp_path, monkeypatch):
    """Three kills, two of them with workers; the workers end, what was done stays, the result is as undisturbed."""
    expected = one_part(text_config, tmp_path, ByteTokenizer())
    script = tmp_path / "build.py"
    script.write_text(KILLED)
    done, workers = [], []
    for number in (1, 2, 2):
        child = subprocess.Popen([sys.executable, str(script), repr(text_config()), str(PART), str(number)],
                                 stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                 env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        lines = [child.stdout.readline().split() for _ in range(3)]
        assert all(lines), "the build ended early"
        child.send_signal(signal.SIGKILL)
        child.wait()
        workers += lines[-1][1:]
        done.append(len(list((tmp_path / "cache").glob("*.parts/*.npz"))))
    assert done == sorted(done) and done[0] >= 3 and workers
    deadline = time.monotonic() + 30
    while any(map(running, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    monkeypatch.setattr(parts, "PART_CHARS", PART)
    encoded, calls = count_encoded(monkeypatch), []
    rows = prepare(text_config(), "train", BLOCK, ByteTokenizer(), lambda *counts: calls.append(counts))
    assert content(rows) == expected and len(encoded) <= len(calls) - done[0]
    assert os.listdir(rows.path.parent) == [rows.path.name]  # nor what the killed ones were writing


def test_a_build_in_progress_is_left_alone(text_config, tmp_path):
    """What a living process writes is not taken for abandoned."""
    seen = []

    def another(documents, tokens):
        prepare(text_config(), "train", BLOCK, ByteTokenizer())
        seen.extend(path.name for path in (tmp_path / "cache").iterdir())

    rows = prepare(text_config(), "train", BLOCK, ByteTokenizer(), another)
    assert any(".part-" in name for name in seen) and os.listdir(rows.path.parent) == [rows.path.name]


def test_dialogues_survive_the_way_to_a_worker():
    dialogue = Dialogue([("why? ", False), ("so", True)], special=True)
    again = pickle.loads(pickle.dumps(dialogue))
    assert (again, again.parts, again.special) == (dialogue, dialogue.parts, True)


# ---- the manifest


def test_manifest_holds_what_was_written(text_config):
    rows = prepare(text_config(), "train", BLOCK, get_tokenizer("gpt2", tuple))
    meta = json.loads((rows.path / "meta.json").read_text())
    assert meta == rows.meta and meta["versions"]["numpy"] == np.__version__
    assert meta["tokenizer"] == get_tokenizer("gpt2", tuple).identity
    for name, entry in meta["files"].items():
        data = (rows.path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {*meta["files"], "meta.json"} == set(os.listdir(rows.path))


@pytest.mark.parametrize("key, value", [("length", 16), ("tokens", 1), ("documents", 3), ("layout", "pad"),
                                        ("tokenizer", "other"), ("files", {}), ("versions", {"numpy": "0"})])
def test_a_manifest_that_was_edited_is_noticed(text_config, key, value):
    rows = prepare(text_config(), "train", BLOCK, ByteTokenizer())
    expected = content(rows)
    (rows.path / "meta.json").write_text(json.dumps(rows.meta | {key: value}))
    with pytest.warns(UserWarning, match="meta.json is not what was written.*building them again"):
        assert content(prepare(text_config(), "train", BLOCK, ByteTokenizer())) == expected


def test_manifests_of_earlier_versions_are_read(text_config, monkeypatch):
    rows = prepare(text_config(), "train", BLOCK, ByteTokenizer())
    old = {key: value for key, value in rows.meta.items() if key not in ("seal", "versions")}
    (rows.path / "meta.json").write_text(json.dumps(old))
    monkeypatch.setattr(parts, "encode", None)
    assert prepare(text_config(), "train", BLOCK, ByteTokenizer()).meta == old


def test_damage_far_into_a_file(text_config, monkeypatch):
    """The start is looked at whenever rows are opened, all of it by `verify`."""
    monkeypatch.setattr(manifest, "HASHED_BYTES", 500)
    rows = prepare(text_config(), "train", BLOCK, ByteTokenizer())
    assert "sha256_whole" in rows.meta["files"]["tokens.npy"]
    manifest.verify(rows.path)
    with open(rows.path / "tokens.npy", "r+b") as file:
        file.seek(900)
        byte = file.read(1)[0]
        file.seek(900)
        file.write(bytes([byte ^ 4]))
    prepare(text_config(), "train", BLOCK, ByteTokenizer())
    with pytest.raises(RunError, match="tokens.npy is damaged: delete"):
        manifest.verify(rows.path)
