"""What a density is made of: spans of characters, or a number for every token id; and which documents have one."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Span = tuple[int, int]  # first character, and the one behind the last


@dataclasses.dataclass(frozen=True)
class Context:
    """What a source may ask for. corpus: what identifies the training split; counts: tokens of the training split by
    id, int64 `[V]` (end tokens included), read when it is called."""

    corpus: Callable[[], str]
    counts: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Spans:
    """Tokens that touch a span of `find(text)` are dense, but for spaces before them; the end of a document never is.

    identity: JSON that changes whenever the spans of a text could. uncovered: called with the text and a span that
    touches no token, None to leave it. finished: called when the last document of a split has been read.
    """

    find: Callable[[str], Sequence[Span]]
    identity: Any
    on_unmatched: Callable[[str, Span], None] | None = None
    on_end: Callable[[], None] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """`values()`: a number in [0, 1] for every token id, float `[V]`, end token included."""

    values: Callable[[], np.ndarray]
    identity: Any


class Annotation:
    """The density of a corpus: a source on a fraction of the documents; the others are 0 everywhere.

    Which documents those are follows from their text alone, and the documents of a fraction are among those of every
    larger one.
    """

    def __init__(self, spec: str, fraction: float, source: Spans | Table):
        self.source, self.fraction = source, fraction
        self.identity = [spec, fraction, source.identity]
        self.needs_offsets = isinstance(source, Spans)
        self._values_V: np.ndarray | None = None

    def of(self, text: str, ids_N: np.ndarray, offsets_Nx2: np.ndarray | None, end_id: int) -> np.ndarray:
        """float32 [N + 1]: the tokens of a document and its end. offsets: of characters, if `needs_offsets`."""
        if hash_fraction(text) >= self.fraction:
            return np.zeros(len(ids_N) + 1, np.float32)
        if isinstance(self.source, Table):
            if self._values_V is None:
                self._values_V = np.asarray(self.source.values(), np.float32)
            return self._values_V[np.append(ids_N, end_id)]
        assert offsets_Nx2 is not None
        dense_N = dense_tokens(text, offsets_Nx2, self.source.find(text), self.source.on_unmatched)
        return np.append(dense_N, False).astype(np.float32)

    def on_end(self) -> None:
        """To be called when every document of a split has been read. UserError if the source fits none of them."""
        if isinstance(self.source, Spans) and self.source.on_end is not None:
            self.source.on_end()


def dense_tokens(text: str, offsets_Nx2: np.ndarray, spans: Sequence[Span],
                 on_unmatched: Callable[[str, Span], None] | None = None) -> np.ndarray:
    """bool [N]: tokens of which a character lies in a span; spaces in front of a token's first letter do not count."""
    start_N, end_N = offsets_Nx2[:, 0].copy(), offsets_Nx2[:, 1]
    for i, (start, end) in enumerate(offsets_Nx2.tolist()):
        stripped = text[start:end].lstrip()
        if stripped:
            start_N[i] = end - len(stripped)
    dense_N = np.zeros(len(start_N), bool)
    for start, end in spans:
        overlapping_N = (start_N < end) & (end_N > start)
        if on_unmatched is not None and not overlapping_N.any():
            on_unmatched(text, (start, end))
        dense_N |= overlapping_N
    return dense_N


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that looks uniform and depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48
