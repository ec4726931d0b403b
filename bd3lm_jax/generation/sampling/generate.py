"""The one generation loop: blocks left to right, steps inside, an exact cache across; compiled as a whole.

Three things are put in:

- a denoiser, how the network is called:
      denoise(canvas_BxS, block, previous, positions_BxP, level_B, cache) -> logits_BxPxV, cache
  (previous: the block before, whose keys and values this call stores; None when they are stored already), so that a
  test can pass a table of probabilities;
- a `Transition`, what a step does to the canvas of a block (`reveal.py`, `simplex.py`);
- an `Extent`, which stretch of its row a block is (`FixedSize`; `auto_size.py`).

Rows do not influence each other: randomness is keyed by (seed, request, block, call, position), and every row has its
own clock and stop. `run_blocks` is the loop. A caller that watches every step drives the same three functions from
outside: `open_block`, `step_block`, `close_block`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax.attention.spec import Array
from bd3lm_jax.generation.sampling.filters import Filters

STOPS = ("length", "end", "entropy")  # by the code in `Progress.stopped`; 0 also means: still writing
ENTROPY_TOKENS = 256  # the entropy test looks at so many last tokens (BD3-LM section 5.3)


class Settings(NamedTuple):
    """Static settings of a compiled sampler.

    window: tokens are revealed in stretches of so many positions, left to right from the end of what is given at the
    beginning of the block; the last one may be shorter. steps:
    grid of a window, for samplers that have one. min_entropy: nats below which a text is given up, or None. end_id: -1
    if there is none. draw_all: what draws a whole block jointly (see `sampling/constraint.py`), or None: every token
    on its own.
    """

    block_size: int
    window: int
    steps: int
    filters: Filters
    mask_id: int
    end_id: int
    min_entropy: float | None = None
    draw_all: Callable | None = None


class Request(NamedTuple):
    """What the rows of one batch ask for.

    keys: a typed key a row. given `[B, L]` bool: tokens that stay as they are. length `[B]`: tokens wanted, given ones
    included. earliest_end `[B]`: no end token before this position. forbidden `[V]` bool: tokens never drawn.
    threshold: the sampler's number. constraint: for `Settings.draw_all`.
    """

    keys: jax.Array
    given: Array
    length: Array
    earliest_end: Array
    forbidden: Array
    threshold: Array | np.floating | float
    constraint: Any = None


class Progress(NamedTuple):
    """block: the next to be written. tokens `[B, L]`, masks where nothing is written yet. stopped int32 `[B]`: 0, or
    why the row is done (an index of STOPS). nfe int32 `[B]`: network calls that wrote something in the row. state:
    that of the constraint. rows: what the extent keeps of every row, if anything."""

    block: jax.Array
    tokens: jax.Array
    stopped: jax.Array
    nfe: jax.Array
    cache: Any
    state: Any = None
    rows: Any = None


class PreviousBlock(NamedTuple):
    """The block before, `[B, S]` ids, and which of its tokens are real (none before the first block)."""

    ids: jax.Array
    real: jax.Array


class Block(NamedTuple):
    """A block being written: canvas and masked `[B, S]`; confidence `[B, S]` of its tokens when they were drawn; level
    and index `[B]` of the row's clock in its window; calls: steps since the block was opened; open `[B]` bool: rows
    that write in this block."""

    canvas: jax.Array
    masked: jax.Array
    open: jax.Array
    confidence: jax.Array
    level: jax.Array
    index: jax.Array
    nfe: jax.Array
    calls: jax.Array


class Transition(Protocol):
    """What steps do to the canvas of a block. Static: it can be hashed."""

    def max_calls(self, settings: Settings) -> int | None:
        """The most network calls of a block, where that is known before."""
        ...

    def start(self, frame: "Frame", block: Block) -> Block:
        """The block before its first step; it comes with given tokens and masks."""
        ...

    def step(self, frame: "Frame", block: Block, previous: PreviousBlock | None, cache) -> tuple[Block, Any]:
        """One step of every row, at most one network call -> block with `calls` one higher, cache."""
        ...

    def is_unfinished(self, settings: Settings, block: Block) -> jax.Array:
        """Rows that take a further step, bool `[B]`."""
        ...


class Extent(Protocol):
    """Which stretch of its row a block is. Static: it can be hashed."""

    def num_blocks(self, settings: Settings, length: int) -> int:
        """The most blocks of `length` tokens."""
        ...

    def stretch(self, settings: Settings, tokens: int) -> int | None:
        """Blocks of about `tokens` tokens, at least one; None where rows differ."""
        ...

    def num_prefilled(self, denoiser, given_BxL, first_block: int) -> int:
        """Tokens at the beginning of the rows that are in the cache before the loop."""
        ...

    def is_prefilled(self, given_BxN, place_N, stored) -> jax.Array:
        """Which of these places hold tokens for the cache, bool `[B, N]`; stored: as `num_prefilled` says."""
        ...

    def start(self, settings: Settings, request: Request, progress: Progress) -> Progress:
        """Before anything is written."""
        ...

    def done(self, settings: Settings, request: Request, progress: Progress) -> jax.Array:
        """Rows that have nothing left to write, bool `[B]`."""
        ...

    def enter(self, frame: "Frame") -> "Frame":
        """The frame in which the next block is an ordinary one."""
        ...

    def leave(self, frame: "Frame", local: "Frame", closed: Progress) -> Progress:
        """Progress after the block; closed: that of `local`, which `enter` made of `frame`."""
        ...


@dataclasses.dataclass(frozen=True)
class FixedSize:
    """Blocks of one size, side by side, the same places in every row."""

    def num_blocks(self, settings, length):
        return length // settings.block_size

    def stretch(self, settings, tokens):
        return max(1, tokens // settings.block_size)

    def num_prefilled(self, denoiser, given_BxL, first_block):
        return denoiser.num_prefilled(first_block)

    def is_prefilled(self, given_BxN, place_N, stored):
        return jnp.broadcast_to(place_N < stored, given_BxN.shape)

    def start(self, settings, request, progress):
        return progress

    def done(self, settings, request, progress):
        return (progress.stopped > 0) | (progress.block * settings.block_size >= request.length)

    def enter(self, frame):
        return frame

    def leave(self, frame, local, closed):
        return closed


class DenoiserContext(NamedTuple):
    """What the loop is made of: see the module."""

    denoise: Callable
    transition: Transition
    settings: Settings
    extent: Extent = FixedSize()


class Frame(NamedTuple):
    """What a block is written in. keys `[C, 2, B]`: of the block's calls, where they are derived already."""

    context: DenoiserContext
    request: Request
    progress: Progress
    keys: jax.Array | None = None

    @property
    def settings(self) -> Settings:
        return self.context.settings

    @property
    def done(self) -> jax.Array:
        """Rows that have nothing left to write, bool `[B]`."""
        return self.context.extent.done(self.settings, self.request, self.progress)

    def cut(self, x_BxL, block=None) -> jax.Array:
        """The part of rows in a block, this one unless another is named, `[B, S]`."""
        size, block = self.settings.block_size, self.progress.block if block is None else block
        return jax.lax.dynamic_slice_in_dim(x_BxL, block * size, size, axis=1)

    @property
    def given(self) -> jax.Array:
        """Given tokens in this block, bool `[B, S]`."""
        return self.cut(self.request.given)

    def call_keys(self, calls) -> jax.Array:
        """Keys of one call, `[2, B]`: for the step, for the tokens."""
        if self.keys is not None:
            return self.keys[calls]
        return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(jax.random.fold_in(key, self.progress.block),
                                                                        calls)), out_axes=1)(self.request.keys)

    def with_keys(self) -> "Frame":
        """With the keys of all calls where their number is known: on a CPU deriving a key takes long, deriving many
        hardly longer."""
        calls = self.context.transition.max_calls(self.settings)
        return self if calls is None else self._replace(keys=jax.vmap(self.call_keys)(jnp.arange(calls)))


