"""Tokenizers that lie beside published weights: each form of the same vocabulary gives the published ids."""

import json
import lzma
from importlib import resources

import pytest
from places import DATA

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.tokenizers import get_tokenizer, tokenizer_of

VECTORS = DATA / "tokenizers"
SAPIENS = DATA / "sapiens_vh"


def preset(name) -> dict:
    packed = resources.files("bd3lm_jax.data").joinpath("resources", f"{name}.json.xz").read_bytes()
    return json.loads(lzma.decompress(packed))


def by_id(vocab: dict[str, int]) -> list[str]:
    return sorted(vocab, key=vocab.get)


def assert_published(tokenizer, name):
    texts = (VECTORS / "vectors.txt").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in (VECTORS / f"{name}.txt").read_text().split("\n")]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected


def test_word_pieces(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(by_id(preset("bert-base-uncased")["model"]["vocab"])) + "\n")
    tokenizer = tokenizer_of(tmp_path)
    assert_published(tokenizer, "bert-base-uncased")
    assert (tokenizer.size, tokenizer.end_id, tokenizer.mask_id, tokenizer.unknown_id) == (30522, 102, 103, 100)
    assert tokenizer.decode([101, *tokenizer.encode("a word-piece"), 102]) == "a word - piece\n"


def test_cased_word_pieces(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\nWord\nword\n##s\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.encode("Words word other").tolist() == [2, 4, 3, 0]
    assert tokenizer.mask_id == 5 == tokenizer.vocab_size - 1  # on top: the vocabulary has none


def test_byte_level_pairs(tmp_path):
    model = preset("gpt2")["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    tokenizer = tokenizer_of(tmp_path)
    assert_published(tokenizer, "gpt2")
    assert (tokenizer.size, tokenizer.end_id, tokenizer.mask_id) == (50257, 50256, 50257)
    assert tokenizer.token_bytes()[0] == get_tokenizer("gpt2", None).token_bytes()[0]


def test_letters():
    """A vocabulary of amino acids without merges: every letter is a token."""
    tokenizer = tokenizer_of(SAPIENS)
    vocab = json.loads((SAPIENS / "vocab.json").read_text())
    text = "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYP"
    ids = tokenizer.encode(text)
    assert ids.tolist() == [vocab[letter] for letter in text] and tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.mask_id, tokenizer.unknown_id) == (25, 2, 24, 3)
    assert tokenizer.encode("AX").tolist() == [vocab["A"], 3]
    assert tokenizer.decode([0, *ids[:3], 24, 1, 2]) == "EVQ\n"
    assert not set(tokenizer.encode("<mask></s>").tolist()) & {tokenizer.mask_id, tokenizer.end_id}


def test_tokenizer_json_comes_first_and_configs_name_the_special_tokens(tmp_path):
    content = preset("gpt2")
    content["model"]["vocab"] |= {"<end>": 50257, "<hidden>": 50258}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "vocab.txt").write_text("never read")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>", "mask_token": "<hidden>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}, "mask_token": "<hidden>"}')
    tokenizer = tokenizer_of(tmp_path)
    assert (tokenizer.size, tokenizer.end_id, tokenizer.mask_id) == (50259, 50257, 50258)
    assert tokenizer.encode("Hello").tolist() == [15496]


def test_what_a_tokenizer_saved_is_one(tmp_path):
    saved = get_tokenizer("bytes", None)
    saved.save(tmp_path / "tokenizer.json")
    assert tokenizer_of(tmp_path).identity == saved.identity
    assert tokenizer_of(tmp_path / "nowhere") is None


def test_a_directory_as_data_tokenizer(tmp_path):
    assert get_tokenizer(str(SAPIENS), None).identity == tokenizer_of(SAPIENS).identity
    with pytest.raises(UserError, match="is a directory without tokenizer.json, vocab.txt or vocab.json"):
        get_tokenizer(str(tmp_path), None)


@pytest.mark.parametrize("files, message", [
    ({"vocab.txt": "[UNK]\nword\n"}, "'vocab.txt' has no end token"),
    ({"vocab.json": "[1]"}, "holds a JSON list, expected an object"),
    ({"vocab.json": '{"a": 0, "</s>": 1}', "merges.txt": "a b\n"}, "vocab.json and merges.txt are no BPE vocabulary"),
    ({"vocab.json": '{"a": 0, "</s>": 1}', "merges.txt": "a\n"}, "vocab.json and merges.txt are no BPE vocabulary"),
])
def test_wrong_files(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        tokenizer_of(tmp_path)
