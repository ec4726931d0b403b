"""Which tokens an evaluation scores, and what they see: the conventions by which published perplexities differ.

A token that is not scored is given: it is never masked and never counted, but the tokens after it see it.
"""

import dataclasses
import functools
from typing import cast

import numpy as np

from bd3lm_jax.core.errors import UserError, nearest
from bd3lm_jax.data import packing
from bd3lm_jax.data.rows import MeasuredRows, TokenRows

CONTEXT_MODES, FIRST_TOKENS, END_TOKENS = ("independent", "sliding"), ("predict", "skip"), ("count", "skip")


@dataclasses.dataclass(frozen=True)
class ScoringConvention:
    """How a text is cut and which of its tokens count.

    context_mode: "independent": every row is scored by itself. "sliding": rows start every `stride` tokens and only
    their last `stride` tokens are scored, given the others (the first row of a text is scored whole); the text is one
    document, or with the layout "wrap", as in training, all documents one after another.
    first_token: "skip" gives the token that opens a row or a document in it, before which there is nothing to see.
    end_token: "skip" gives the end of every document.
    Bits per byte are over the bytes of the tokens that are scored: a token that is given counts no byte either.

    Raises:
        UserError: an unknown word, or a stride that does not go with the context.
    """

    context_mode: str
    stride: int  # sliding: tokens; 0 for half a row
    first_token: str
    end_token: str

    def __post_init__(self):
        for name, choices in (("context_mode", CONTEXT_MODES), ("first_token", FIRST_TOKENS),
                              ("end_token", END_TOKENS)):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"--{name}={value}: {nearest(str(value), choices)}")
        if self.stride < 0:
            raise UserError(f"--stride={self.stride}: expected a number of tokens, or 0 for half a row")
        if self.stride and self.context_mode != "sliding":
            raise UserError(f"--stride={self.stride} has no effect with --context_mode={self.context_mode}: add "
                            "--context_mode=sliding")

    def stride_for(self, length: int, block_size: int) -> int:
        """Tokens between the starts of rows of `length` tokens. UserError unless it is a multiple of the block size."""
        if self.context_mode == "independent":
            return length
        stride = self.stride or length // 2
        if not 1 <= stride <= length or stride % block_size:
            blocks = length // 2 // block_size
            advice = (f"expected a multiple of {block_size} up to {length}, e.g. --stride={blocks * block_size}"
                      if blocks else "use --context_mode=independent")
            raise UserError(f"a stride of {stride} tokens does not go with rows of {length} tokens in blocks of "
                            f"{block_size}, which are scored whole: {advice}")
        return stride


