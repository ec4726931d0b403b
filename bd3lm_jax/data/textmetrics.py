"""What counting says: n-gram models that a trained model must beat, entropy, diversity and repetition of texts.

The models are interpolated Witten-Bell (Witten and Bell 1991; Chen and Goodman 1998, section 2.5): with c counts and
T(h) the number of distinct tokens that followed the history h,

    p(w | h) = (c(h, w) + T(h) p(w | shorter h)) / (c(h) + T(h)),    p(w) without history backs off to 1 / vocabulary.

The train text is read as a circle, and the test text follows it: both end with the end of a document.
"""

import math
from collections.abc import Sequence

import numpy as np

from bd3lm_jax.core.errors import UserError

BYTES = 256


def ngram_nats(train_ids, test_ids, vocab: int, order: int) -> np.ndarray:
    """Nats of each of `test_ids` [n] under an `order`-gram model of `train_ids` [m], float64 [n]; ids in 0..vocab-1.

    Raises UserError if either is empty or `order` tokens do not fit in 64 bits.
    """
    train_ids, test_ids = (np.asarray(ids).reshape(-1) for ids in (train_ids, test_ids))
    if not train_ids.size or not test_ids.size:
        raise UserError(f"a count model needs text: {train_ids.size} train and {test_ids.size} test tokens given")
    bits = max(1, (vocab - 1).bit_length())
    if order * bits > 64:
        raise UserError(f"a {order}-gram of {vocab} tokens needs {order * bits} bits, expected at most 64")
    history = np.resize(train_ids[::-1], order - 1)[::-1]
    codes = np.sort(_codes(train_ids, history, order, bits))
    test_codes = _codes(test_ids, history, order, bits)
    probability = np.full(test_ids.shape, 1 / vocab)
    for length in range(1, order + 1):
        shift = np.uint64((order - length) * bits)  # drops the oldest tokens; what was sorted stays sorted
        probability = _interpolate(codes >> shift, test_codes >> shift, (length - 1) * bits, probability)
    return -np.log(probability)


def unigram_bits_per_byte(train_ids, test_ids, vocab: int, test_bytes: int) -> float:
    """Bits per byte of a text of `test_bytes` UTF-8 bytes (a newline a document) under counts of its tokens."""
    return float(ngram_nats(train_ids, test_ids, vocab, 1).sum()) / math.log(2) / test_bytes


def bigram_bits_per_byte(train_ids, test_ids, vocab: int, test_bytes: int) -> float:
    """As `unigram_bits_per_byte`, given the token before."""
    return float(ngram_nats(train_ids, test_ids, vocab, 2).sum()) / math.log(2) / test_bytes


def byte_ngram_bits_per_byte(train_bytes: bytes, test_bytes: bytes, order: int) -> float:
    """Bits per byte under the `order`-gram model of bytes, `order` from 1 to 8."""
    train_ids, test_ids = (np.frombuffer(text, np.uint8) for text in (train_bytes, test_bytes))
    return float(ngram_nats(train_ids, test_ids, BYTES, order).sum()) / math.log(2) / max(1, len(test_bytes))


def entropy_of_tokens(ids) -> float:
    """Entropy in nats of the empirical distribution of `ids` (any shape); 0 without ids."""
    counts = np.unique(np.asarray(ids).reshape(-1), return_counts=True)[1]
    frequency = counts / max(1, counts.sum())
    return float(-(frequency * np.log(frequency)).sum())


def distinct(texts: Sequence[np.ndarray], n: int) -> float:
    """Different n-grams over all n-grams of some texts (token ids [length]); none crosses texts; nan without any.

    distinct-n of Li et al. 2016 (arXiv 1510.03055). It falls with the number of tokens: compare equal amounts.
    """
    grams = [gram for ids in texts for gram in zip(*(np.asarray(ids)[start:].tolist() for start in range(n)))]
    return len(set(grams)) / len(grams) if grams else math.nan


def repeated_tokens(ids, n: int) -> int:
    """How many tokens of one text, ids [length], lie inside an n-gram that occurs there more than once."""
    grams = _ngrams(ids, n)
    again = np.bincount(grams)[grams] > 1 if len(grams) else np.zeros(0, bool)
    inside = np.zeros(len(ids), bool)
    for offset in range(n):
        inside[offset:offset + len(again)] |= again
    return int(inside.sum())


def longest_repeat(ids) -> int:
    """Tokens of the longest passage that occurs more than once in one text, ids [length]; the two may overlap."""
    low, high = 0, max(len(ids) - 1, 0)  # a passage that occurs twice: so do all its parts
    while low < high:
        middle = (low + high + 1) // 2
        grams = _ngrams(ids, middle)
        low, high = (middle, high) if len(np.unique(grams)) < len(grams) else (low, middle - 1)
    return low


def _ngrams(ids, n: int) -> np.ndarray:
    """[length - n + 1] numbers below the length, equal where the n-grams are: those of 2, 4, 8, ... tokens in turn."""
    codes, size = np.unique(np.asarray(ids), return_inverse=True)[1].reshape(-1), 1
    while size < n and len(codes):
        step = min(size, n - size)
        codes = np.unique(codes[:-step] * len(ids) + codes[step:], return_inverse=True)[1].reshape(-1)
        size += step
    return codes


def _codes(ids: np.ndarray, history: np.ndarray, order: int, bits: int) -> np.ndarray:
    """uint64 [n]: each token with the order - 1 before it, the token itself in the highest bits, the oldest lowest."""
    padded = np.concatenate([history, ids]).astype(np.uint64)
    codes = np.zeros(len(ids), np.uint64)
    for age in range(order):
        start = order - 1 - age
        codes = (codes << np.uint64(bits)) | padded[start:start + len(ids)]
    return codes


def _interpolate(codes: np.ndarray, test_codes: np.ndarray, history_bits: int, lower: np.ndarray) -> np.ndarray:
    """p(w | h) of the test n-grams from sorted train n-grams and p(w | shorter h)."""
    ngrams, counts = _runs(codes)
    mask = np.uint64((1 << history_bits) - 1)
    order = np.argsort(ngrams & mask)
    histories, kinds = _runs((ngrams & mask)[order])
    totals = np.add.reduceat(counts[order], np.cumsum(kinds) - kinds)
    count = _look_up(ngrams, counts, test_codes)
    kind, total = (_look_up(histories, values, test_codes & mask) for values in (kinds, totals))
    has_history = total > 0
    return np.where(has_history, (count + kind * lower) / np.where(has_history, total + kind, 1), lower)


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a sorted array and how often each occurs."""
    first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return values[first], np.diff(first, append=len(values))


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where `queries` is not among the sorted keys."""
    place = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[place] == queries, values[place], 0)