def start(context: DenoiserContext, request: Request, tokens_BxL, first_block, cache) -> Progress:
    """Before anything is written. L is a multiple of the block size. first_block: the first that is not wholly given
    in every row; the blocks before its predecessor must be in the cache already."""
    batch = tokens_BxL.shape[0]
    zeros = jnp.zeros(batch, jnp.int32)
    state = None if request.constraint is None else request.constraint.start(batch)
    tokens = jnp.where(request.given, tokens_BxL, context.settings.mask_id)
    progress = Progress(jnp.asarray(first_block, jnp.int32), tokens, zeros, zeros, cache, state)
    return context.extent.start(context.settings, request, progress)


def run_blocks(context: DenoiserContext, request: Request, progress: Progress, until) -> Progress:
    """Write blocks up to the index `until`, or until every row has stopped. One program, nothing on the host."""
    transition = context.transition

    def write(progress: Progress) -> Progress:
        frame = Frame(context, request, progress)
        local = context.extent.enter(frame).with_keys()
        block, cache = open_block(local)
        if transition.max_calls(context.settings) != 1:  # else the opening call has finished every block
            block = jax.lax.while_loop(lambda block: transition.is_unfinished(context.settings, block).any(),
                                       lambda block: step_block(local, block, cache), block)
        return context.extent.leave(frame, local, close_block(local, block, cache))

    return jax.lax.while_loop(lambda p: (p.block < until) & ~Frame(context, request, p).done.all(), write, progress)


