"""Writing texts with a language model: options, prompts, batches of rows, stops; `sampling/` does the drawing."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax import automaton
from bd3lm_jax.denoise import BlockDenoiser, CausalDenoiser, Guided
from bd3lm_jax.errors import UserError, lookup, nearest
from bd3lm_jax.models.trunk import CACHE_DTYPES, unstacked
from bd3lm_jax.sampling import SAMPLERS, STOPS, Asked, Filters, Progress, Request, Settings, run_blocks, start
from bd3lm_jax.sampling.constraint import Constraint, best_block, sample_block
from bd3lm_jax.sampling.filters import check_filters

BUCKET = 64  # rows of tokens and prompts are padded to multiples of this, so that few lengths compile
ROWS = 64  # rows a batch at most; fewer are padded to a power of two
CHECK_EVERY = 32  # tokens between two looks for stop strings


@dataclasses.dataclass(frozen=True)
class Options:
    """How texts are written; each is a keyword of `LM.generate`.

    sampler: one of `sampling.SAMPLERS`. temperature, top_k, top_p, min_p, repetition_penalty: see
    `sampling/filters.py`. forbidden: ids never drawn. steps, threshold: of the sampler; None: its usual ones.
    block_size: what the model was trained with, or for a bidirectional model (MDLM) the stretch that is written at a
    time, left to right; None: all of it. stop: strings that end a text. min_length: new tokens before an end token.
    min_entropy: a text whose last 256 tokens have a lower unigram entropy (nats) is given up; the paper uses 4.
    window: texts may be longer than what the model was trained on (see `denoise.py`; MDLM slides by half its length).
    cache_dtype: of keys and values, "compute": the network's. guidance: weight of classifier-free guidance; 0: none.
    constraint: a regular expression, or a JSON schema as a dict, that every new text matches as a whole.
    """

    sampler: str = "first_hitting"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    forbidden: tuple[int, ...] = ()
    steps: int | None = None
    threshold: float | None = None
    block_size: int | None = None
    stop: tuple[str, ...] = ()
    min_length: int = 0
    min_entropy: float | None = None
    window: bool = False
    cache_dtype: str = "compute"
    guidance: float = 0.0
    constraint: Any = None
    seed: int = 0

    @property
    def filters(self) -> Filters:
        return Filters(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def make_options(**options) -> Options:
    """UserError for a name that is none."""
    known = [field.name for field in dataclasses.fields(Options)]
    for name in options:
        if name not in known:
            raise UserError(f"unknown option '{name}': {nearest(name, known)}")
    for name in ("stop", "forbidden"):  # lists from callers become hashable
        if name in options:
            value = options[name]
            options[name] = (value,) if isinstance(value, str) else tuple(value)
    return Options(**options)


class Sample(NamedTuple):
    """text and tokens are the new ones, without prompt, end token and stop string; stop: why it ended, "end" (end
    token), "length", "string" or "entropy". nfe: network calls."""

    text: str | None
    tokens: list[int]
    nfe: int
    stop: str


class Rows(NamedTuple):
    """Host arrays: tokens int32 and given bool `[B, L]`, L a multiple of the block size; length, earliest_end and
    number (of the request, which keys its noise) int32 `[B]`."""

    tokens: np.ndarray
    given: np.ndarray
    length: np.ndarray
    earliest_end: np.ndarray
    number: np.ndarray


def generate(lm, prompts: Sequence | None, num: int, length: int, options: Options) -> list[Sample]:
    """`num` texts of each prompt, `length` tokens with the prompt; see `LM.generate`."""
    check(lm, options)
    prompts = encode_prompts(lm, prompts, num, length, options.window)
    rows = prompt_rows(lm, prompts, length, options)
    starts = [len(prompt) for prompt in prompts]
    tokens, stopped, nfe = write(lm, options, rows)
    return [finish(lm, options, row[begin:length], int(calls), STOPS[code])
            for row, begin, calls, code in zip(tokens, starts, nfe, stopped)]


def check(lm, options: Options) -> None:
    """UserError for options out of range or that do not fit the model."""
    lookup(SAMPLERS, options.sampler, "sampler")
    check_filters(options.filters)
    if options.cache_dtype not in CACHE_DTYPES:
        lookup(dict.fromkeys(CACHE_DTYPES), options.cache_dtype, "cache_dtype")
    objective, size = lm.config.diffusion, lm.config.block_size
    if objective.causal and options.sampler != "first_hitting":
        raise UserError(f"sampler '{options.sampler}' is for masked diffusion: an autoregressive model uses "
                        "first_hitting")
    if options.steps is not None and options.steps < 1:
        raise UserError(f"steps is {options.steps}, expected at least 1")
    if options.threshold is not None and not options.threshold >= 0:
        raise UserError(f"threshold is {options.threshold}, expected at least 0")
    if options.min_length < 0:
        raise UserError(f"min_length is {options.min_length}, expected at least 0")
    if options.block_size not in (None, size) and not (_bidirectional(lm) and options.block_size > 0
                                                       and size % options.block_size == 0):
        expected = f"a divisor of {size}" if _bidirectional(lm) else f"{size}, the one it was trained with"
        raise UserError(f"block_size is {options.block_size}, expected {expected}")
    if SAMPLERS[options.sampler].rewrites and options.block_size not in (None, size):
        raise UserError(f"sampler '{options.sampler}' rewrites the whole block: leave block_size out")
    vocab = lm.config.model.vocab_size
    for token in options.forbidden:
        if not 0 <= token < vocab:
            raise UserError(f"forbidden token {token} is out of range, expected 0 to {vocab - 1}")
    never = {*options.forbidden, lm.special.mask, *([lm.special.end] if options.min_length else [])} - {-1}
    if len(never) >= vocab:
        raise UserError("every token is forbidden: at least one must be left to draw")
    if options.constraint is not None and lm.tokenizer is None:
        raise UserError("a constraint needs a tokenizer, and this checkpoint has none")
    if options.constraint is not None and options.min_length:
        raise UserError("min_length does not go with a constraint: write the least length into the constraint, e.g. "
                        "'.{20,}'")
    if options.stop and lm.tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this checkpoint has none")
    if any(not text for text in options.stop):
        raise UserError("a stop string is empty, expected at least one character")


def _bidirectional(lm) -> bool:
    """Whether one block is all that the model ever sees (MDLM)."""
    return not lm.config.diffusion.causal and lm.config.block_size >= lm.context


def encode_prompts(lm, prompts, num: int, length: int, window: bool) -> list[np.ndarray]:
    """Ids of every request, int32. UserError for what cannot be continued to `length` tokens."""
    if num < 1:
        raise UserError(f"num is {num}, expected at least 1 sample")
    if length < 1 or (length > lm.context and not window):
        raise UserError(f"length is {length}, expected 1 to {lm.context}, the tokens the model was trained on"
                        + (", or a sliding window (window=True, --window)" if length > lm.context else ""))
    if prompts is not None and (isinstance(prompts, str) or not len(prompts)):
        raise UserError(f"prompts are {prompts!r}, expected a list of one or more texts or lists of token ids")
    encoded = []
    for prompt in [()] if prompts is None else prompts:
        ids = encode(lm, prompt)
        if (ids == lm.special.mask).any():
            raise UserError(f"the prompt holds the mask token {lm.special.mask}, which is never part of a text")
        if len(ids) >= length:
            raise UserError(f"the prompt has {len(ids)} tokens, which leaves none of length {length} to write: "
                            f"shorten the prompt or raise the length (at most {lm.context} without a sliding window)")
        if not len(ids) and lm.config.diffusion.causal and not lm.config.diffusion.bos:
            raise UserError("this autoregressive model has no beginning token: give it a prompt of at least one token")
        encoded += [ids] * num
    return encoded


def encode(lm, text) -> np.ndarray:
    """Ids int32 `[n]` of a text or a list of ids, within the vocabulary."""
    if isinstance(text, str):
        if lm.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer: give prompts as lists of token ids")
        text = lm.tokenizer.encode(text)
    ids = np.asarray(text)
    if ids.ndim != 1:
        raise UserError(f"a prompt is {text!r}, expected a text or a list of token ids")
    vocab = lm.config.model.vocab_size
    if ids.size and not (np.issubdtype(ids.dtype, np.integer) and 0 <= ids.min() and ids.max() < vocab):
        raise UserError(f"a prompt holds token ids from {ids.min()} to {ids.max()}, expected integers 0 to {vocab - 1}")
    return ids.astype(np.int32)


def prompt_rows(lm, prompts: list[np.ndarray], length: int, options: Options) -> Rows:
    """One row a prompt, the prompt on the left."""
    tokens = np.zeros((len(prompts), padded_length(lm, length)), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = prompt
    starts = np.array([len(prompt) for prompt in prompts], np.int32)
    return Rows(tokens, np.arange(tokens.shape[1]) < starts[:, None], np.full_like(starts, length),
                starts + options.min_length, np.arange(len(prompts), dtype=np.int32))


def padded_length(lm, length: int) -> int:
    """Tokens a row is padded to: whole blocks, few different numbers of them."""
    unit = lm.config.block_size * max(1, BUCKET // lm.config.block_size)
    return -(-length // unit) * unit


def write(lm, options: Options, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill what is not given -> tokens `[B, L]`, stopped `[B]` (an index of STOPS), nfe `[B]`, in batches."""
    parts = [_write_batch(lm, options, Rows(*(x[first:first + ROWS] for x in rows)))
             for first in range(0, len(rows.tokens), ROWS)]
    tokens, stopped, nfe = (np.concatenate(part) for part in zip(*parts))
    return tokens, stopped, nfe * (2 if options.guidance else 1)


