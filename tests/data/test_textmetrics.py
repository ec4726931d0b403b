import collections
import math

import numpy as np
import pytest

from bd3lm_jax.config import DataConfig
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import textmetrics
from bd3lm_jax.data.corpora import join_documents, load_documents

AUSTEN = DataConfig(tokenizer="bytes")


def slow_nats(train: list, test: list, vocab: int, order: int) -> float:
    """Interpolated Witten-Bell with dictionaries; the train text is a circle and the test text follows it."""
    following = collections.defaultdict(collections.Counter)
    for index, token in enumerate(train):
        for length in range(order):
            history = tuple(train[(index - back) % len(train)] for back in range(length, 0, -1))
            following[history][token] += 1
    total, past = 0.0, train * order
    for token in test:
        probability = 1 / vocab
        for length in range(order):
            counts = following.get(tuple(past[len(past) - length:]))
            if counts:
                kinds = len(counts)
                probability = (counts[token] + kinds * probability) / (sum(counts.values()) + kinds)
        total -= math.log(probability)
        past = past + [token]
    return total


@pytest.mark.parametrize("vocab, order", [(2, 1), (3, 4), (5, 2), (300, 3), (50258, 2), (256, 8)])
def test_equals_a_dictionary_implementation(vocab, order):
    rng = np.random.default_rng(order)
    ids = (vocab * rng.random(400) ** 3).astype(int).tolist()
    train, test = ids[:300], ids[300:]
    expected = slow_nats(train, test, vocab, order)
    assert textmetrics.ngram_nats(train, test, vocab, order).sum() == pytest.approx(expected, rel=1e-12)


def test_train_shorter_than_the_order():
    assert textmetrics.ngram_nats([1], [1, 0], 2, 4).sum() == pytest.approx(slow_nats([1], [1, 0], 2, 4))


def test_probabilities_sum_to_one():
    train = np.random.default_rng(0).integers(0, 4, 50)
    history = [3, 1]
    # p(w | history) = p(history, w) / p(history)
    shared = textmetrics.ngram_nats(train, history, 5, 3).sum()
    nats = [textmetrics.ngram_nats(train, [*history, w], 5, 3).sum() - shared for w in range(5)]
    assert sum(math.exp(-x) for x in nats) == pytest.approx(1)


@pytest.mark.parametrize("order, expected", [(3, 2.77), (4, 2.26), (5, 2.02)])
def test_austen_calibration(order, expected):
    """Known values for the five novels -> *Persuasion*."""
    train = b"".join(_novel_text(split) for split in ("train", "valid"))
    assert textmetrics.byte_ngram_bits_per_byte(train, _novel_text("test"), order) == pytest.approx(expected, abs=0.006)


def _novel_text(split: str) -> bytes:
    return join_documents(load_documents(AUSTEN, split))


def test_bits_per_byte_of_tokens():
    train, test = [0, 1, 0, 2], [0, 1]
    # unigram: (c + 3/8) / 7 with 3 kinds among 4 tokens and a vocabulary of 8
    bits = -math.log2(2.375 / 7) - math.log2(1.375 / 7)
    assert textmetrics.unigram_bits_per_byte(train, test, 8, test_bytes=10) == pytest.approx(bits / 10)
    # bigram: 2 -> 0 once; 0 -> {1, 2} once each
    bits = -math.log2((1 + 2.375 / 7) / 2) - math.log2((1 + 2 * 1.375 / 7) / 4)
    assert textmetrics.bigram_bits_per_byte(train, test, 8, test_bytes=10) == pytest.approx(bits / 10)


def test_bad_input():
    with pytest.raises(UserError, match="0 train and 2 test tokens"):
        textmetrics.ngram_nats([], [1, 2], 3, 1)
    with pytest.raises(UserError, match="needs 80 bits"):
        textmetrics.ngram_nats([1], [1], 50258, 5)


def test_entropy():
    assert textmetrics.entropy_of_tokens(np.arange(8).reshape(2, 4)) == pytest.approx(math.log(8))
    assert textmetrics.entropy_of_tokens([7] * 9) == 0
    assert textmetrics.entropy_of_tokens([1, 1, 1, 2]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert textmetrics.entropy_of_tokens([]) == 0


def ids(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text])


def test_distinct_by_hand():
    texts = [ids("abab"), ids("ba"), ids("c")]
    assert textmetrics.distinct(texts, 1) == 3 / 7
    assert textmetrics.distinct(texts, 2) == 2 / 4  # ab ba ab, ba; none crosses texts
    assert textmetrics.distinct(texts, 3) == 2 / 2  # aba bab
    assert math.isnan(textmetrics.distinct(texts, 5))


@pytest.mark.parametrize("text, tokens, longest", [
    ("abcdXabcdY", 8, 4), ("abcXabcY", 0, 3), ("aaaaa", 5, 4), ("aaaa", 0, 3), ("abcdeabcde", 10, 5),
    ("abcabcabc", 9, 6), ("abcd", 0, 0), ("a", 0, 0), ("", 0, 0)])
def test_repetition_by_hand(text, tokens, longest):
    assert textmetrics.repeated_tokens(ids(text), 4) == tokens
    assert textmetrics.longest_repeat(ids(text)) == longest


def test_repetition_equals_a_search_of_all_passages():
    rng = np.random.default_rng(0)
    for size in range(1, 40):
        text = rng.integers(0, 3, size)
        for n in (1, 2, 3, 4, 7):
            starts = range(size - n + 1)
            again = [i for i in starts if any((text[i:i + n] == text[j:j + n]).all() for j in starts if j != i)]
            assert textmetrics.repeated_tokens(text, n) == len({i + k for i in again for k in range(n)})
            assert (textmetrics.longest_repeat(text) >= n) == bool(again)
