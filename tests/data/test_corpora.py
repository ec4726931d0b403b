import gzip
import json
import lzma

import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import parts
from bd3lm_jax.data.corpora import NOVELS, join_documents, load_documents, open_corpus
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.tokenizers import ByteTokenizer

FIVE_NOVELS_BYTES, PERSUASION_BYTES = 3_543_784, 463_316


def test_austen_splits_are_whole_and_disjoint(data_config):
    size = {split: len(join_documents(load_documents(data_config(), split))) for split in ("train", "valid", "test")}
    assert size["train"] + size["valid"] == FIVE_NOVELS_BYTES
    assert size["test"] == PERSUASION_BYTES
    assert 0.045 < size["valid"] / FIVE_NOVELS_BYTES <= 0.05


def test_austen_valid_is_the_end_of_each_novel(data_config):
    train, valid = (list(load_documents(data_config(), split)) for split in ("train", "valid"))
    assert [document for document in train if document in NOVELS] == list(NOVELS)
    assert not set(NOVELS) & set(valid)
    for words in ("they were always on the most intimate terms", "I leave it to be settled, by whomsoever"):
        assert sum(words in document for document in valid) == 1
    assert next(load_documents(data_config(), "test")) == "Persuasion"


def test_single_file_holds_out_its_last_documents(data_config, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufeffone\r\n\n  \ntwo  \nthr\u2028ee\nfour\nfive\nsix".encode())
    data = data_config(source="text", path=str(path), valid_fraction=0.3)
    assert list(load_documents(data, "train")) == ["one", "two  ", "thr\u2028ee", "four"]
    assert list(load_documents(data, "valid")) == ["five", "six"]
    with pytest.raises(UserError, match="no test split.*test.txt"):
        load_documents(data, "test")


def test_directory_names_say_the_split(data_config, tmp_path):
    texts = {"a.train.txt": b"a\n", "contest.txt": b"c\n", "my_val.txt.gz": gzip.compress(b"v\n"),
             "test-2.txt.xz": lzma.compress(b"t2\n"), "test-1.txt": b"t1\n", "ignored.md": b"m\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    data = data_config(source="text", path=str(tmp_path))
    found = {split: list(load_documents(data, split)) for split in ("train", "valid", "test")}
    assert found == {"train": ["a", "c"], "valid": ["v"], "test": ["t1", "t2"]}


def test_directory_without_valid_holds_out_train(data_config, tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"{i}\n" for i in range(20)))
    (tmp_path / "test.txt").write_text("x\n")
    data = data_config(source="text", path=str(tmp_path))
    assert list(load_documents(data, "valid")) == ["18", "19"]
    assert len(list(load_documents(data, "train"))) == 18


@pytest.mark.parametrize("packed", [False, True])
def test_not_utf8_names_file_and_offset(data_config, tmp_path, packed):
    path = tmp_path / ("latin.txt.gz" if packed else "latin.txt")
    content = b"good\n" + "é".encode() + b"t\xe9\nmore\n"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=rf"{path}.*0xe9 at offset {content.index(0xe9)}"):
        list(load_documents(data_config(source="text", path=str(path)), "train"))


def test_missing_and_empty_input(data_config, tmp_path):
    with pytest.raises(UserError, match="nowhere.txt' does not exist"):
        load_documents(data_config(source="text", path="nowhere.txt"), "train")
    with pytest.raises(UserError, match="directory without"):
        load_documents(data_config(source="text", path=str(tmp_path)), "train")
    for content, count in (("", 0), ("\n \n", 0), ("only\n", 1)):
        (tmp_path / "short.txt").write_text(content)
        with pytest.raises(UserError, match=f"holds {count} documents, expected at least 2"):
            list(load_documents(data_config(source="text", path=str(tmp_path / "short.txt")), "train"))
    with pytest.raises(UserError, match="unknown split 'tset': did you mean 'test'"):
        open_corpus(data_config(), "tset")


def test_damaged_compressed_file(data_config, tmp_path):
    content = "".join(f"{i} some text that compresses\n" for i in range(2000)).encode()
    for name, packed in (("a.txt.xz", lzma.compress(content)), ("a.txt.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(packed[:len(packed) // 2])
        with pytest.raises(UserError, match=f"{name} is a damaged"):
            list(load_documents(data_config(source="text", path=str(tmp_path / name)), "train"))


def test_jsonl(data_config, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("a\nb\n", "", "c", "d")))
    data = data_config(source="jsonl", path=str(path))
    assert list(load_documents(data, "train")) + list(load_documents(data, "valid")) == ["a\nb", "c", "d"]


@pytest.mark.parametrize("line, message", [
    ('{"text": ', "line 2 is not JSON"),
    ('{"txt": "a"}', "line 2 has no field 'text'.*did you mean 'txt'"),
    ('{"text": 3}', "line 2: field 'text' is int"),
    ("[1]", "line 2 is a JSON list"),
])
def test_bad_jsonl(data_config, tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        list(load_documents(data_config(source="jsonl", path=str(path)), "train"))


def test_fingerprint_follows_content_and_split(data_config, tmp_path):
    def fingerprints(content: str, **changes) -> list[str]:
        (tmp_path / "a.txt").write_text(content)
        data = data_config(source="text", path=str(tmp_path / "a.txt"), **changes)
        return [open_corpus(data, split).fingerprint() for split in ("train", "valid")]

    seen = fingerprints("a\nb\n") + fingerprints("a\nc\n") + fingerprints("a\nb\n", valid_fraction=0.5)
    assert len(set(seen)) == 6
    assert fingerprints("a\nb\n") == seen[:2]


def test_tfds(data_config, tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Lines(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path  # where TFDS looks for metadata files: there are none

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
                                                  disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": ((i, {"text": f"élan {i}\n"}) for i in range(20))}

        def _generate_examples(self):
            raise NotImplementedError

    Lines(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = data_config(source="tfds", name="lines", path=str(tmp_path))
    assert list(load_documents(data, "train")) == [f"élan {i}" for i in range(18)]
    assert list(load_documents(data, "valid")) == ["élan 18", "élan 19"]
    monkeypatch.setattr(parts, "PART_CHARS", 40)  # prepared in parts as any large text
    rows = prepare(data, "train", 4, ByteTokenizer())
    assert ByteTokenizer().decode(rows.stream()) == "".join(f"élan {i}\n" for i in range(18))
    assert (rows.meta["documents"], rows.meta["source"]) == (18, "tfds") and "lines" in rows.meta["corpus"]
    with pytest.raises(UserError, match="has no test split, it has train"):
        load_documents(data, "test")
    with pytest.raises(UserError, match="no field 'txt'.*did you mean 'text'"):
        list(load_documents(data_config(source="tfds", name="lines", path=str(tmp_path), field="txt"), "train"))
    with pytest.raises(UserError, match="'no_such_set' cannot be prepared"):
        load_documents(data_config(source="tfds", name="no_such_set", path=str(tmp_path)), "train")
