"""Watching a language model write: what every step reveals, what is final, and what may still be revised.

The host drives the pieces of the sampling loop one step at a time: the tokens are those of `LM.generate` with the same
options.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.texts import decode_continuation, num_stable_tokens
from bd3lm_jax.generation import generation
from bd3lm_jax.generation.generation import Sample
from bd3lm_jax.generation.options import Options, check_options
from bd3lm_jax.generation.prompts import Rows, align_to_windows, encode_prompts, prompt_rows
from bd3lm_jax.generation.sampling import SAMPLERS, STOPS, simplex
from bd3lm_jax.generation.sampling.auto_size import AUTO
from bd3lm_jax.generation.sampling.generate import close_block, open_block, reveal, writing

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
    if options.sampler == simplex.NAME:
        raise UserError("a text of simplex diffusion is not watched step by step, every step draws all of a block: use "
                        "generate, or sample without --animate and --trace")
    if options.block_size == AUTO:
        raise UserError(f"block_size='{AUTO}' is not watched, every row has blocks of its own: name a block size, or "
                        "use generate, or sample without --animate and --trace")
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
        if len(event.text) > len(committed):
            yield Committed(event.text[len(committed):])
            committed = event.text
        if event.tentative != tentative:
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
    """Events of one batch of rows; begins: where the text of each row starts, in tokens.

    A step brings an event for each row that it changed, and the last step of a block one for every row of it.
    """
    rows, lead_B = align_to_windows(rows, options)
    starts = np.asarray(starts) + lead_B
    job = generation.begin(lm, options, rows, 0)
    size, progress, block = job.plan.settings.block_size, job.progress, job.first_block
    programs = _programs(lm, job, options)
    tokens, stopped = np.asarray(progress.tokens), np.zeros(len(rows.tokens), np.int32)
    trackers = [_RowTracker(lm, options, rows, i, begin, size) for i, begin in enumerate(starts)]
    for tracker, lead in zip(trackers, lead_B):
        yield _without_lead(tracker.first(block, tokens), int(lead))
    while (writing := (stopped == 0) & (block * size < rows.length)).any():
        columns = np.s_[:, block * size:(block + 1) * size]
        to_fill = ~rows.given[columns] & writing[:, None]
        visible_rows = np.flatnonzero(writing & ((block + 1) * size > np.asarray(starts)))  # also where all is forced
        before = _BlockSnapshot(tokens[columns], to_fill, np.ones(to_fill.shape), None)
        for step, (current, cache) in enumerate(_calls(job, programs, progress), 1):
            after = _BlockSnapshot(*jax.device_get((current.canvas, current.masked, current.confidence, current.nfe)))
            is_done = not _is_unfinished(job, current)
            if is_done:
                progress = programs.close(progress, current, cache)
                tokens = np.asarray(progress.tokens)
                progress, stopped = _stop_at_strings(lm, options, rows, starts, progress, (block + 1) * size)
            for i in visible_rows:
                event = trackers[i].event(block, step, before, after, is_done, to_fill, tokens, stopped[i])
                if event.revealed or event.remasked or is_done:
                    yield _without_lead(event, int(lead_B[i]))
            before = after
        block += 1


def _calls(job: generation.BatchLoop, programs: "_CompiledSteps", progress):
    """The next block after each of its steps, with the cache."""
    block, cache = programs.open(progress)
    yield block, cache
    while _is_unfinished(job, block):
        block = programs.reveal(progress, block, cache)
        yield block, cache


def _is_unfinished(job: generation.BatchLoop, block) -> bool:
    return bool(writing(SAMPLERS[job.plan.sampler], job.plan.settings, block).any())


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
    nfe: np.ndarray | None


class _RowTracker:
    """One row of a batch, as events tell it."""

    def __init__(self, lm, options: Options, rows: Rows, row: int, begin: int, size: int):
        self._lm, self._options, self._row, self._begin, self._size = lm, options, row, begin, size
        self._number, self._length = int(rows.number[row]), int(rows.length[row])
        self._calls = 2 if options.guidance else 1

    def first(self, block: int, tokens_BxL) -> Event:
        canvas, end = tokens_BxL[self._row, :self._length], (block + 1) * self._size
        return Event(self._number, block, 0, 0, canvas.tolist(), [], [], [], 0,
                     *self._texts(canvas[:end], 0), None)

    def event(self, block: int, step: int, before: _BlockSnapshot, after: _BlockSnapshot, is_done: bool, to_fill,
              tokens_BxL,
              stopped: int) -> Event:
        """over: all rows have finished the block. tokens: with all finished blocks, this one as well if it is over."""
        i, size = self._row, self._size
        start = block * size
        end = min(start + size, self._length)
        inside = to_fill[i] & (start + np.arange(size) < end)
        drawn = before.masked[i] | (after.canvas[i] != before.canvas[i]) | (after.confidence[i] != before.confidence[i])
        revealed = np.flatnonzero(inside & drawn & ~after.masked[i])
        remasked = np.flatnonzero(inside & after.masked[i] & ~before.masked[i])
        row, nfe = tokens_BxL[i].copy(), int(after.nfe[i]) * self._calls
        row[start:start + size] = after.canvas[i]
        sample, texts = None, self._texts(row[:end], (end if is_done else start) - self._begin)
        if is_done and (stopped or end == self._length):
            sample = generation.postprocess(self._lm, self._options, row[self._begin:self._length], nfe, STOPS[stopped],
                                            row[:self._begin])
            texts = sample.text, None if sample.text is None else ""
        return Event(self._number, block, step, start, row[start:end].tolist(),
                     (start + revealed).tolist(), after.confidence[i][revealed].tolist(), (start + remasked).tolist(),
                     nfe, *texts, sample)

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


def _stop_at_strings(lm, options: Options, rows: Rows, starts, progress, end: int):
    """Rows with a stop string before place `end` write no more -> progress, why each row has stopped `[B]`."""
    tokens, stopped = np.asarray(progress.tokens), np.array(progress.stopped)
    if not options.stop:
        return progress, stopped
    for i in np.flatnonzero((stopped == 0) & (rows.length > 0)):
        text = decode_continuation(lm.tokenizer, tokens[i, :starts[i]], tokens[i, starts[i]:max(end, starts[i])])
        if any(string in text for string in options.stop):
            stopped[i] = STOPS.index("end")
    return progress._replace(stopped=jnp.asarray(stopped)), stopped


class _CompiledSteps(NamedTuple):
    """`open_block`, `reveal` and `close_block` of one job, compiled."""

    open: functools.partial
    reveal: functools.partial
    close: functools.partial


def _programs(lm, job: generation.BatchLoop, options: Options) -> _CompiledSteps:
    jitted = lm.__dict__.setdefault("_stream_programs", {})  # jitted once, compiled once per plan and shapes
    if not jitted:
        for name, function in (("open", open_block), ("reveal", reveal), ("close", close_block)):
            jitted[name] = jax.jit(functools.partial(_call, lm, function), static_argnums=0)
    guidance = np.float32(options.guidance)
    return _CompiledSteps(*(functools.partial(program, job.plan, lm.params, job.request, guidance)
                            for program in jitted.values()))


def _call(lm, function, plan, params, request, guidance, *state):
    return function(generation.make_denoiser_context(lm, plan, params, request, guidance), request, *state)
