"""Watching a language model write: what every step reveals, what is final, and what may still be revised.

The events are those of `BatchLoop.write`, which writes the same tokens for `LM.generate` with the same options.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.texts import decode_continuation, num_stable_tokens
from bd3lm_jax.generation import generation
from bd3lm_jax.generation.batch import BatchLoop
from bd3lm_jax.generation.generation import Sample
from bd3lm_jax.generation.options import Options, check_options
from bd3lm_jax.generation.prompts import Rows, encode_prompts, prompt_rows
from bd3lm_jax.generation.sampling import STOPS, auto_size, simplex

MASK_SIGN, END_SIGN = "░", "∎"


class Event(NamedTuple):
    """What one step did to one text.

    number: of the request. block, step: the step-th since this block was opened, from 1; step 0 comes once, before
    anything is written. start: place in the row of the canvas's first token. canvas: ids of the block after the step
    (step 0: of the whole row), the mask id where nothing is written. revealed: places in the row that became tokens;
    confidence: probability of each when it was drawn, before temperature and filters. remasked: places that became
    masks again. nfe: network calls so far. text: what is final; tentative: what stands behind it now, up to the end of
    the block, a sign for each mask (both None without tokenizer). sample: the result, in the last event of the request.
    """

    number: int
    block: int
    step: int
    start: int
    canvas: list[int]
    revealed: list[int]
    confidence: list[float]
    remasked: list[int]
    nfe: int
    text: str | None
    tentative: str | None
    sample: Sample | None


class Committed(NamedTuple):
    """Text that never changes; joined, these pieces are the text of the sample."""

    text: str


class Revision(NamedTuple):
    """What stands behind the committed text now, in place of the revision before."""

    text: str


def stream(lm, prompts: Sequence | None, num: int, length: int, options: Options) -> Iterator[Event]:
    """The texts of `LM.generate` for the same arguments, step by step, at most `generation.ROWS` at a time.

    A stop string ends a text as soon as it stands in finished blocks, so that nfe may be less than in `generate`.
    Raises UserError, before the first event, as `generate` does, for more texts, and for a bidirectional model beyond
    its length.
    """
    check_options(lm, options)
    for check in (simplex.check_watched, auto_size.check_watched):
        check(lm, options)
    prompts = encode_prompts(lm, prompts, num, length, options.window)
    if len(prompts) > generation.ROWS:
        raise UserError(f"{len(prompts)} texts are asked for, expected at most {generation.ROWS} to watch at a time")
    if length > lm.context and lm.is_bidirectional:
        raise UserError(f"length is {length}: a bidirectional model is watched up to {lm.context} tokens, what it was "
                        "trained on; generate writes longer texts")
    rows = prompt_rows(lm, prompts, length, options)
    return steps(lm, options, rows, [len(prompt) for prompt in prompts])


def watch(lm, prompt, length: int, options: Options) -> Iterator[Committed | Revision]:
    """One text as pieces: what stands there is all `Committed` ones and the latest `Revision`. Errors as `stream`."""
    if lm.tokenizer is None:
        raise UserError("this checkpoint has no tokenizer, so there is no text to stream: see stream.stream for ids")
    return pieces(stream(lm, None if prompt is None else [prompt], 1, length, options))


def pieces(events: Iterable[Event]) -> Iterator[Committed | Revision]:
    """The events of one text as pieces."""
    committed = tentative = ""
    for event in events:
        if event.text and len(event.text) > len(committed):
            yield Committed(event.text[len(committed):])
            committed = event.text
        if event.tentative is not None and event.tentative != tentative:
            tentative = event.tentative
            yield Revision(tentative)


def piece(lm, token: int) -> str:
    """How one id is shown by itself, as it stands behind other text."""
    if token == lm.special.mask:
        return MASK_SIGN
    if token == lm.special.end:
        return END_SIGN
    return f"{token} " if lm.tokenizer is None else decode_continuation(lm.tokenizer, [token], [token])


def steps(lm, options: Options, rows: Rows, starts: Sequence[int]) -> Iterator[Event]:
    """Events of one batch of rows; starts: where the text of each row begins, in tokens.

    A step brings an event for each row that it changed, and the last step of a block one for every row of it.
    """
    loop = BatchLoop(lm, options, rows, starts=starts)
    tokens, stopped = np.asarray(loop.progress.tokens), np.zeros(len(rows.tokens), np.int32)
    trackers = [_RowTracker(loop, i) for i in range(len(rows.tokens))]
    for tracker in trackers:
        yield tracker.first(loop.first_block, tokens)
    view = _BlockView.of(loop, loop.first_block, tokens, stopped)
    for written in loop.write(watched=True):
        after = _BlockSnapshot(*jax.device_get((written.block.canvas, written.block.masked, written.block.confidence,
                                                written.block.nfe)))
        view = view._replace(step=view.step + 1, after=after, is_done=written.progress is not None)
        if view.is_done:
            tokens, stopped = np.asarray(written.progress.tokens), np.asarray(written.progress.stopped)
        for i in view.rows:
            event = trackers[i].event(view, tokens, stopped[i])
            if event.revealed or event.remasked or view.is_done:
                yield event
        view = view._replace(before=after)
        if view.is_done:
            view = _BlockView.of(loop, view.block + 1, tokens, stopped)


def _without_lead(event: Event, lead: int) -> Event:
    """An event with places counted from the `lead`-th on, where the text begins."""
    start = max(event.start - lead, 0)
    return event._replace(start=start, canvas=event.canvas[start + lead - event.start:],
                          revealed=[place - lead for place in event.revealed],
                          remasked=[place - lead for place in event.remasked])


class _BlockSnapshot(NamedTuple):
    """A block on the host, `[B, S]`; nfe `[B]`."""

    canvas: np.ndarray
    masked: np.ndarray
    confidence: np.ndarray
    nfe: np.ndarray


class _BlockView(NamedTuple):
    """A block while it is watched. rows: those that write in it. to_fill `[B, S]`: places that are not given. step: the
    step-th, between the snapshots before and after. is_done: all rows have finished the block."""

    block: int
    rows: np.ndarray
    to_fill: np.ndarray
    before: _BlockSnapshot
    after: _BlockSnapshot
    step: int = 0
    is_done: bool = False

    @classmethod
    def of(cls, loop: BatchLoop, block: int, tokens_BxL, stopped_B) -> "_BlockView":
        """The block before its first step."""
        start, end = block * loop.block_size, (block + 1) * loop.block_size
        writing = (stopped_B == 0) & (start < loop.rows.length)
        to_fill = ~loop.rows.given[:, start:end] & writing[:, None]
        visible_rows = np.flatnonzero(writing & (end > loop.starts))  # also where all is forced
        now = _BlockSnapshot(tokens_BxL[:, start:end], to_fill, np.ones(to_fill.shape),
                             np.zeros(len(to_fill), np.int32))
        return cls(block, visible_rows, to_fill, now, now)


class _RowTracker:
    """One row of a batch, as events tell it."""

    def __init__(self, loop: BatchLoop, row: int):
        self._lm, self._options, self._row, self._size = loop.lm, loop.options, row, loop.block_size
        self._begin, self._lead = int(loop.starts[row]), int(loop.lead_B[row])
        self._number, self._length = int(loop.rows.number[row]), int(loop.rows.length[row])
        self._calls = 2 if loop.options.guidance else 1

    def first(self, block: int, tokens_BxL) -> Event:
        canvas, end = tokens_BxL[self._row, :self._length], (block + 1) * self._size
        return _without_lead(Event(self._number, block, 0, 0, canvas.tolist(), [], [], [], 0,
                                   *self._texts(canvas[:end], 0), None), self._lead)

    def event(self, view: _BlockView, tokens_BxL, stopped: int) -> Event:
        """tokens: with all finished blocks, this one as well if it is done."""
        i, size, before, after = self._row, self._size, view.before, view.after
        start = view.block * size
        end = min(start + size, self._length)
        inside = view.to_fill[i] & (start + np.arange(size) < end)
        drawn = before.masked[i] | (after.canvas[i] != before.canvas[i]) | (after.confidence[i] != before.confidence[i])
        revealed = np.flatnonzero(inside & drawn & ~after.masked[i])
        remasked = np.flatnonzero(inside & after.masked[i] & ~before.masked[i])
        row, nfe = tokens_BxL[i].copy(), int(after.nfe[i]) * self._calls
        row[start:start + size] = after.canvas[i]
        sample, texts = None, self._texts(row[:end], (end if view.is_done else start) - self._begin)
        if view.is_done and (stopped or end == self._length):
            sample = generation.postprocess(self._lm, self._options, row[self._begin:self._length], nfe, STOPS[stopped],
                                            row[:self._begin])
            texts = sample.text, None if sample.text is None else ""
        return _without_lead(Event(self._number, view.block, view.step, start, row[start:end].tolist(),
                                   (start + revealed).tolist(), after.confidence[i][revealed].tolist(),
                                   (start + remasked).tolist(), nfe, *texts, sample), self._lead)

    def _texts(self, row, final: int) -> tuple[str | None, str | None]:
        """Text of the first `final` new tokens of a row as far as it cannot change, and what follows it up to an end
        token."""
        lm = self._lm
        if lm.tokenizer is None:
            return None, None
        before, new = row[:self._begin], row[self._begin:]
        final = num_stable_tokens(lm.tokenizer, new[:max(final, 0)])
        text = _stable_text(decode_continuation(lm.tokenizer, before, new[:final]), self._options.stop)
        ends = np.flatnonzero(new == lm.special.end)
        new = new[:ends[0]] if len(ends) else new
        whole, before = "", before[before != lm.special.mask]
        for run in np.split(new, np.flatnonzero(np.diff(new == lm.special.mask)) + 1):
            if len(run) and run[0] == lm.special.mask:
                whole += MASK_SIGN * len(run)
            else:
                whole += decode_continuation(lm.tokenizer, before, run)
                before = np.concatenate([before, run])
        return text, whole[len(text):]


def _stable_text(text: str, stop: Sequence[str]) -> str:
    """Without an unfinished character at the end, and without what may become a stop string."""
    text = text.rstrip("\ufffd")
    num_held = max((n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])), default=0)
    return text[:len(text) - num_held]
