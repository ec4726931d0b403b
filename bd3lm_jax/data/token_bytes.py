"""How many bytes of text tokens stand for, and whether a tokenizer gives text back."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from bd3lm_jax.core.log import note
from bd3lm_jax.data.tokenizers import Tokenizer

CHUNK_TOKENS, CHUNK_DOCUMENTS = 1 << 20, 1024  # that are read at a time


class RowsWithBytes:
    """Rows whose tokens know the UTF-8 bytes of text that they stand for; else like `Rows`.

    The sizes of the tokens of a document add up to its bytes, of which the newline that its end token stands for is
    one. They are those of the decoded tokens, and exact, where the tokenizer gives text back; of another tokenizer they
    are in proportion.
    """

    def __init__(self, rows: Any, tokenizer: Tokenizer, document_bytes_D: np.ndarray | None = None):
        """rows: all tokens of a text, each once. document_bytes_D: with the newlines; without them only the bytes of
        the whole text, `rows.meta["bytes"]`, are held to."""
        self._rows, self.length, self.meta = rows, rows.length, rows.meta
        self.tokens, self.segments, self.positions = rows.tokens, rows.segments, rows.positions
        self.documents, self.scored = rows.documents, rows.scored
        self._first_V, self._later_V = _token_sizes(tokenizer)
        self._scale_D = np.ones(rows.meta["documents"])
        decoded_D, step = np.zeros(rows.meta["documents"]), max(1, CHUNK_TOKENS // rows.length)
        for first in range(0, len(rows), step):
            ids = np.arange(first, min(first + step, len(rows)))
            documents_BxL = rows.documents(ids)
            real = documents_BxL >= 0
            decoded_D += np.bincount(documents_BxL[real], self.sizes(ids)[real], len(decoded_D))
        if document_bytes_D is None:
            self._scale_D *= rows.meta["bytes"] / decoded_D.sum()
        else:
            self._scale_D = document_bytes_D / decoded_D

    def __len__(self) -> int:
        return len(self._rows)

    def stream(self) -> np.ndarray:
        """int32 [meta["tokens"]]: all tokens without padding, document after document."""
        return self._rows.stream()

    def sizes(self, row_ids: np.ndarray) -> np.ndarray:
        """float64 [n, L]: bytes of text; 0 in padding."""
        row_ids = np.asarray(row_ids)
        tokens_BxL, documents_BxL = self.tokens(row_ids), self.documents(row_ids)
        before_B = np.where(row_ids > 0, self.documents(np.maximum(row_ids - 1, 0))[:, -1], -1)
        begins_BxL = documents_BxL != np.concatenate([before_B[:, None], documents_BxL[:, :-1]], axis=1)
        sizes_BxL = np.where(begins_BxL, self._first_V[tokens_BxL], self._later_V[tokens_BxL])
        return np.where(documents_BxL >= 0, sizes_BxL * self._scale_D[documents_BxL], 0)


def _token_sizes(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of text of each id as the first token of a text and behind others, float64 [V] each; 1 for the end token
    and for ids that are no text."""
    sizes = np.ones((2, tokenizer.vocab_size))
    for i, (first, later) in enumerate(zip(*tokenizer.token_bytes())):
        if later and i != tokenizer.end_id:
            sizes[:, i] = len(first), len(later)
    return sizes[0], sizes[1]


def count_lossy_documents(documents: Iterable[str], tokenizer: Tokenizer) -> int:
    """How many documents do not come back from their tokens as they were."""
    changed, documents = 0, iter(documents)
    while chunk := list(itertools.islice(documents, CHUNK_DOCUMENTS)):
        changed += sum(tokenizer.decode(ids) != text for text, ids in zip(chunk, tokenizer.encode_batch(chunk)))
    return changed


def warn_if_lossy(changed: int, documents: int, name: str) -> None:
    """One line where `changed` of the documents of a text do not come back from their tokens."""
    if changed:
        note(f"warning: the tokenizer does not give back {changed} of {documents} documents of {name} as they were: "
             "these bits per byte do not compare with those of other tokenizers")
