"""Published layouts of tokenizers give the ids of their own classes in transformers (`tests/data/tokenizers/classes`,
whose `make.py` says how), and SentencePiece vocabularies those of sentencepiece."""

import json
import shutil

import pytest
from places import DATA

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import sentence_pieces, tokenizer_files
from bd3lm_jax.data.tokenizers import SubwordTokenizer, get_tokenizer, tokenizer_of

CLASSES = DATA / "tokenizers" / "classes"
GOLDEN = json.loads((CLASSES / "ids.json").read_text())
TEXTS, LAYOUTS = GOLDEN["texts"], GOLDEN["layouts"]
BESIDE = {"GPT2Tokenizer": ("vocab.json", "merges.txt"), "RobertaTokenizer": ("vocab.json", "merges.txt"),
          "Qwen2Tokenizer": ("vocab.json", "merges.txt"), "BertTokenizer": ("vocab.txt",)}
LLAMA_2 = ("llama", "llama legacy")


def laid_out(directory, name):
    """The directory as it is published."""
    for file, content in LAYOUTS[name]["files"].items():
        (directory / file).write_text(content)
    for file in BESIDE.get(LAYOUTS[name]["class"], ()):
        shutil.copy(CLASSES / file, directory / file)
    if name in LLAMA_2:
        shutil.copy(CLASSES / "bpe.model", directory / "tokenizer.model")
    return directory


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "sentencepiece" not in name])
def test_ids_of_the_class_in_transformers(tmp_path, name):
    if name in LLAMA_2:
        pytest.importorskip("sentencepiece")
    tokenizer = tokenizer_of(laid_out(tmp_path, name))
    for text, expected in zip(TEXTS, LAYOUTS[name]["ids"], strict=True):
        assert tokenizer.encode_special(text).tolist() == expected, text


def test_ids_of_sentencepiece(tmp_path):
    pytest.importorskip("sentencepiece")
    shutil.copy(CLASSES / "bpe.model", tmp_path / "tokenizer.model")
    tokenizer = tokenizer_of(tmp_path)
    for text, expected in zip(TEXTS, LAYOUTS["sentencepiece"]["ids"], strict=True):
        assert tokenizer.encode(text).tolist() == expected, text


def test_pieces_with_scores():
    """As a GGUF file holds them."""
    pieces = sentence_pieces.Pieces(*LAYOUTS["sentencepiece"]["pieces"], prefix=True, legacy=True, exact=True,
                                    byte_fallback=True)
    tokenizer = SubwordTokenizer("pieces", json.dumps(sentence_pieces.as_json(pieces)), 2, None)
    assert tokenizer.unknown_id == 0
    for text, expected in zip(TEXTS, LAYOUTS["sentencepiece"]["ids"], strict=True):
        ids = tokenizer.encode(text)
        if "<tool_call>" not in text:  # SentencePiece writes no space behind it
            assert ids.tolist() == expected, text
        assert tokenizer.decode(ids).replace(" x<", "x<") == text