def _write_batch(lm, options: Options, rows: Rows):
    count = len(rows.tokens)
    spare = (1 << (count - 1).bit_length()) - count
    rows = Rows(*(np.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)) for x in rows))  # spare rows want 0 tokens
    if _bidirectional(lm) and rows.tokens.shape[1] > lm.config.block_size:
        if options.constraint is not None:
            raise UserError(f"a constraint works within {lm.config.block_size} tokens, all that this model sees")
        result = _slide(lm, options, rows)
    else:
        result = _write_rows(lm, options, rows, 0)
    return tuple(x[:count] for x in result)


def _write_rows(lm, options: Options, rows: Rows, turn: int):
    """One pass of the loop over the blocks of the rows; between stretches of blocks a look for stop strings."""
    job = begin(lm, options, rows, turn)
    progress, blocks = job.progress, rows.tokens.shape[1] // lm.config.block_size
    if not options.stop:
        progress = job.run(progress, blocks)
    else:
        for until in range(job.first_block, blocks + CHECK_EVERY, max(1, CHECK_EVERY // lm.config.block_size)):
            progress = job.run(progress, min(until, blocks))
            progress = _stop_at_strings(lm, options, rows, progress)
    return tuple(np.asarray(x) for x in (progress.tokens, progress.stopped, progress.nfe))


def _stop_at_strings(lm, options: Options, rows: Rows, progress: Progress) -> Progress:
    """Rows whose new text holds a stop string write no more; `finish` cuts them."""
    tokens, stopped = np.asarray(progress.tokens), np.array(progress.stopped)
    for i in np.flatnonzero((stopped == 0) & (rows.length > 0)):
        new = tokens[i, :rows.length[i]]
        new = new[~rows.given[i, :rows.length[i]] & (new != lm.special.mask)]
        text = lm.tokenizer.decode(new)
        if any(string in text for string in options.stop):
            stopped[i] = STOPS.index("end")
    return progress._replace(stopped=jnp.asarray(stopped))


def _slide(lm, options: Options, rows: Rows):
    """A bidirectional model beyond its length: the canvas moves by half, given what was written in the other half."""
    size, stride = lm.config.block_size, lm.config.block_size // 2
    spare = ((0, 0), (0, size))  # so that the last canvas is whole
    given = np.pad(rows.given, spare)
    tokens = np.where(given, np.pad(rows.tokens, spare), lm.special.mask)
    stopped, nfe = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
    for turn, at in enumerate(range(0, max(int(rows.length.max()) - stride, 1), stride)):
        canvas = np.s_[:, at:at + size]
        length = np.where(stopped > 0, 0, np.maximum(rows.length - at, 0)).astype(np.int32)
        writes = (~given[canvas] & (np.arange(size) < length[:, None])).any(1)
        part = Rows(tokens[canvas], given[canvas], length * writes, rows.earliest_end - at, rows.number)
        written, part_stopped, part_nfe = _write_rows(lm, options, part, turn)
        tokens[canvas] = np.where(writes[:, None], written, tokens[canvas])
        given[canvas] |= writes[:, None]
        stopped, nfe = np.where(writes, part_stopped, stopped), nfe + part_nfe
    return tokens[:, :-size], stopped, nfe


class Job(NamedTuple):
    """One batch in the loop. `run(progress, until)` writes blocks up to index `until`; `progress` is given away."""

    progress: Progress
    run: Callable
    request: Request
    plan: "Plan"
    first_block: int


class Plan(NamedTuple):
    """What a compiled program depends on besides shapes."""

    sampler: str
    settings: Settings
    slots: int
    cache_dtype: str
    guided: bool


def begin(lm, options: Options, rows: Rows, turn: int) -> Job:
    """The rows ready for the loop, prompts in the cache. turn: of a sliding canvas, keys its noise."""
    size = lm.config.block_size
    wanted = ~rows.given & (np.arange(rows.given.shape[1]) < rows.length[:, None])
    first_block = int(np.argmax(wanted.any(0))) // size
    plan = make_plan(lm, options, rows.tokens.shape[1])
    denoiser = make_denoiser(lm, plan)
    stored = denoiser.stored_before(first_block)
    origin = -(-max(stored - plan.slots, 0) // size) * size
    prefill = min(plan.slots, -(-stored // BUCKET) * BUCKET)
    request = make_request(lm, options, rows, turn)
    scalars = (np.int32(first_block), np.int32(stored), np.int32(origin), np.float32(options.guidance))
    programs = lm.__dict__.setdefault("_programs", {})  # jitted once, compiled once per plan and shapes
    if not programs:
        programs["start"] = jax.jit(functools.partial(_start, lm), static_argnums=(0, 1))
        programs["run"] = jax.jit(functools.partial(_run, lm), static_argnums=0, donate_argnums=4)
    progress = programs["start"](plan, prefill, lm.params, request, rows.tokens, *scalars)
    run = functools.partial(programs["run"], plan, lm.params, request, scalars[-1])
    return Job(progress, lambda progress, until: run(progress, np.int32(until)), request, plan, first_block)


def make_plan(lm, options: Options, row_length: int) -> Plan:
    """Static choices; a sliding window keeps as much context as the model was trained with."""
    sampler, size = SAMPLERS[options.sampler], lm.config.block_size
    window = options.block_size or size
    draw_all = None
    if options.constraint is not None:
        draw_all = sample_block if options.temperature else best_block
    settings = Settings(block_size=size, window=window, steps=options.steps or sampler.steps or window,
                        filters=options.filters, mask_id=lm.special.mask, end_id=lm.special.end,
                        min_entropy=options.min_entropy, draw_all=draw_all)
    beginning = lm.config.diffusion.causal and lm.config.diffusion.bos  # takes a slot of its own
    ring = max((lm.context // size - 1) * size, size) + beginning
    slots = min(row_length, ring) if options.window else row_length
    return Plan(options.sampler, settings, slots, options.cache_dtype, bool(options.guidance))


def make_denoiser(lm, plan: Plan):
    objective = lm.config.diffusion
    if objective.causal:
        return CausalDenoiser(lm.model, plan.slots, plan.cache_dtype, objective.bos, lm.special.end)
    return BlockDenoiser(lm.model, plan.settings.block_size, plan.slots, plan.cache_dtype)


def make_request(lm, options: Options, rows: Rows, turn: int) -> Request:
    forbidden = np.zeros(lm.config.model.vocab_size, bool)
    forbidden[[lm.special.mask, *options.forbidden]] = True
    threshold = SAMPLERS[options.sampler].threshold if options.threshold is None else options.threshold
    key = jax.random.fold_in(jax.random.key(options.seed), turn) if turn else jax.random.key(options.seed)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(rows.number))
    constraint = None
    if options.constraint is not None:
        available = [length - given[:length].sum() for length, given in zip(rows.length, rows.given) if length]
        constraint = Constraint(automaton.build(options.constraint, lm.tokenizer, len(forbidden), available,
                                                options.forbidden))
    return Request(keys, rows.given, rows.length, rows.earliest_end, forbidden, np.float32(threshold), constraint)


def make_asked(lm, plan: Plan, params, request: Request, guidance) -> Asked:
    """The network as the loop asks it."""
    denoise = functools.partial(make_denoiser(lm, plan), unstacked(lm.model, params))
    if plan.guided:
        denoise = Guided(denoise, guidance, request.given, plan.settings.mask_id)
    return Asked(denoise, SAMPLERS[plan.sampler], plan.settings)


def _start(lm, plan: Plan, prefill: int, params, request: Request, tokens_BxL, first_block, stored, origin, guidance):
    denoiser = make_denoiser(lm, plan)
    ids = tokens_BxL
    if lm.config.diffusion.causal and lm.config.diffusion.bos:
        ids = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=lm.special.end)
    ids = jax.lax.dynamic_slice_in_dim(ids, origin, prefill, axis=1)
    real = jnp.broadcast_to(origin + jnp.arange(prefill) < stored, ids.shape)
    if plan.guided:
        ids, real = jnp.concatenate([ids, ids]), jnp.concatenate([real, jnp.zeros_like(real)])
    cache = denoiser.prefill(params, ids, real, origin)
    return start(make_asked(lm, plan, params, request, guidance), request, tokens_BxL, first_block, cache)


def _run(lm, plan: Plan, params, request: Request, guidance, progress: Progress, until) -> Progress:
    return run_blocks(make_asked(lm, plan, params, request, guidance), request, progress, until)


def finish(lm, options: Options, new, nfe: int, stop: str) -> Sample:
    """The sample of the new tokens `[n]`: cut at an end token or stop string, and where nothing was written."""
    new = np.asarray(new)
    stop = "length" if stop == "end" else stop  # an end token behind the last wanted place ends nothing
    ends = np.flatnonzero((new == lm.special.end) | (new == lm.special.mask))
    if len(ends):
        stop = "end" if new[ends[0]] == lm.special.end else stop
        new = new[:ends[0]]
    text = None if lm.tokenizer is None else lm.tokenizer.decode(new)
    places = [text.index(string) for string in options.stop if string in text]
    if places:
        text, stop = text[:min(places)], "string"
        while len(lm.tokenizer.decode(new)) > len(text):
            new = new[:-1]
    return Sample(text, new.tolist(), nfe, stop)
