"""Files as people have them: one record is one line, what is no text is named with what to do, nothing is left out
silently."""

import bz2
import gzip
import json
import lzma
import os

import pytest

from bd3lm_jax.core import log
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import text_files
from bd3lm_jax.data.corpora import load_documents
from bd3lm_jax.data.density.file import Annotations
from bd3lm_jax.data.domains import _local_section
from bd3lm_jax.evaluation.tasks.registry import TASKS
from bd3lm_jax.evaluation.tasks.task import read_problems
from bd3lm_jax.generation import sample_files
from launch.infill import read_texts

ODD = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\x1deight\x1enine"  # str.splitlines cuts at each


@pytest.fixture(autouse=True)
def _say_again():
    log.note_once.cache_clear()


def write_lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


# ---- lines


def test_a_record_is_a_line_in_every_reader(data_config, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"text": f"{ODD} {i}"} for i in range(4)))
    documents = list(load_documents(data_config(source="jsonl", path=str(path)), "all"))
    assert documents == [f"{ODD} {i}" for i in range(4)]
    assert sample_files.read(str(path)).texts == documents
    (tmp_path / "a.txt").write_text(f"{ODD}\r\n\n{ODD}", encoding="utf-8", newline="")
    assert list(load_documents(data_config(source="text", path=str(tmp_path / "a.txt")), "all")) == [ODD, ODD]
    assert read_texts(str(tmp_path / "a.txt")) == [ODD, ODD]
    problem = {"question": ODD, "answer": f"{ODD} #### 4"}
    found = read_problems(TASKS["gsm8k"], str(write_lines(tmp_path / "b.jsonl", problem, problem)))
    assert len(found.problems) == 2 and ODD in found.problems[0].prompt
    annotations = Annotations(write_lines(tmp_path / "c.jsonl", {"text": ODD, "spans": [[0, 3]]}))
    assert annotations.find(ODD) == [(0, 3)]
    dialogues = write_lines(tmp_path / "d.jsonl", {"prompt": ODD, "response": ODD})
    assert list(load_documents(data_config(source="sft", path=str(dialogues)), "all")) == [ODD + ODD]


def test_logged_lines_are_read_whole(tmp_path):
    path = write_lines(tmp_path / "watch.jsonl", {"step": 1, "text": ODD}, {"step": 2, "text": ODD})
    assert [line["text"] for line in log.read_lines(path)] == [ODD, ODD]


# ---- records of mixed schemas


def test_nulls_of_mixed_schemas(data_config, tmp_path):
    said = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "response": "b", "messages": None},
                       {"prompt": None, "response": None, "messages": said})
    assert list(load_documents(data_config(source="sft", path=str(path)), "all")) == ["ab", "whyso"]
    nothing = {"num_tokens": None, "nfe": None, "stop": None, "samples": None, "block_size": None, "sampler": None}
    texts = sample_files.read(str(write_lines(tmp_path / "b.jsonl", {"text": "a"} | nothing, {"text": "b"})))
    assert texts.texts == ["a", "b"] and texts.nfe_per_token is None and texts.stops == {} and texts.block_size is None
    spans = write_lines(tmp_path / "c.jsonl", {"text": "abc", "sha256": None, "spans": [[0, 1]]},
                        {"text": None, "sha256": "0" * 64, "spans": []})
    assert len(Annotations(spans).lines) == 2


# ---- packed, foreign and hidden files


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.xz", "a.TXT.GZ", "a.txt.bz2", "a.Txt.Bz2"])
def test_packed_files_in_any_case(data_config, tmp_path, name):
    packed = {"xz": lzma.compress, "gz": gzip.compress, "z2": bz2.compress}.get(name[-2:].lower(), bytes)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(packed(b"one\ntwo\nthree\n"))
    for path in (tmp_path / "in", tmp_path / "in" / name):
        assert list(load_documents(data_config(source="text", path=str(path)), "all")) == ["one", "two", "three"]


@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress, bz2.compress])
def test_packed_files_without_the_name_of_one(tmp_path, pack):
    (tmp_path / "a").write_bytes(pack(b"one\ntwo"))
    assert [line for _, line in text_files.lines(tmp_path / "a")] == ["one", "two"]


