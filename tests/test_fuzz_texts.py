"""Texts, prompts and prepared rows with random damage: they are read as they are, or one line says what is wrong."""

import gzip
import json
import lzma
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_fuzz import damaged, damaged_bytes, fuzz, values, works_or_says_why, written

from bd3lm_jax.config import DataConfig
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.tokenizers import ByteTokenizer, Tokenizer, get_tokenizer, load_tokenizer
from bd3lm_jax.generation.prompts import encode_prompts

TOKENIZERS = {name: get_tokenizer(name, tuple) for name in ("bytes", "gpt2", "bert-base-uncased")}
LINES = st.one_of(st.binary(max_size=30), st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
                  st.sampled_from([b"", b"\xef\xbb\xbf", b"a\x00b", b"long " * 20_000, b"\xff\xfe", b"one\rtwo", b"x"]))
FILES = st.tuples(st.lists(LINES, max_size=8), st.sampled_from([b"\n", b"\r\n", b"\r"]), st.booleans()).map(
    lambda x: (b"\xef\xbb\xbf" if x[2] else b"") + x[1].join(x[0]))
RECORD = {"text": "some words", "prompt": "why?", "response": "so", "n": 3, "messages": [
    {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]}
DOCUMENTS = st.one_of(st.text(st.characters(), max_size=20), values)  # with lone surrogates, as JSON may have them


def config(directory, source, **changes):
    fields = {"source": source, "path": str(directory), "tokenizer": "bytes", "seq_len": 16, "valid_fraction": 0.2,
              "cache_dir": str(directory / "cache"), "workers": 1}
    return DataConfig(**fields | changes)


def prepared(directory, source, **changes):
    """Rows, or a UserError that leaves no half-made rows behind."""
    data = config(directory, source, **changes)
    found = works_or_says_why(lambda: prepare(data, "train", 4, ByteTokenizer()))
    cache = directory / "cache"
    left = os.listdir(cache) if cache.exists() else []
    assert left == ([found.path.name] if not isinstance(found, UserError) else [])
    return found


@fuzz(80)
@given(content=FILES, packing=st.sampled_from([None, gzip.compress, lzma.compress]), data=st.data())
def test_text_files(tmp_path_factory, content, packing, data):
    directory = tmp_path_factory.mktemp("text")
    suffix = {None: "", gzip.compress: ".gz", lzma.compress: ".xz"}[packing]
    stored = content if packing is None else packing(content)
    if packing is not None and data.draw(st.booleans()):
        stored = data.draw(damaged_bytes(stored))
    (directory / f"train.txt{suffix}").write_bytes(stored)
    (directory / "valid.txt").write_text("words\n")
    rows = prepared(directory, "text")
    if not isinstance(rows, UserError) and stored == content:
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        expected = [line.rstrip(b"\r\n") for line in lines if line.decode().strip()]
        assert ByteTokenizer().decode(rows.stream()).encode() == b"".join(line + b"\n" for line in expected)


@fuzz(80)
@given(data=st.data(), source=st.sampled_from(["jsonl", "sft"]))
def test_jsonl_files(tmp_path_factory, data, source):
    record = st.one_of(damaged(RECORD), DOCUMENTS.map(lambda text: {"text": text}), DOCUMENTS.map(
        lambda text: {"prompt": text, "response": text}), values)
    lines = data.draw(st.lists(st.one_of(record.map(lambda x: json.dumps(x).encode("utf-8", "surrogatepass")), LINES),
                               min_size=1, max_size=3))
    directory = tmp_path_factory.mktemp("jsonl")
    (directory / "train.jsonl").write_bytes(b"\n".join(lines))
    (directory / "valid.jsonl").write_text(json.dumps(RECORD) + "\n")
    prepared(directory, source)


def test_dialogues_without_a_word_are_no_documents(tmp_path):
    said = [("", ""), ("why?", "so"), ("", "so")]
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in said]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "valid.jsonl").write_text(lines[1])
    assert prepared(tmp_path, "sft").meta["documents"] == 2


def test_json_that_is_too_deep_or_too_large_a_number(tmp_path):
    for number, line in enumerate(["[" * 100_000, '{"a":' * 100_000, '{"text": ' + "9" * 10_000 + "}"]):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "train.jsonl").write_text(line)
        (directory / "valid.jsonl").write_text(json.dumps(RECORD) + "\n")
        assert isinstance(prepared(directory, "jsonl"), UserError)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    (directory / "train.txt").write_text("".join(f"document {i}\n" for i in range(20)))
    found = prepare(config(directory, "text"), "train", 4, ByteTokenizer())
    return SimpleNamespace(directory=directory, rows=found, tokens=found.tokens(np.arange(len(found))),
                           files={path.name: path.read_bytes() for path in found.path.iterdir()})


@fuzz(80)
@given(data=st.data())
def test_manifests(rows, data):
    """Whatever becomes of meta.json and its neighbours: the rows are right, made again if need be."""
    name = data.draw(st.sampled_from(sorted(rows.files)))
    changed = damaged_bytes(rows.files[name])
    if name == "meta.json":
        changed = st.one_of(changed, damaged(json.loads(rows.files[name])), values)
    written(rows.rows.path / name, data.draw(changed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = works_or_says_why(lambda: prepare(config(rows.directory, "text"), "train", 4, ByteTokenizer()))
    np.testing.assert_array_equal(found.tokens(np.arange(len(found))), rows.tokens)
    np.testing.assert_array_equal(found.stream(), rows.rows.stream())
    assert os.listdir(rows.directory / "cache") == [found.path.name]


OURS = json.loads(get_tokenizer("bpe:258", lambda: ["some words"]).to_bytes())
FOREIGN = json.loads(OURS["model"])


def model_of(tokenizer):
    """What the encoding of prompts reads of a model."""
    diffusion = SimpleNamespace(causal=False, bos=False, predicts_first_token=True, begins_with_end_token=False)
    model = SimpleNamespace(vocab_size=tokenizer.vocab_size, positions=None)
    return SimpleNamespace(tokenizer=tokenizer, context=64, special=SimpleNamespace(mask=tokenizer.mask_id),
                           config=SimpleNamespace(model=model, diffusion=diffusion))


PROMPTS = st.one_of(
    st.text(st.characters(), max_size=30),
    st.binary(max_size=20).map(lambda data: data.decode("utf-8", "surrogateescape")),  # as argv brings bytes
    st.sampled_from(["", "\x00", "[MASK]", "<|endoftext|>", "x" * 200_000, "\u202e\ufeff", "🜁" * 100]))


@fuzz(150)
@given(prompt=st.one_of(PROMPTS, values), name=st.sampled_from(sorted(TOKENIZERS)), window=st.booleans(),
       length=st.integers(-1, 70))
def test_prompts(prompt, name, window, length):
    lm = model_of(TOKENIZERS[name])
    found = works_or_says_why(lambda: encode_prompts(lm, [prompt], 1, length, window))
    if not isinstance(found, UserError):
        assert found[0].dtype == np.int32 and len(found[0]) < length


@fuzz(60)
@given(data=st.data())
def test_tokenizer_files(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    cut = damaged_bytes(json.dumps(FOREIGN).encode())
    content = data.draw(st.one_of(damaged(OURS), damaged(FOREIGN), cut, values))
    written(path, content)
    tokenizer = works_or_says_why(lambda: load_tokenizer(path))
    if isinstance(tokenizer, Tokenizer):
        assert works_or_says_why(lambda: tokenizer.encode("some words")) is not None
