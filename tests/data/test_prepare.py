import dataclasses
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from toy_packing import pack_rows
from toy_runs import environment

from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.data import parts
from bd3lm_jax.data import prepare as prepare_module
from bd3lm_jax.data.corpora import join_documents, load_documents
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.data.tokenizers import ByteTokenizer

BLOCK = 8


@pytest.fixture
def text_config(data_config, tmp_path):
    """Thirty documents of 1 to 60 characters; the last three are the valid split."""
    path = tmp_path / "some.txt"
    path.write_text("".join("abcdéfgh"[i % 8] * (1 + 7 * i % 60) + "\n" for i in range(30)))

    def make(**changes):
        return data_config(source="text", path=str(path), **changes)

    return make


def slow_rows(data, split):
    """tokens, segments, positions and documents one token at a time from the pieces of packing.py."""
    documents = [list(text.encode()) for text in load_documents(data, split)]
    tokens, pieces = pack_rows(data.packing, documents, data.seq_len, BLOCK, ByteTokenizer().end_id)
    segments, positions, owners = np.zeros_like(tokens), np.zeros_like(tokens), np.full_like(tokens, -1)
    for row, group in itertools.groupby(pieces.tolist(), key=lambda piece: piece[0]):
        for index, (_, start, length, document) in enumerate(group):
            for i in range(length):
                wrapped = data.packing == "wrap"
                segments[row, start + i] = 1 if wrapped else index + 1
                positions[row, start + i] = start + i if wrapped else i
                owners[row, start + i] = document
    return tokens, segments, positions, owners


