"""Documents to rows of `length` tokens. A layout is decided by the lengths of the documents alone.

Every document ends with the end token and nothing is dropped. A piece is the part of one document that lies in one
row; `pieces_Px4` has the columns row, start, length, document, sorted by row and start.

    wrap  documents follow each other without a gap and are cut at the row's end (the paper's way); a row is one segment
    pack  whole documents, each padded to a multiple of the block size, in the first open row with room
    pad   one piece a row

With pack and pad a document longer than a row is cut in row-sized pieces; every piece is its own segment.
"""

from typing import NamedTuple

import numpy as np

from bd3lm_jax.core.errors import UserError

ROW, START, LENGTH, DOCUMENT = range(4)
OPEN_ROWS = 1024  # how far back `pack` looks for room: bounds its time


class Layout(NamedTuple):
    pieces_Px4: np.ndarray  # int32
    source_P: np.ndarray  # int64: where each piece starts in the concatenated documents
    num_rows: int


def place_documents(layout: str, lengths_D: np.ndarray, length: int, block_size: int) -> Layout:
    """Place documents of `lengths_D` tokens (end included) in rows. Only "pack" reads the block size."""
    if layout == "pack" and length % block_size:
        raise UserError(f"block size {block_size} does not divide data.seq_len={length}: choose a length that is a "
                        f"multiple, e.g. {-(-length // block_size) * block_size}")
    lengths_D = lengths_D.astype(np.int64)
    if layout == "wrap":
        source, document = _wrap_cuts(lengths_D, length)
    else:
        source, document = _document_cuts(lengths_D, length)
    size = np.diff(source, append=lengths_D.sum())
    if layout == "wrap":
        row, start = source // length, source % length
    elif layout == "pack":
        row, start = _first_fit(-(-size // block_size) * block_size, length)
    else:
        row, start = np.arange(len(size)), np.zeros_like(size)
    order = np.lexsort((start, row))
    pieces = np.stack([row, start, size, document], axis=1)[order].astype(np.int32)
    return Layout(pieces, source[order], int(row.max(initial=-1)) + 1)


def fill_rows(flat: np.ndarray, layout: Layout, first: int, last: int, length: int, end_id: int) -> np.ndarray:
    """Rows first..last-1 of the concatenated documents `flat`: `[last - first, length]` of flat's dtype."""
    tokens = np.full((last - first) * length, end_id, flat.dtype)
    chosen = slice(*np.searchsorted(layout.pieces_Px4[:, ROW], (first, last)))
    pieces, source = layout.pieces_Px4[chosen], layout.source_P[chosen]
    target = (pieces[:, ROW] - first).astype(np.int64) * length + pieces[:, START]
    tokens[expand_ranges(target, pieces[:, LENGTH])] = flat[expand_ranges(source, pieces[:, LENGTH])]
    return tokens.reshape(-1, length)


def expand_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers start..start+length-1 of every pair, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _wrap_cuts(lengths_D: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces start in the concatenated documents (at documents and at rows), and the document of each."""
    ends = np.cumsum(lengths_D)
    total = ends[-1] if len(ends) else 0
    source = np.union1d(ends - lengths_D, np.arange(0, total, length))
    return source, np.searchsorted(ends, source, side="right")


def _document_cuts(lengths_D: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_wrap_cuts`, but rows are counted from the start of each document."""
    count = -(-lengths_D // length)
    document = np.repeat(np.arange(len(lengths_D)), count)
    index = expand_ranges(np.zeros_like(count), count)
    return (np.cumsum(lengths_D) - lengths_D)[document] + index * length, document


def _first_fit(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and start of each piece: the first of the last OPEN_ROWS rows with room, else a new row."""
    row, start = np.zeros_like(sizes), np.zeros_like(sizes)
    used = np.zeros(len(sizes), np.int64)
    rows = 0
    for index, size in enumerate(sizes):
        oldest = max(0, rows - OPEN_ROWS)
        fits = used[oldest:rows] <= length - size
        place = oldest + int(fits.argmax()) if fits.any() else rows
        rows = max(rows, place + 1)
        row[index], start[index] = place, used[place]
        used[place] += size
    return row, start