FOREIGN = {
    "a.parquet": (b"PAR1\x15\x04\xff\xfe", "is a Parquet file, which is not read here: write its rows as JSON lin"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04\x00", "is packed with zstd, which is not read here: unpack it: zstd -d"),
    "a.zip": (b"PK\x03\x04\xff", "is a zip archive, which is not read here: unpack it: unzip"),
    "a.arrow": (b"ARROW1\0\0\xff", "is an Arrow file"), "a.7z": (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
    "a.txt": ("é".encode("utf-16"), "is UTF-16 text, which is not read here: write it as UTF-8: iconv -f UTF-16"),
    "b.txt": (b"\xfe\xff\0a", "is UTF-16 text"), "c.txt": ("a".encode("utf-32"), "is UTF-32 text")
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_text_is_named_by_what_it_is(data_config, tmp_path, name):
    content, said = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(content + b"\nmore\n")
    for source in ("text", "jsonl", "sft"):
        with pytest.raises(UserError) as error:
            list(load_documents(data_config(source=source, path=str(path)), "all"))
        assert said in str(error.value) and ("iconv" in str(error.value)) == ("UTF" in said)
    for read in (read_texts, lambda path: read_problems(TASKS["gsm8k"], path)):
        with pytest.raises(UserError) as error:
            read(str(path))
        assert said.partition(",")[0] in str(error.value)


def test_bytes_that_are_no_text_at_all(data_config, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\0\0\xff\n")
    with pytest.raises(UserError, match="holds zero bytes too and is no text"):
        list(load_documents(data_config(source="text", path=str(tmp_path / "a.txt")), "all"))


def test_hidden_files_are_no_data(data_config, tmp_path, capsys):
    write_lines(tmp_path / "train.jsonl", {"text": "one"}, {"text": "two"})
    for name in ("._train.jsonl", ".DS_Store", ".cache/old.jsonl", "__MACOSX/._train.jsonl", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\x05\x16\x07\xff")
    data = data_config(source="jsonl", path=str(tmp_path))
    assert list(load_documents(data, "all")) == ["one", "two"] and capsys.readouterr().err == ""
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match="is a directory without .*jsonl"):
        load_documents(data, "all")
    assert _local_section(data, tmp_path).source == "text"  # an AppleDouble file says nothing of a directory


def test_folders_are_read_and_their_names_say_the_split(data_config, tmp_path):
    for name in ("train/b/1.jsonl", "train/a.JSONL", "validation/0.jsonl", "test/train-like.jsonl"):
        write_lines(tmp_path / name, {"text": name})
    data = data_config(source="jsonl", path=str(tmp_path))
    assert list(load_documents(data, "train")) == ["test/train-like.jsonl", "train/a.JSONL", "train/b/1.jsonl"]
    assert list(load_documents(data, "valid")) == ["validation/0.jsonl"]
    assert _local_section(data, tmp_path).source == "jsonl"


def test_a_folder_that_links_back_is_read_once(data_config, tmp_path):
    write_lines(tmp_path / "in" / "a.jsonl", {"text": "one"})
    os.symlink(tmp_path / "in", tmp_path / "in" / "again")
    os.symlink(tmp_path / "in", tmp_path / "linked")
    for where in ("in", "linked"):
        assert list(load_documents(data_config(source="jsonl", path=str(tmp_path / where)), "all")) == ["one"]


def test_what_is_not_read_beside_others_is_named_once(data_config, tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.md").write_text("words")
    for split in ("train", "valid", "train"):
        list(load_documents(data_config(source="jsonl", path=str(tmp_path)), split))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"not read in {tmp_path}: b.parquet, sub/notes.md (") and "is a Parquet file" in line


def test_a_directory_of_parquet_alone_says_what_to_do(data_config, tmp_path):
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError) as error:
        list(load_documents(data_config(source="jsonl", path=str(tmp_path)), "train"))
    assert "it holds train-00000.parquet (" in str(error.value) and "write its rows as JSON lines" in str(error.value)
    assert "iconv" not in str(error.value)


def test_pipes_in_a_directory_are_no_files(data_config, tmp_path):
    write_lines(tmp_path / "a.jsonl", {"text": "one"})
    os.mkfifo(tmp_path / "b.jsonl")
    assert list(load_documents(data_config(source="jsonl", path=str(tmp_path)), "all")) == ["one"]


def test_the_newest_texts_of_a_run_are_no_hidden_ones(tmp_path):
    write_lines(tmp_path / "samples" / "step_1.jsonl", {"text": "one"})
    (tmp_path / "samples" / "._step_2.jsonl").write_bytes(b"\0\xff")
    assert sample_files._newest(tmp_path).name == "step_1.jsonl"