class Windows:
    """Rows of `length` tokens that start every `stride` tokens of a text, each token scored once; like `Rows`.

    within_documents: every document is a text of its own, else all of them are one.
    """

    def __init__(self, wrapped_rows: TokenRows, stride: int, within_documents: bool, end_id: int):
        """wrapped: the same documents in the layout "wrap"."""
        self.length, self._end_id = wrapped_rows.length, end_id
        ids = np.arange(len(wrapped_rows))
        documents = wrapped_rows.documents(ids).reshape(-1)
        self._documents_N = documents[documents >= 0]
        self._tokens_N = wrapped_rows.tokens(ids).reshape(-1)[documents >= 0]
        size = np.bincount(self._documents_N) if within_documents else np.array([len(self._tokens_N)])
        count = 1 + np.maximum(0, -(-(size - self.length) // stride))  # rows of each text
        index = packing.expand_ranges(np.zeros_like(count), count)  # of a row in its text
        ends = np.cumsum(size)
        self._wrapped, self._start_R = wrapped_rows, np.repeat(ends - size, count) + index * stride
        self._end_R = np.minimum(self._start_R + self.length, np.repeat(ends, count))
        self._context_R = np.where(index > 0, self.length - stride, 0)
        identity = f"{wrapped_rows.meta['hash']}-{stride}-{'documents' if within_documents else 'stream'}"
        self.meta = {**wrapped_rows.meta, "rows": len(index), "hash": identity}

    def __len__(self) -> int:
        return len(self._start_R)

    def tokens(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]; padding holds the end token."""
        return self._read(self._tokens_N, row_ids, self._end_id)

    def segments(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: 1, and 0 in padding."""
        return self._inside(row_ids).astype(np.int32)

    def positions(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: from 0 in each row; 0 in padding."""
        return np.where(self._inside(row_ids), np.arange(self.length), 0).astype(np.int32)

    def documents(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: index of the document in the split; -1 = padding."""
        return self._read(self._documents_N, row_ids, -1)

    def scored(self, row_ids: np.ndarray) -> np.ndarray:
        """bool [n, L]: tokens that count."""
        return self._inside(row_ids) & (np.arange(self.length) >= self._context_R[row_ids][:, None])

    def sizes(self, row_ids: np.ndarray) -> np.ndarray:
        """float64 [n, L]: bytes of text, where `wrapped_rows` is `sized.RowsWithBytes`; 0 in padding."""
        index = np.minimum(self._index(row_ids), len(self._tokens_N) - 1)
        return np.where(self._inside(row_ids), self._sizes_N[index], 0)

    @functools.cached_property
    def _sizes_N(self) -> np.ndarray:
        ids = np.arange(len(self._wrapped))
        return cast(MeasuredRows, self._wrapped).sizes(ids)[self._wrapped.documents(ids) >= 0]

    def _index(self, row_ids):
        return self._start_R[row_ids][:, None] + np.arange(self.length)

    def _inside(self, row_ids):
        return self._index(row_ids) < self._end_R[row_ids][:, None]

    def _read(self, source_N, row_ids, padding: int):
        index = np.minimum(self._index(row_ids), len(source_N) - 1)
        return np.where(self._inside(row_ids), source_N[index], padding).astype(np.int32)


class ConditionedRows:
    """Rows or windows of which first or end tokens are given; like `Rows`."""

    def __init__(self, rows: TokenRows, *, first: bool, end: bool, end_id: int):
        self._rows, self._first, self._end, self._end_id = rows, first, end, end_id
        self.length, self.meta = rows.length, rows.meta
        self.tokens, self.segments, self.positions = rows.tokens, rows.segments, rows.positions
        self.documents = rows.documents

    def __len__(self) -> int:
        return len(self._rows)

    def scored(self, row_ids: np.ndarray) -> np.ndarray:
        """bool [n, L]: tokens that count."""
        scored = self._rows.scored(row_ids)
        if self._first:
            scored &= self.positions(row_ids) > 0
        if self._end:
            scored &= self.tokens(row_ids) != self._end_id
        return scored

    def sizes(self, row_ids: np.ndarray) -> np.ndarray:
        """float64 [n, L]: bytes of text, where the rows are `sized.RowsWithBytes`; 0 in padding."""
        return cast(MeasuredRows, self._rows).sizes(row_ids)


def rows_to_score(rows: TokenRows, convention: ScoringConvention, *, within_documents: bool, block_size: int,
                  end_id: int) -> TokenRows:
    """The rows that an evaluation by `convention` scores; for sliding windows `rows` has the layout "wrap".

    Raises UserError for a stride that is no multiple of the block size, and if no token is left to score.
    """
    stride = convention.stride_for(rows.length, block_size)
    if convention.context_mode == "sliding":
        rows = Windows(rows, stride, within_documents, end_id)
    first, end = convention.first_token == "skip", convention.end_token == "skip"
    if not (first or end):
        return rows
    rows = ConditionedRows(rows, first=first, end=end, end_id=end_id)
    if not any(rows.scored(np.arange(i, i + 1)).any() for i in range(len(rows))):
        raise UserError(f"no token is left to score: {rows.meta['documents']} documents of one token, which "
                        "--first_token=skip or --end_token=skip leaves out")
    return rows
