"""Spans of characters to tokens, tables of ids, fractions of documents; by hand, for every shipped tokenizer."""

import numpy as np
import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.density import check, frequency, is_continuous, open_density, surprisal, unigram
from bd3lm_jax.data.density.source import Annotation, Context, Spans, dense_tokens, hash_fraction
from bd3lm_jax.data.tokenizers import get_tokenizer

TEXT = "if naïve: café  42+1"
TOKENIZERS = ("bytes", "gpt2", "bert-base-uncased", "bpe:284")
CORPUS = ["if the café is naïve: stay", "the sum 42+1 is 43 if"] * 4


def tokenizer_of(name):
    return get_tokenizer(name, lambda: iter(CORPUS))


def dense_text(name, *words):
    """The tokens, as texts, that spans of these words (the first occurrence of each) make dense."""
    tokenizer = tokenizer_of(name)
    ids, offsets = tokenizer.encode_offsets([TEXT])[0]
    spans = [(TEXT.index(word), TEXT.index(word) + len(word)) for word in words]
    return [TEXT[s:e].strip() for (s, e), dense in zip(offsets, dense_tokens(TEXT, offsets, spans)) if dense]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_offsets_are_of_the_same_ids_and_cover_the_text(name):
    tokenizer = tokenizer_of(name)
    texts = [TEXT, "", "🦙"]
    for (ids, offsets), plain in zip(tokenizer.encode_offsets(texts), tokenizer.encode_batch(texts)):
        np.testing.assert_array_equal(ids, plain)
        assert offsets.shape == (len(ids), 2) and (offsets[:, 0] < offsets[:, 1]).all()
    ids, offsets = tokenizer.encode_offsets([TEXT])[0]
    touched = {i for start, end in offsets for i in range(start, end)}
    assert {i for i, character in enumerate(TEXT) if character != " "} <= touched


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_span_takes_the_tokens_of_its_word_and_no_others(name):
    assert "".join(dense_text(name, "if")) == "if"
    assert dense_text(name, "42")[0][0] == "4" and dense_text(name, "42")[-1].endswith("2")
    assert "".join(dense_text(name, "if", "café")).startswith("ifcaf")
    assert not any(":" in word or "n" in word for word in dense_text(name, "café"))
    assert dense_text(name, "naïve")[0].startswith("n") and not any("if" in word for word in dense_text(name, "naïve"))


def test_by_hand_with_bytes():
    tokenizer = tokenizer_of("bytes")
    ids, offsets = tokenizer.encode_offsets(["aï b"])[0]
    assert offsets.tolist() == [[0, 1], [1, 2], [1, 2], [2, 3], [3, 4]]
    assert dense_tokens("aï b", offsets, [(1, 2)]).tolist() == [False, True, True, False, False]
    assert dense_tokens("aï b", offsets, [(0, 1), (3, 4)]).tolist() == [True, False, False, False, True]


def test_a_space_before_a_word_is_no_part_of_it():
    offsets = np.array([[0, 2], [2, 6], [6, 8]])  # "ab", " cde", "  "
    assert dense_tokens("ab cde  ", offsets, [(0, 3)]).tolist() == [True, False, False]
    assert dense_tokens("ab cde  ", offsets, [(5, 7)]).tolist() == [False, True, True]
    missed = []
    dense_tokens("ab cde  ", offsets, [(2, 3), (3, 4)], lambda text, span: missed.append(span))
    assert missed == [(2, 3)]


def counts():
    return np.array([0, 50, 30, 10, 10])


def context(read=counts):
    return Context(lambda: "corpus", read)


def test_unigram_tags_the_rare_half():
    assert unigram.tags(counts(), 0.5).tolist() == [True, False, True, True, True]
    assert unigram.tags(counts(), 0.6).tolist() == [True, False, False, True, True]
    assert unigram.tags(counts(), 0.95).tolist() == [True, False, False, False, False]  # equal counts are alike
    dense = counts()[unigram.tags(counts(), 0.5)].sum() / counts().sum()
    assert dense == 0.5


def test_numbers_of_ids():
    assert frequency.log_frequency(counts()) == pytest.approx(np.log([1, 51, 31, 11, 11]) / np.log(51))
    assert surprisal.surprisal(counts()) == pytest.approx([1, *(-np.log2([0.5, 0.3, 0.1, 0.1]) / np.log2(100))])
    for spec in ("frequency", "surprisal"):
        annotation = open_density(spec, 1.0, context())
        values = annotation.of("text", np.array([3, 1]), None, 2)
        assert values.dtype == np.float32 and values.shape == (3,) and is_continuous(spec)
    np.testing.assert_allclose(values[2], np.log(100 / 30) / np.log(100), rtol=1e-6)  # the end token


def test_fractions_are_nested_and_follow_from_the_text():
    texts = [f"document number {i}" for i in range(2000)]
    numbers = np.array([hash_fraction(text) for text in texts])
    assert (numbers == [hash_fraction(text) for text in texts]).all() and 0 <= numbers.min() and numbers.max() < 1
    chosen = {}
    one_token = np.zeros(1, int), np.array([[0, 8]]), 0
    for fraction in (0.1, 0.3, 1.0):
        annotation = Annotation("x", fraction, Spans(lambda text: [(0, 4)], None))
        chosen[fraction] = {text for text in texts if annotation.of(text, *one_token).any()}
        assert abs(len(chosen[fraction]) - 2000 * fraction) < 4 * np.sqrt(2000 * fraction * (1 - fraction)) + 1
    assert chosen[0.1] < chosen[0.3] < chosen[1.0] == set(texts)


def test_the_end_of_a_document_is_not_dense():
    annotation = Annotation("x", 1.0, Spans(lambda text: [(0, len(text))], None))
    assert annotation.of("ab", np.zeros(2, int), np.array([[0, 1], [1, 2]]), 0).tolist() == [1, 1, 0]


@pytest.mark.parametrize("spec, fraction, words", [
    ("pyhton", 1.0, "unknown data.density 'pyhton': did you mean 'python'?"),
    ("python:3", 1.0, "'python' takes nothing after a colon"),
    ("unigram", 1.0, "expected 'unigram:QUANTILE'"),
    ("unigram:2", 1.0, "expected a part of the tokens between 0 and 1, e.g. unigram:0.5"),
    ("unigram:half", 1.0, "expected a part of the tokens"),
    ("file", 1.0, "expected 'file:PATH'"),
    ("file:/nowhere.jsonl", 1.0, "there is no such file"),
    ("python", 0.0, "data.density_fraction is 0.0, expected above 0 and up to 1"),
    ("python", 1.5, "data.density_fraction is 1.5"),
    ("", 0.3, "data.density_fraction=0.3 has no effect without data.density"),
])
def test_bad_specs(spec, fraction, words):
    with pytest.raises(UserError) as error:
        check(spec, fraction)
    assert words in str(error.value) and "\n" not in str(error.value)