@pytest.mark.parametrize("layout", ["wrap", "pack", "pad"])
def test_rows_match_a_slow_loop(text_config, layout, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHUNK_TOKENS", 96)  # three rows at a time
    monkeypatch.setattr(parts, "PART_CHARS", 100)
    data = text_config(packing=layout)
    rows = prepare(data, "train", BLOCK, ByteTokenizer())
    expected = slow_rows(data, "train")
    order = np.random.default_rng(0).integers(0, len(rows), 50)
    for read, slow in zip((rows.tokens, rows.segments, rows.positions, rows.documents), expected, strict=True):
        assert read(order).dtype == np.int32
        np.testing.assert_array_equal(read(order), slow[order])
    assert len(rows) == len(expected[0])


@pytest.mark.parametrize("layout", ["wrap", "pack", "pad"])
def test_accounting(text_config, layout):
    data = text_config(packing=layout)
    rows = prepare(data, "train", BLOCK, ByteTokenizer())
    documents = list(load_documents(data, "train"))
    text = join_documents(documents)
    assert rows.meta["documents"] == len(documents) == 27
    assert rows.meta["bytes"] == rows.meta["tokens"] == len(text)
    everything = np.arange(len(rows))
    assert (rows.segments(everything) > 0).sum() == len(text)
    assert ((rows.segments(everything) > 0) == (rows.documents(everything) >= 0)).all()
    if layout == "wrap":
        assert ByteTokenizer().decode(rows.stream()) == text.decode()
    assert sorted(rows.stream().tolist()) == sorted(256 if byte == 10 else byte for byte in text)


def test_the_embedded_corpus_in_wide_ids(data_config):
    data = data_config(tokenizer="gpt2", seq_len=128)
    tokenizer = prepare_tokenizer(data)
    rows = prepare(data, "test", 1, tokenizer)
    assert rows.meta["bytes"] == 463_316
    assert tokenizer.decode(rows.stream()) == join_documents(load_documents(data, "test")).decode()


def test_second_call_reads_the_cache(text_config, monkeypatch):
    first = prepare(text_config(), "train", 4, ByteTokenizer())
    monkeypatch.setattr(prepare_module, "_build", None)
    second = prepare(text_config(workers=7), "train", 16, ByteTokenizer())
    assert second.path == first.path and second.meta == first.meta
    assert os.listdir(first.path.parent) == [first.path.name]


def test_what_decides_the_content_decides_the_directory(text_config, data_config):
    tokenizer = ByteTokenizer()
    different = [
        prepare(text_config(), "train", 4, tokenizer), prepare(text_config(), "valid", 4, tokenizer),
        prepare(text_config(seq_len=64), "train", 4, tokenizer),
        prepare(text_config(packing="pack"), "train", 4, tokenizer),
        prepare(text_config(packing="pack"), "train", 8, tokenizer),
        prepare(text_config(packing="pad"), "train", 4, tokenizer),
        prepare(text_config(valid_fraction=0.4), "train", 4, tokenizer),
        prepare(text_config(), "train", 4, prepare_tokenizer(data_config(tokenizer="bpe:260"))),
    ]
    assert len({rows.path for rows in different}) == len({rows.meta["hash"] for rows in different}) == len(different)


@pytest.mark.parametrize("damage", ["flip", "truncate", "no meta", "bad meta"])
def test_damaged_rows_are_built_again(text_config, damage):
    rows = prepare(text_config(), "train", 4, ByteTokenizer())
    expected = rows.tokens(np.arange(len(rows)))
    path = rows.path / ("meta.json" if "meta" in damage else "tokens.npy")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "no meta":
        path.unlink()
    elif damage == "bad meta":
        path.write_text("{}")
    else:
        path.write_bytes(content if damage == "flip" else content[:-2])
    with pytest.warns(UserWarning, match="damaged"):
        again = prepare(text_config(), "train", 4, ByteTokenizer())
    np.testing.assert_array_equal(again.tokens(np.arange(len(again))), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(text_config(), "train", 4, ByteTokenizer())


def damaged_rows(text_config):
    rows = prepare(text_config(), "train", 4, ByteTokenizer())
    content = bytearray((rows.path / "tokens.npy").read_bytes())
    content[-1] ^= 1
    (rows.path / "tokens.npy").write_bytes(content)
    return rows.path


@pytest.mark.parametrize("looks", [1, 2])
def test_another_process_sees_the_same_damage_and_is_faster(text_config, monkeypatch, looks):
    """After the first or the second look at the damage the other one has built the rows anew: they are kept."""
    path, original, calls, built = damaged_rows(text_config), prepare_module.manifest.damage, [], []

    def damage(*arguments):
        found = original(*arguments)
        calls.append(found)
        if len(calls) == looks:
            monkeypatch.setattr(prepare_module.manifest, "damage", original)
            if looks == 1:
                prepare(text_config(), "train", 4, ByteTokenizer())
                built.append(path.stat().st_ino)
            else:  # it has put them away, and builds
                path.rename(path.with_name("elsewhere"))
        return found

    monkeypatch.setattr(prepare_module.manifest, "damage", damage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = prepare(text_config(), "train", 4, ByteTokenizer())
    assert original(rows.path, {}) is None and rows.path == path and len(rows.tokens(np.arange(len(rows)))) == len(rows)
    assert len(caught) == looks % 2  # by the one who has put them away
    assert built in ([], [path.stat().st_ino])
    assert {name for name in os.listdir(path.parent) if name != "elsewhere"} == {path.name}


@pytest.mark.ci_slow
def test_many_processes_that_see_the_same_damage_all_get_whole_rows(text_config):
    path = damaged_rows(text_config)
    code = ("import sys, warnings; warnings.simplefilter('ignore'); from bd3lm_jax.config import DataConfig; "
            "from bd3lm_jax.data.prepare import prepare; from bd3lm_jax.data.tokenizers import ByteTokenizer; "
            "sys.stdin.readline(); rows = prepare(DataConfig(**eval(sys.argv[1])), 'train', 4, ByteTokenizer()); "
            "print(int(rows.tokens(range(len(rows))).sum()))")
    processes = [subprocess.Popen([sys.executable, "-c", code, repr(dataclasses.asdict(text_config()))], text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) for _ in range(3)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = {process.communicate(timeout=300)[0] for process in processes}
    rows = prepare(text_config(), "train", 4, ByteTokenizer())
    assert said == {f"{int(rows.tokens(np.arange(len(rows))).sum())}\n"}
    assert os.listdir(path.parent) == [path.name]


def test_damaged_rows_that_cannot_be_removed(text_config, monkeypatch):
    path = damaged_rows(text_config)

    def refuse(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(type(path), "rename", refuse)
    with pytest.raises(RunError, match="cannot write in the cache directory .*: Operation not permitted; free"):
        prepare(text_config(), "train", 4, ByteTokenizer())
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupted_build_leaves_nothing(text_config, tmp_path):
    def stop(documents, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(text_config(), "train", 4, ByteTokenizer(), progress=stop)
    assert os.listdir(tmp_path / "cache") == []


def test_another_process_was_faster(text_config, monkeypatch):
    tokenizer = ByteTokenizer()
    build = prepare_module._build

    def build_while_another_finishes(work, documents, identity, *rest):
        monkeypatch.setattr(prepare_module, "_build", build)
        prepare(text_config(), "train", 4, tokenizer)
        return build(work, documents, identity, *rest)

    monkeypatch.setattr(prepare_module, "_build", build_while_another_finishes)
    rows = prepare(text_config(), "train", 4, tokenizer)
    assert os.listdir(rows.path.parent) == [rows.path.name]
    assert json.loads((rows.path / "meta.json").read_text()) == rows.meta


def test_full_disk_and_unwritable_cache(text_config, tmp_path):
    def full(documents, tokens):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left on device; free some space"):
        prepare(text_config(), "train", 4, ByteTokenizer(), progress=full)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set data.cache_dir"):
        prepare(text_config(cache_dir=str(tmp_path / "file" / "cache")), "train", 4, ByteTokenizer())


def test_empty_split(data_config, tmp_path):
    (tmp_path / "test.txt").write_text("\n \n")
    with pytest.raises(UserError, match="test split .* holds no documents"):
        prepare(data_config(source="text", path=str(tmp_path)), "test", 4, ByteTokenizer())
    assert os.listdir(tmp_path / "cache") == []


def test_progress_counts_up(text_config, monkeypatch):
    monkeypatch.setattr(parts, "PART_CHARS", 100)
    calls = []
    rows = prepare(text_config(), "train", 4, ByteTokenizer(), progress=lambda *counts: calls.append(counts))
    assert len(calls) > 3 and calls == sorted(calls)
    assert calls[-1] == (rows.meta["documents"], rows.meta["tokens"])


def test_trained_tokenizer_is_kept(text_config, data_config, monkeypatch):
    first = prepare_tokenizer(data_config(tokenizer="bpe:260"))
    monkeypatch.setattr(prepare_module, "get_tokenizer", None)
    assert prepare_tokenizer(data_config(tokenizer="bpe:260")).identity == first.identity
    with pytest.raises(TypeError):  # another corpus: it has to be trained
        prepare_tokenizer(text_config(tokenizer="bpe:260"))


@pytest.mark.parametrize("damage", ["another id", "another piece", "cut off", "no seal", "a list", "empty"])
def test_a_damaged_tokenizer_is_trained_again(text_config, damage):
    """Also where the file is still JSON, of another tokenizer; "no seal" is how earlier versions wrote it."""
    data = text_config(tokenizer="bpe:260")
    first = prepare_tokenizer(data)
    path, = (path for path in Path(data.cache_dir).iterdir())
    content = json.loads(path.read_text())
    if damage == "another id":
        content["end_id"] ^= 1
    elif damage == "another piece":
        content["model"] = content["model"].replace('"a"', '"b"', 1)
    elif damage == "no seal":
        del content["seal"]
    text = {"cut off": json.dumps(content)[:-9], "a list": "[]", "empty": ""}.get(damage, json.dumps(content))
    path.write_text(text)
    with pytest.warns(UserWarning, match="tokenizer in .* is damaged or of an earlier version: training it again"):
        again = prepare_tokenizer(data)
    assert again.identity == first.identity
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare_tokenizer(data).identity == first.identity


def test_cache_directory_from_the_environment(text_config, tmp_path, monkeypatch):
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "elsewhere"))
    rows = prepare(text_config(cache_dir=""), "train", 4, ByteTokenizer())
    assert rows.path.parent == tmp_path / "elsewhere"
