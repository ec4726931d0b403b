"""Writing texts with a language model: batches of rows through the loop (`batch.py`), and samples of them."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.texts import decode_continuation
from bd3lm_jax.generation.batch import BatchLoop
from bd3lm_jax.generation.options import Options, check_options
from bd3lm_jax.generation.prompts import Rows, encode_prompts, prompt_rows
from bd3lm_jax.generation.sampling import STOPS

ROWS = 64  # rows a batch at most; fewer are padded to a power of two


class Sample(NamedTuple):
    """text and tokens are the new ones, without prompt, end token and stop string; stop: why it ended, "end" (end
    token), "length", "string" or "entropy". nfe: network calls."""

    text: str | None
    tokens: list[int]
    nfe: int
    stop: str


def generate(lm, prompts: Sequence | None, num: int, length: int, options: Options) -> list[Sample]:
    """`num` texts of each prompt, `length` tokens with the prompt; see `LM.generate`."""
    check_options(lm, options)
    prompts = encode_prompts(lm, prompts, num, length, options.window)
    rows = prompt_rows(lm, prompts, length, options)
    starts = [len(prompt) for prompt in prompts]
    tokens, stopped, nfe = fill_rows(lm, options, rows)
    return [postprocess(lm, options, row[begin:length], int(calls), STOPS[code], row[:begin])
            for row, begin, calls, code in zip(tokens, starts, nfe, stopped)]


def fill_rows(lm, options: Options, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill what is not given -> tokens `[B, L]`, stopped `[B]` (an index of STOPS), nfe `[B]`, in batches."""
    parts = [_write_batch(lm, options, Rows(*(x[first:first + ROWS] for x in rows)))
             for first in range(0, len(rows.tokens), ROWS)]
    tokens, stopped, nfe = (np.concatenate(part) for part in zip(*parts))
    return tokens, stopped, nfe * (2 if options.guidance else 1)


def _write_batch(lm, options: Options, rows: Rows):
    count = len(rows.tokens)
    padding = (1 << (count - 1).bit_length()) - count
    rows = Rows(*(np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in rows))  # spare rows want 0 tokens
    if lm.is_bidirectional and rows.tokens.shape[1] > lm.config.block_size:
        if options.constraint is not None:
            raise UserError(f"a constraint works within {lm.config.block_size} tokens, all that this model sees")
        result = _sliding_window(lm, options, rows)
    else:
        result = _write_rows(lm, options, rows, 0)
    return tuple(x[:count] for x in result)


def _write_rows(lm, options: Options, rows: Rows, window_index: int):
    loop = BatchLoop(lm, options, rows, window_index)
    (last,) = deque(loop.write(), maxlen=1)
    return loop.result(last.progress)


def _sliding_window(lm, options: Options, rows: Rows):
    """A bidirectional model beyond its length: the canvas moves by half, given what was written in the other half."""
    size, stride = lm.config.block_size, lm.config.block_size // 2
    padding = ((0, 0), (0, size))  # so that the last canvas is whole
    given = np.pad(rows.given, padding)
    tokens = np.where(given, np.pad(rows.tokens, padding), lm.special.mask)
    stopped, nfe = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
    for window_index, at in enumerate(range(0, max(int(rows.length.max()) - stride, 1), stride)):
        canvas = np.s_[:, at:at + size]
        length = np.where(stopped > 0, 0, np.maximum(rows.length - at, 0)).astype(np.int32)
        is_writing = (~given[canvas] & (np.arange(size) < length[:, None])).any(1)
        part = Rows(tokens[canvas], given[canvas], length * is_writing, rows.earliest_end - at, rows.number)
        written, part_stopped, part_nfe = _write_rows(lm, options, part, window_index)
        tokens[canvas] = np.where(is_writing[:, None], written, tokens[canvas])
        given[canvas] |= is_writing[:, None]
        stopped, nfe = np.where(is_writing, part_stopped, stopped), nfe + part_nfe
    return tokens[:, :-size], stopped, nfe


def postprocess(lm, options: Options, new, nfe: int, stop: str, before=()) -> Sample:
    """The sample of the new tokens `[n]` behind the tokens `before`: cut at an end token or stop string, and where
    nothing was written."""
    new = np.asarray(new)
    stop = "length" if stop == "end" else stop  # an end token behind the last wanted place ends nothing
    ends = np.flatnonzero((new == lm.special.end) | (new == lm.special.mask))
    if len(ends):
        stop = "end" if new[ends[0]] == lm.special.end else stop
        new = new[:ends[0]]
    if lm.tokenizer is None:
        return Sample(None, new.tolist(), nfe, stop)
    text = decode_continuation(lm.tokenizer, before, new)
    places = [text.index(string) for string in options.stop if string in text]
    if places:
        text, stop = text[:min(places)], "string"
        while len(decode_continuation(lm.tokenizer, before, new)) > len(text):
            new = new[:-1]
    return Sample(text, new.tolist(), nfe, stop)
