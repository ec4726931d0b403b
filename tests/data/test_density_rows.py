"""Densities beside the tokens of prepared rows: aligned in every layout, only there when asked for."""

import itertools

import numpy as np
import pytest
from toy_packing import pack_rows

from bd3lm_jax.data import code, parts
from bd3lm_jax.data import prepare as prepare_module
from bd3lm_jax.data.corpora import load_documents
from bd3lm_jax.data.density import arithmetic
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.tokenizers import ByteTokenizer

BLOCK = 8


@pytest.fixture
def sums(data_config, tmp_path):
    """Forty sentences with numbers in a file of one document a line."""
    path = tmp_path / "sums.txt"
    path.write_text("".join(f"{text[:5 + 7 * i % 60]}\n" for i, text in
                            enumerate(itertools.islice(code._sums("train"), 40))))
    return lambda **changes: data_config(source="text", path=str(path), **changes)


@pytest.mark.parametrize("layout", ["wrap", "pack", "pad"])
def test_entries_belong_to_their_tokens(sums, layout, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHUNK_TOKENS", 96)  # three rows at a time
    monkeypatch.setattr(parts, "PART_CHARS", 100)
    data = sums(packing=layout, density="arithmetic")
    rows = prepare(data, "train", BLOCK, ByteTokenizer())
    documents = list(load_documents(data, "train"))
    flags = []
    for text in documents:  # all characters are ASCII: a byte is a character
        inside = {i for start, end in arithmetic.find(text) for i in range(start, end)}
        flags.append([7 if i in inside else 3 for i in range(len(text))])
    expected = pack_rows(layout, flags, data.seq_len, BLOCK, 3)[0]
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(rows.density(order), (expected[order] == 7).astype(np.float32))
    assert rows.density(order).dtype == np.float32 and 0.05 < rows.density(order).mean() < 0.9
    flat = [flag == 7 for document in flags for flag in [*document, 3]]
    assert rows.meta["density_mean"] == pytest.approx(np.mean(flat))
    plain = prepare(sums(packing=layout), "train", BLOCK, ByteTokenizer())
    np.testing.assert_array_equal(plain.tokens(order), rows.tokens(order))


def test_old_caches_stay_valid(sums):
    """Without a density the identity is what it was before there was one."""
    data = sums()
    rows = prepare(data, "train", BLOCK, ByteTokenizer())
    assert not rows.has_density and not (rows.path / "density.npy").exists()
    assert set(rows.meta) == {"format", "source", "split", "corpus", "tokenizer", "layout", "length", "block_size",
                              "rows", "tokens", "documents", "bytes", "hash", "files", "versions", "seal"}
    digests = {prepare(sums(**changes), "train", BLOCK, ByteTokenizer()).meta["hash"] for changes in (
        {}, {"density": "arithmetic"}, {"density": "python"}, {"density": "arithmetic", "density_fraction": 0.3},
        {"density": "frequency"})}
    assert len(digests) == 5 and rows.meta["hash"] in digests


def test_tables_count_the_training_split(sums):
    data = sums(density="frequency")
    train = [*itertools.chain.from_iterable([*text.encode(), 256] for text in load_documents(data, "train"))]
    counts = np.bincount(train, minlength=258)
    for split in ("train", "valid"):
        rows = prepare(data, split, BLOCK, ByteTokenizer())
        ids = np.arange(len(rows))
        real = rows.documents(ids) >= 0
        expected = np.log1p(counts[rows.tokens(ids)]) / np.log1p(counts.max())
        np.testing.assert_allclose(rows.density(ids)[real], expected[real], atol=0.5 / 255 + 1e-6)


def test_a_fraction_annotates_some_documents(sums):
    dense = {}
    for fraction in (0.3, 0.6, 1.0):
        rows = prepare(sums(density="arithmetic", density_fraction=fraction), "train", BLOCK, ByteTokenizer())
        ids = np.arange(len(rows))
        dense[fraction] = rows.density(ids) > 0
    assert 0 < dense[0.3].sum() < dense[0.6].sum() < dense[1.0].sum()
    assert not (dense[0.3] & ~dense[0.6]).any() and not (dense[0.6] & ~dense[1.0]).any()


def test_batches_bring_the_density_of_their_rows(sums):
    rows = prepare(sums(density="arithmetic"), "train", BLOCK, ByteTokenizer())
    ids, batch = Loader(rows, 4, 0, None).get(1)
    assert set(batch) == {"tokens", "segments", "positions", "density"}
    np.testing.assert_array_equal(batch["density"], rows.density(ids))


def test_the_split_of_code_is_by_modules_and_of_sums_by_text():
    parts = {split: list(itertools.islice(code._sums(split), 200)) for split in code.HELD_OUT | {"train": None}}
    assert not set(parts["train"]) & set(parts["test"]) and not set(parts["valid"]) & set(parts["test"])
    assert parts["test"] == list(itertools.islice(code._sums("test"), 200))
    for text in parts["train"]:  # the results are right
        left, _, right = text.partition(" = ")
        if "*" in left or "+" in left:
            *_, a, sign, b = left.split()[-3:]
            if left.split()[-4:-3] != ["+"]:
                assert {"+": int(a) + int(b), "*": int(a) * int(b)}[sign] == int(right.split()[0].strip(".,"))


def test_code_documents_parse(tmp_path):
    module = tmp_path / "some.py"
    body = "    return 'a text that is long enough to be a document of its own in this corpus, or so it seems'\n"
    module.write_text(f"import os\n\n@decorated\ndef f(a):\n{body}\nclass C:\n{body.replace('return', 'x =')}\n"
                      "def short():\n    pass\n")
    found = list(code._definitions(module))
    assert [text.split("\n")[0] for text in found] == ["@decorated", "class C:"]
    assert found[0].endswith("it seems'")
    module.write_text("def broken(:\n")
    assert list(code._definitions(module)) == []


def test_code_that_stands_in_several_modules_is_in_one_split_once(tmp_path, monkeypatch):
    def function(name):
        return f"def {name}(a):\n    return 'a text that is long enough to be a document of its own, so it is said'\n"

    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for i in range(60):  # enough that some are held out
        (package / f"module{i:02}.py").write_text(f"{function('shared')}\n\n{function(f'own{i}')}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(code, "_versions", lambda: [["made_up", "1"]])
    code._code.cache_clear()
    found = code._code()
    code._code.cache_clear()
    names = {split: [text.split("(")[0][4:] for text in texts] for split, texts in found.items()}
    assert sorted(sum(names.values(), [])) == sorted(["shared", *(f"own{i}" for i in range(60))])
    assert all(names.values())
