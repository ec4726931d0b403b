import dataclasses

import numpy as np
import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.data.token_bytes import RowsWithBytes
from bd3lm_jax.data.tokenizers import ByteTokenizer
from bd3lm_jax.data.windows import ConditionedRows, ScoringConvention, Windows, rows_to_score

PLAIN = ScoringConvention("independent", 0, "predict", "count")
TEXTS = ["abcdefghijklmnopqrstuvwxyz", "", "hi", "0123456789012", "x" * 11, "é"]
LENGTH, END = 12, 256


@pytest.fixture
def wrapped(data_config, tmp_path):
    """`wrapped(layout)` -> rows of 12 bytes of a few short documents."""
    (tmp_path / "a.txt").write_text("".join(text + "\n" for text in TEXTS), encoding="utf-8")

    def rows(layout="wrap"):
        data = data_config(source="text", path=str(tmp_path / "a.txt"), seq_len=LENGTH, packing=layout)
        return prepare(data, "all", 4, prepare_tokenizer(data))

    return rows


def documents():
    return [[*text.encode(), END] for text in TEXTS if text]


def slow_windows(texts, stride):
    """[(tokens, scored tokens)] of every window: each is the last LENGTH tokens before the next unscored stride."""
    found = []
    for text in texts:
        done = 0
        while done < len(text):
            start = max(0, done + stride - LENGTH) if done else 0
            window = text[start:start + LENGTH]
            found.append((window, window[done - start:]))
            done = start + len(window)
    return found


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("stride", [4, 5, 8, 12])
def test_windows_match_a_slow_loop(wrapped, within, stride):
    texts = documents() if within else [sum(documents(), [])]
    windows = Windows(wrapped(), stride, within, END)
    ids = np.arange(len(windows))
    tokens, scored, segments = windows.tokens(ids), windows.scored(ids), windows.segments(ids)
    found = [(row[segment > 0].tolist(), row[here].tolist()) for row, here, segment in zip(tokens, scored, segments)]
    assert found == slow_windows(texts, stride)
    assert (tokens[segments == 0] == END).all() and tokens.dtype == segments.dtype == np.int32
    assert windows.meta["rows"] == len(windows)


@pytest.mark.parametrize("within", [True, False])
def test_every_token_of_every_document_is_scored_once(wrapped, within):
    windows = Windows(wrapped(), 4, within, END)
    ids = np.arange(len(windows))
    scored, documents_RxL = windows.scored(ids), windows.documents(ids)
    assert np.bincount(documents_RxL[scored]).tolist() == [len(document) for document in documents()]
    assert (documents_RxL[windows.segments(ids) == 0] == -1).all()
    positions = windows.positions(ids)
    assert (positions[windows.segments(ids) > 0] == np.nonzero(windows.segments(ids))[1]).all()


def test_rows_in_any_order(wrapped):
    windows = Windows(wrapped(), 4, True, END)
    ids = np.array([3, 0, 3])
    for name in ("tokens", "segments", "positions", "documents", "scored"):
        method = getattr(windows, name)
        assert np.array_equal(method(ids), method(np.arange(len(windows)))[ids])


@pytest.mark.parametrize("layout", ["wrap", "pack", "pad"])
def test_first_and_end_tokens_are_given(wrapped, layout):
    rows = wrapped(layout)
    ids = np.arange(len(rows))
    segments, tokens = rows.segments(ids), rows.tokens(ids)
    before = np.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    opens = (segments > 0) & (segments != before)
    first, end = (ConditionedRows(rows, first=f, end=not f, end_id=END).scored(ids) for f in (True, False))
    assert np.array_equal(first, (segments > 0) & ~opens)
    assert np.array_equal(end, (segments > 0) & (tokens != END))
    assert rows.scored(ids).sum() == rows.meta["tokens"]


def test_ends_that_are_given_count_no_bytes(wrapped):
    rows = ConditionedRows(RowsWithBytes(wrapped(), ByteTokenizer()), first=False, end=True, end_id=END)
    ids = np.arange(len(rows))
    assert rows.sizes(ids)[rows.scored(ids)].sum() == sum(len(text.encode()) for text in TEXTS if text)


def test_arrange(wrapped):
    rows = wrapped()
    options = {"within_documents": True, "block_size": 2, "end_id": END}
    assert rows_to_score(rows, PLAIN, **options) is rows
    sliding = rows_to_score(rows, ScoringConvention("sliding", 0, "skip", "count"), **options)
    ids = np.arange(len(sliding))
    inner = Windows(rows, 6, True, END)
    assert np.array_equal(sliding.scored(ids), inner.scored(ids) & (inner.positions(ids) > 0))


def test_a_stride_is_a_number_of_blocks():
    sliding = ScoringConvention("sliding", 0, "predict", "count")
    assert sliding.stride_for(128, 4) == 64 and PLAIN.stride_for(128, 4) == 128
    with pytest.raises(UserError, match="stride of 64 .* 128 tokens in blocks of 128.*--context_mode=independent"):
        sliding.stride_for(128, 128)
    for stride in (6, 132):
        with pytest.raises(UserError, match=f"stride of {stride} .* multiple of 4 up to 128, e.g. --stride=64"):
            dataclasses.replace(sliding, stride=stride).stride_for(128, 4)


@pytest.mark.parametrize("arguments, message", [
    (("slide", 0, "predict", "count"), "--context_mode=slide: did you mean 'sliding'"),
    (("independent", 0, "skip!", "count"), "--first_token=skip!: did you mean 'skip'"),
    (("independent", 0, "skip", "drop"), "--end_token=drop: known: count, skip"),
    (("independent", 4, "skip", "skip"), "--stride=4 has no effect with --context_mode=independent"),
    (("sliding", -1, "skip", "skip"), "--stride=-1: expected a number"),
])
def test_bad_conventions(arguments, message):
    with pytest.raises(UserError, match=message):
        ScoringConvention(*arguments)


def test_nothing_left_to_score(data_config, tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    data = data_config(source="text", path=str(tmp_path / "a.txt"), seq_len=2)
    rows = prepare(data, "all", 1, prepare_tokenizer(data))
    with pytest.raises(UserError, match="no token is left to score"):
        rows_to_score(rows, ScoringConvention("independent", 0, "skip", "skip"), within_documents=True, block_size=1,
                      end_id=END)
