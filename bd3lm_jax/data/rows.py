"""What rows of tokens offer to those who read them: a prepared split, a mixture of some, or a view of one."""

from typing import Any, Protocol

import numpy as np


class TokenRows(Protocol):
    """`len()` rows of `length` tokens; ids of rows may be in any order and repeat. Arrays are [n, L]."""

    length: int
    meta: dict[str, Any]

    def __len__(self) -> int: ...
    def tokens(self, row_ids: np.ndarray) -> np.ndarray: ...
    def segments(self, row_ids: np.ndarray) -> np.ndarray: ...
    def positions(self, row_ids: np.ndarray) -> np.ndarray: ...
    def documents(self, row_ids: np.ndarray) -> np.ndarray: ...
    def scored(self, row_ids: np.ndarray) -> np.ndarray: ...


class MeasuredRows(TokenRows, Protocol):
    """Rows whose tokens know the bytes of text that they stand for."""

    def sizes(self, row_ids: np.ndarray) -> np.ndarray: ...
