"""Documents in rows by the functions of data/packing.py."""

from collections.abc import Sequence

import numpy as np

from bd3lm_jax.data import packing


def pack_rows(layout: str, documents: Sequence, length: int, block_size: int,
              end_id: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokens_RxL` (padding holds end_id) and `pieces_Px4` of documents given as id sequences without their end."""
    ended = [np.append(np.asarray(document, np.int32), np.int32(end_id)) for document in documents]
    placed = packing.place_documents(layout, np.array([len(ids) for ids in ended], np.int64), length, block_size)
    flat = np.concatenate(ended) if ended else np.zeros(0, np.int32)
    return packing.fill_rows(flat, placed, 0, placed.num_rows, length, end_id), placed.pieces_Px4