def open_block(frame: Frame) -> tuple[Block, Any]:
    """The next block after its first step, whose network call stores the block before; and the cache."""
    progress = frame.progress
    masked = ~frame.given & ~frame.done[:, None]
    zeros = jnp.zeros_like(progress.nfe)
    block = Block(frame.cut(progress.tokens), masked, masked.any(-1), jnp.ones(masked.shape), jnp.ones(zeros.shape),
                  zeros, progress.nfe, jnp.zeros((), jnp.int32))
    before = frame.cut(progress.tokens, jnp.maximum(progress.block - 1, 0))
    previous = PreviousBlock(before, jnp.broadcast_to(progress.block > 0, before.shape))
    transition = frame.context.transition
    return transition.step(frame, transition.start(frame, block), previous, progress.cache)


def step_block(frame: Frame, block: Block, cache) -> Block:
    """One more step of every row."""
    return frame.context.transition.step(frame, block, None, cache)[0]


def close_block(frame: Frame, block: Block, cache) -> Progress:
    """The finished block put in its place; rows that meet a stop are done."""
    settings, request, progress = frame.settings, frame.request, frame.progress
    done_Bx1 = frame.done[:, None]
    new = ~frame.given & ~done_Bx1
    stopped = jnp.where(((block.canvas == settings.end_id) & new).any(-1), STOPS.index("end"), progress.stopped)
    canvas = jnp.where(done_Bx1, frame.cut(progress.tokens), block.canvas)
    tokens = jax.lax.dynamic_update_slice_in_dim(progress.tokens, canvas, progress.block * settings.block_size, axis=1)
    if settings.min_entropy is not None and tokens.shape[1] >= ENTROPY_TOKENS:
        low = _low_entropy(settings.min_entropy, tokens, (progress.block + 1) * settings.block_size) & new.any(-1)
        stopped = jnp.where((stopped == 0) & low, STOPS.index("entropy"), stopped)
    state = progress.state
    if request.constraint is not None:
        state = request.constraint.advance(state, canvas, new)
    return Progress(progress.block + 1, tokens, stopped, block.nfe, cache, state, progress.rows)


def _low_entropy(min_entropy: float, tokens_BxL, end):
    """Whether the last tokens before `end` repeat too much, bool `[B]`; False where there are too few."""
    last = jax.lax.dynamic_slice_in_dim(tokens_BxL, jnp.maximum(end - ENTROPY_TOKENS, 0), ENTROPY_TOKENS, axis=1)
    frequency = jnp.mean(last[:, :, None] == last[:, None], axis=-1, dtype=jnp.float32)
    return (-jnp.mean(jnp.log(frequency), axis=-1) < min_entropy) & (end >= ENTROPY_TOKENS)
