"""One batch of rows in the loop: prompts put in the cache, blocks written, stops looked for.

`BatchLoop.write` is the one generator behind `generate` and `stream`: where nobody watches, a compiled program writes
many blocks at once; where somebody does, the same steps are compiled one by one. The keys are the same, so the tokens
are.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.data.texts import decode_continuation
from bd3lm_jax.generation.options import Options
from bd3lm_jax.generation.plan import Plan, make_context, make_denoiser, make_plan, make_request
from bd3lm_jax.generation.prompts import BUCKET, Rows, align_to_windows
from bd3lm_jax.generation.sampling.generate import (
    STOPS,
    Frame,
    Progress,
    Request,
    close_block,
    open_block,
    run_blocks,
    start,
    step_block,
)

CHECK_EVERY = 32  # tokens between two looks for stop strings


class Written(NamedTuple):
    """progress: a `Progress` after whole blocks; None inside a block. block: where somebody watches, the `Block` after
    its latest step; else None."""

    progress: Any
    block: Any


class BatchLoop:
    """The rows ready for the loop.

    window_index: of a sliding canvas, keys its noise. starts: where the new text of each row begins, which is where its
    stop strings are looked for; None: behind what is given.
    """

    def __init__(self, lm, options: Options, rows: Rows, window_index: int = 0, starts: Sequence[int] | None = None):
        self.num_places = rows.tokens.shape[1]
        rows, self.lead_B = align_to_windows(rows, options)
        self.lm, self.options, self.rows = lm, options, rows
        self.starts = np.argmin(rows.given, axis=1) if starts is None else np.asarray(starts) + self.lead_B
        self.plan = make_plan(lm, options, rows.tokens.shape[1])
        self.block_size = self.plan.settings.block_size
        to_fill = ~rows.given & (np.arange(rows.given.shape[1]) < rows.length[:, None])
        self.first_block = int(np.argmax(to_fill.any(0))) // self.block_size
        self.request = make_request(lm, options, rows, window_index)
        self.progress = self._start()

    def _start(self) -> Progress:
        plan, rows = self.plan, self.rows
        stored = plan.extent.num_prefilled(make_denoiser(self.lm, plan), rows.given, self.first_block)
        origin = -(-max(stored - plan.slots, 0) // self.block_size) * self.block_size
        prefill = min(plan.slots, rows.tokens.shape[1], -(-stored // BUCKET) * BUCKET)
        scalars = np.int32(self.first_block), np.int32(stored), np.int32(origin), np.float32(self.options.guidance)
        return _program(self.lm, "start")(plan, prefill, self.lm.params, self.request, rows.tokens, *scalars)

    def _call(self, program: str, *state):
        return _program(self.lm, program)(self.plan, self.lm.params, self.request, np.float32(self.options.guidance),
                                          *state)

    def write(self, watched: bool = False) -> Iterator[Written]:
        """Write the rows: after every step where somebody watches, else after stretches of blocks, between which stop
        strings are looked for. Takes `progress` away."""
        plan, stop = self.plan, self.options.stop
        blocks = plan.extent.num_blocks(plan.settings, self.rows.tokens.shape[1])
        stretch = plan.extent.stretch(plan.settings, CHECK_EVERY) if stop else None
        stretch = 1 if watched else stretch or blocks
        progress, block = self.progress, None
        del self.progress
        for until in range(self.first_block + stretch, blocks + stretch, stretch):
            if watched:
                block, cache = self._call("open", progress)
                while plan.transition.is_unfinished(plan.settings, block).any():
                    yield Written(None, block)
                    block = self._call("step", progress, block, cache)
                progress = self._call("close", progress, block, cache)
            else:
                progress = self._call("run", progress, np.int32(min(until, blocks)))
            if stop and plan.extent.stretch(plan.settings, CHECK_EVERY):
                progress = self._stop_at_strings(progress)
            yield Written(progress, block)
            if stretch < blocks and self._is_done(progress):
                return

    def _is_done(self, progress: Progress) -> bool:
        return bool(self.plan.extent.done(self.plan.settings, self.request, progress).all())

    def _stop_at_strings(self, progress: Progress) -> Progress:
        """Rows whose new text holds a stop string in finished blocks write no more; `postprocess` cuts them."""
        tokens, stopped = np.asarray(progress.tokens), np.array(progress.stopped)
        for i in np.flatnonzero((stopped == 0) & (self.rows.length > 0)):
            first = self.starts[i]
            new = tokens[i, first:min(self.rows.length[i], int(progress.block) * self.block_size)]
            text = decode_continuation(self.lm.tokenizer, tokens[i, :first], new[new != self.lm.special.mask])
            if any(string in text for string in self.options.stop):
                stopped[i] = STOPS.index("end")
        return progress._replace(stopped=jnp.asarray(stopped))

    def result(self, progress: Progress) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens `[B, L]`, stopped and nfe `[B]` of the rows as they were given."""
        places = self.lead_B[:, None] + np.arange(self.num_places)
        return (np.take_along_axis(np.asarray(progress.tokens), places, axis=1), np.asarray(progress.stopped),
                np.asarray(progress.nfe))


def _program(lm, name: str) -> Callable:
    """A part of the loop, jitted once a model, compiled once per plan and shapes."""
    programs = lm.__dict__.setdefault("_programs", {})
    if not programs:
        programs["start"] = jax.jit(functools.partial(start_rows, lm), static_argnums=(0, 1))
        programs["run"] = jax.jit(functools.partial(run_rows, lm), static_argnums=0, donate_argnums=4)
        for part, function in (("open", open_block), ("step", step_block), ("close", close_block)):
            programs[part] = jax.jit(functools.partial(_in_frame, lm, function), static_argnums=0)
    return programs[name]


def start_rows(lm, plan: Plan, prefill: int, params, request: Request, tokens_BxL, first_block, stored, origin,
               guidance) -> Progress:
    """Progress before anything is written, with `prefill` (static) places from `origin` on in the cache, of which the
    first `stored` of the row count."""
    ids = jnp.where(request.given, tokens_BxL, plan.settings.mask_id)
    if lm.config.diffusion.bos_in_context:
        ids = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=lm.special.end)
    ids, given = (jax.lax.dynamic_slice_in_dim(x, origin, prefill, axis=1) for x in (ids, request.given))
    real = plan.extent.is_prefilled(given, origin + jnp.arange(prefill), stored)
    if plan.guided:
        ids, real = jnp.concatenate([ids, ids]), jnp.concatenate([real, jnp.zeros_like(real)])
    cache = make_denoiser(lm, plan).prefill(params, ids, real, origin)
    return start(make_context(lm, plan, params, request, guidance), request, tokens_BxL, first_block, cache)


def run_rows(lm, plan: Plan, params, request: Request, guidance, progress: Progress, until) -> Progress:
    """`run_blocks` of a plan."""
    return run_blocks(make_context(lm, plan, params, request, guidance), request, progress, until)


def _in_frame(lm, function, plan: Plan, params, request: Request, guidance, progress: Progress, *state):
    return function(Frame(make_context(lm, plan, params, request, guidance), request, progress), *state)
