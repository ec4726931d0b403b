import json
from pathlib import Path

import numpy as np
import pytest
from places import DATA

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.corpora import load_documents
from bd3lm_jax.data.tokenizers import get_tokenizer, load_tokenizer

VECTORS = DATA / "tokenizers"
TEXTS = ["Hello, world", "naïve café £5 — ‘quote’", " leading and  double spaces", "日本語 🦙", "", "tab\tnewline\nend"]


def no_documents():
    raise AssertionError("this tokenizer reads no documents")


def austen_bpe(data_config, size: int):
    return get_tokenizer(f"bpe:{size}", lambda: load_documents(data_config(), "test"))


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased"])
def test_published_vectors(name):
    texts = (VECTORS / "vectors.txt").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in (VECTORS / f"{name}.txt").read_text().split("\n")]
    assert len(texts) == len(expected) == 47
    tokenizer = get_tokenizer(name, no_documents)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected


@pytest.mark.parametrize("name, size, end_id, mask_id, vocab_size", [
    ("bytes", 257, 256, 257, 258),
    ("gpt2", 50257, 50256, 50257, 50258),
    ("bert-base-uncased", 30522, 102, 103, 30522),
])
def test_ids_as_published(name, size, end_id, mask_id, vocab_size):
    tokenizer = get_tokenizer(name, no_documents)
    found = (tokenizer.size, tokenizer.end_id, tokenizer.mask_id, tokenizer.vocab_size)
    assert found == (size, end_id, mask_id, vocab_size)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_round_trip(data_config, name):
    tokenizer = austen_bpe(data_config, 300) if name == "bpe" else get_tokenizer(name, no_documents)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = np.concatenate([tokenizer.encode("one"), [tokenizer.mask_id, tokenizer.end_id], tokenizer.encode("two"),
                          [tokenizer.end_id, tokenizer.vocab_size + 7]])
    assert tokenizer.decode(ids) == "one\ntwo\n"


def test_special_tokens_in_a_document_are_text(data_config):
    for tokenizer in (get_tokenizer("bert-base-uncased", no_documents), get_tokenizer("gpt2", no_documents),
                      austen_bpe(data_config, 300)):
        ids = tokenizer.encode("a [MASK] b [SEP] <|endoftext|>")
        assert not set(ids.tolist()) & {tokenizer.mask_id, tokenizer.end_id}


def test_long_text_is_neither_padded_nor_cut():
    tokenizer = get_tokenizer("bert-base-uncased", no_documents)
    assert tokenizer.encode("the " * 300).tolist() == [1996] * 300


def test_bpe_has_exactly_the_size_asked_for_and_is_deterministic(data_config):
    first, second = austen_bpe(data_config, 400), austen_bpe(data_config, 400)
    assert first.size == 400 and first.vocab_size == 401 and first.mask_id == 400
    assert first.identity == second.identity != austen_bpe(data_config, 401).identity
    ids = first.encode("She was in the house")
    assert len(ids) < len("She was in the house") and ids.max() < 400


def test_bpe_errors():
    with pytest.raises(UserError, match="found only .* ask for bpe:"):
        get_tokenizer("bpe:1000", lambda: ["too little"])
    for spec in ("bpe:256", "bpe:many", "bpe:"):
        with pytest.raises(UserError, match="N at least 257"):
            get_tokenizer(spec, list)


def test_unknown_names():
    with pytest.raises(UserError, match="'gpt-2': did you mean 'gpt2'"):
        get_tokenizer("gpt-2", no_documents)
    with pytest.raises(UserError, match="missing.json does not exist"):
        get_tokenizer("missing.json", no_documents)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bert-base-uncased", "bpe"])
def test_save_and_load(data_config, tmp_path, name):
    tokenizer = austen_bpe(data_config, 300) if name == "bpe" else get_tokenizer(name, no_documents)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = get_tokenizer(str(tmp_path / "tokenizer.json"), no_documents)
    assert loaded.identity == tokenizer.identity and loaded.to_bytes() == tokenizer.to_bytes()
    assert (loaded.size, loaded.end_id, loaded.mask_id) == (tokenizer.size, tokenizer.end_id, tokenizer.mask_id)
    assert loaded.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()


def hugging_face_file(path: Path, vocab: list[str]) -> str:
    from tokenizers import Tokenizer, models

    path.write_text(Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="?")).to_str())
    return str(path)


def test_hugging_face_file(tmp_path):
    path = hugging_face_file(tmp_path / "tokenizer.json", ["?", "a", "</s>", "<mask>", "stop"])
    tokenizer = load_tokenizer(path)
    assert (tokenizer.size, tokenizer.end_id, tokenizer.mask_id, tokenizer.vocab_size) == (5, 2, 3, 5)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "stop"}}))
    assert load_tokenizer(path).end_id == 4


def test_bad_tokenizer_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="no end token"):
        load_tokenizer(hugging_face_file(path, ["?", "a"]))
    for content, message in (("{", "cannot be read"), ("[]", "JSON list"), ("{}", "not a Hugging Face"),
                             ('{"kind": "gpt2"}', "no 'model'"),
                             ('{"kind": "gpt2", "model": "x", "end_id": 0, "mask_id": 1}', "not a Hugging Face")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(path)


def sentence_pieces(path: Path) -> str:
    """A vocabulary in the style of SentencePiece: a mark for spaces, and single bytes for what it lacks."""
    from tokenizers import Tokenizer, decoders, models

    vocab = ["?", "</s>", "▁the", "▁", "re", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = Tokenizer(models.BPE({word: i for i, word in enumerate(vocab)}, [], byte_fallback=True))
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    path.write_text(model.to_str())
    return str(path)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bert-base-uncased", "bpe", "sentence pieces"])
def test_bytes_of_tokens_join_to_the_text(data_config, tmp_path, name):
    if name == "sentence pieces":
        tokenizer = load_tokenizer(sentence_pieces(tmp_path / "tokenizer.json"))
    else:
        tokenizer = austen_bpe(data_config, 300) if name == "bpe" else get_tokenizer(name, no_documents)
    first, later = tokenizer.token_bytes()
    assert len(first) == len(later) == tokenizer.size and first[tokenizer.end_id] == later[tokenizer.end_id] == b""
    usable, rng = [i for i in range(tokenizer.size) if first[i] and later[i]], np.random.default_rng(0)
    assert len(usable) > 0.95 * tokenizer.size
    for _ in range(300):
        ids = rng.choice(usable, rng.integers(1, 8))
        joined = first[ids[0]] + b"".join(later[i] for i in ids[1:])
        text = joined.decode(errors="replace")
        if "\ufffd" not in text or name != "sentence pieces":  # that library replaces each byte of invalid UTF-8
            assert tokenizer.decode(ids) == text