def test_a_dream_directory(tmp_path):
    """No tokenizer.json, and the end and the mask only among the added tokens."""
    tokenizer = get_tokenizer(str(laid_out(tmp_path, "dream")), None)
    size = len(json.loads((CLASSES / "vocab.json").read_text()))
    assert (tokenizer.end_id, tokenizer.mask_id, tokenizer.size) == (size, size + 5, size + 6)
    text = "a <|mask|> and <|endoftext|> are text"
    assert not {tokenizer.mask_id, tokenizer.end_id} & set(tokenizer.encode(text).tolist())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.mask_id not in tokenizer.encode_special(text)  # the end is one there
    (tmp_path / "tokenizer_config.json").unlink()  # added_tokens.json alone, and the network says the class
    (tmp_path / "config.json").write_text('{"model_type": "Dream"}')
    plain = tokenizer_of(tmp_path)
    assert (plain.end_id, plain.mask_id) == (tokenizer.end_id, tokenizer.mask_id)
    for text in TEXTS[:7]:
        assert plain.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_tokens_that_only_the_config_adds(tmp_path):
    laid_out(tmp_path, "llama3")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    size = tokenizer_of(tmp_path).size
    config |= {"mask_token": "<|mask|>", "added_tokens_decoder": {str(size): {"content": "<|mask|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_of(tmp_path)
    assert (tokenizer.mask_id, tokenizer.size) == (size, size + 1)
    config["added_tokens_decoder"] = {str(size + 3): {"content": "<|mask|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"token '<\|mask\|>' is to have id {size + 3}, expected {size}, the next one"):
        tokenizer_of(tmp_path)


def test_switches_of_the_config_win(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "Word": 2, "word": 3}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_of(tmp_path).encode("Word").tolist() == [3]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert tokenizer_of(tmp_path).encode("Word").tolist() == [2]


@pytest.mark.parametrize("name, kind, message", [
    ("gpt2", "CLIPTokenizer", "vocab.json is read by CLIPTokenizer, supported: GPT2Tokenizer, .*put a tokenizer.json"),
    ("bert", "EsmTokenizer", "vocab.txt is read by EsmTokenizer, supported: BertTokenizer"),
    ("llama", "GemmaTokenizerFast", "tokenizer.model is read by GemmaTokenizer, supported: LlamaTokenizer"),
])
def test_classes_that_are_not_read(tmp_path, capsys, name, kind, message):
    laid_out(tmp_path, name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UserError, match=message):
        get_tokenizer(str(tmp_path), None)
    assert tokenizer_of(tmp_path) is None  # ids can be used all the same
    assert f"is read by {kind.removesuffix('Fast')}" in capsys.readouterr().err


def in_json(tmp_path, **parts):
    from tokenizers import Tokenizer, models

    content = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")])).to_str())
    content["model"] |= parts.pop("model", {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | parts))
    return tmp_path


def token(i, content, special=False):
    return {"id": i, "content": content, "special": special, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False}


def test_random_merges_are_left_out(tmp_path):
    tokenizer = tokenizer_of(in_json(tmp_path, model={"dropout": 0.5}))
    assert {tuple(tokenizer.encode("ab" * 20).tolist()) for _ in range(20)} == {(2,) * 20}
    assert {tuple(tokenizer.encode_special("ab" * 20).tolist()) for _ in range(20)} == {(2,) * 20}


@pytest.mark.parametrize("special", [False, True])
def test_a_mask_in_a_text_is_text(tmp_path, special):
    tokenizer = tokenizer_of(in_json(tmp_path, added_tokens=[token(4, "a<mask>b"), token(5, "<mask>", special)]))
    assert tokenizer.mask_id == 5
    assert tokenizer.encode("ab<mask>ab").tolist() == tokenizer.encode_special("ab<mask>ab").tolist() == [2, 0, 2]
    again = tokenizer.with_mask(4)  # a network may say that another token is the mask
    assert again.encode("a<mask>b").tolist() == [0, 2]
    assert again.encode("b<mask>b").tolist() == ([1, 2] if special else [1, 5, 1])


def test_a_mask_that_is_a_word(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    for unknown, expected in (("?", [1, 0, 1]), ("-", None)):
        words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "</s>": 2, "<mask>": 3}, unk_token=unknown))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.save(str(tmp_path / "tokenizer.json"))
        tokenizer = tokenizer_of(tmp_path)
        if expected:
            assert tokenizer.encode("a <mask> a").tolist() == expected
        else:
            with pytest.raises(UserError, match="a text spells the mask token '<mask>', .*take it out"):
                tokenizer.encode("a <mask> a")


def test_unknown_tokens_of_a_unigram(tmp_path):
    from tokenizers import Tokenizer, models

    for unknown in (0, 2):
        model = models.Unigram([("x", -1.0), ("</s>", -2.0), ("y", -1.0)], unk_id=unknown)
        Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        tokenizer = tokenizer_of(tmp_path)
        assert tokenizer.unknown_id == unknown and tokenizer.encode("q").tolist() == [unknown]


@pytest.mark.parametrize("parts, message", [
    ({"added_tokens": [token(7, "<x>")]}, "the added token '<x>' has id 7, expected 4, the next one"),
    ({"model": {"vocab": {"a": 0, "b": 1, "ab": 2, "</s>": 4294967295}}}, "has ids up to 4294967295, expected 0 to"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "is not a Hugging Face tokenizer.json: "),
])
def test_files_that_the_library_would_misread(tmp_path, parts, message):
    with pytest.raises(UserError, match=message):
        tokenizer_of(in_json(tmp_path, **parts))


@pytest.mark.parametrize("parts", [
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
])
def test_panics_of_the_library_are_errors(tmp_path, parts):
    """PanicException is no Exception."""
    tokenizer = tokenizer_of(in_json(tmp_path, **parts))
    for encode in (tokenizer.encode, tokenizer.encode_special, lambda text: tokenizer.encode_offsets([text]),
                   lambda text: tokenizer.encode_batch([text, text])):
        with pytest.raises(UserError, match="tokenizer 'tokenizer.json' cannot encode a text: "):
            encode("a" * 40 + "b")


def test_only_what_the_library_raises_is_its_error():
    class Panic(BaseException):
        pass

    Panic.__name__ = "PanicException"
    for error, expected in ((Panic("x"), UserError), (Exception("x"), UserError), (KeyError("x"), KeyError),
                            (KeyboardInterrupt(), KeyboardInterrupt), (UserError("x"), UserError)):
        with pytest.raises(expected), tokenizer_files.library_errors("t", "fails"):
            raise error


def test_errors_of_documents_pass_through_training():
    def documents():
        yield "the first"
        raise UserError("line 2 is not UTF-8")

    with pytest.raises(UserError, match="^line 2 is not UTF-8$"):
        get_tokenizer("bpe:300", documents)
