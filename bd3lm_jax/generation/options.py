"""How texts are written: the options of `LM.generate`, and whether they fit a model."""

import dataclasses
from typing import Any

from bd3lm_jax.checkpoints.published.mapping import check_bos
from bd3lm_jax.core import synonyms
from bd3lm_jax.core.errors import UserError, lookup, nearest
from bd3lm_jax.generation import approximate_cache, denoise
from bd3lm_jax.generation.compatibility import FIELD_OF
from bd3lm_jax.generation.sampling import ALL_SAMPLERS, Filters, auto_size, constraint
from bd3lm_jax.generation.sampling.auto_size import AUTO
from bd3lm_jax.generation.sampling.filters import check_filters


@dataclasses.dataclass(frozen=True)
class Options:
    """How texts are written; each is a keyword of `LM.generate`, also under its name in FIELD_OF.

    sampler: one of `sampling.ALL_SAMPLERS`. temperature, top_k, top_p, min_p, repetition_penalty: see
    `sampling/filters.py`. forbidden: ids never drawn. steps, threshold: of the sampler; None: its usual ones.
    block_size: what the model was trained with, or for a bidirectional model (MDLM, LLaDA) the stretch that is written
    at a time, left to right from the end of the prompt, the last one shorter where the length asks for it; None: all of
    it (a model trained with several sizes: any of them, None its usual one, or
    "auto", see `sampling/auto_size.py`). block_confidence: of "auto", how sure the model must be for a larger block.
    stop: strings that end a text. min_length: new tokens before an end token.
    min_entropy: a text whose last 256 tokens have a lower unigram entropy (nats) is given up; the paper uses 4.
    window: texts may be longer than what the model was trained on (see `denoise.py`; MDLM slides by half its length).
    cache_dtype: of keys and values, "compute": the network's. approximate_cache: of a bidirectional model, "prefix" or
    "dual" (see `approximate_cache.py`); "": none. guidance: weight of classifier-free guidance; 0: none.
    constraint: a regular expression, or a JSON schema as a dict, that every new text matches as a whole.
    forced: what stands at places in the text, {place: token id or text}, the prompt counted; or a list of such dicts,
    one a request. A text does not end before the last of them.
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
    block_size: int | str | None = None
    block_confidence: float = 0.5
    stop: tuple[str, ...] = ()
    min_length: int = 0
    min_entropy: float | None = None
    window: bool = False
    cache_dtype: str = "compute"
    approximate_cache: str = ""
    guidance: float = 0.0
    constraint: Any = None
    forced: Any = None
    seed: int = 0

    @property
    def filters(self) -> Filters:
        return Filters(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def make_options(**options) -> Options:
    """UserError for a name that is none, or for two names of one option."""
    options = by_field(options)
    field_names = [field.name for field in dataclasses.fields(Options)]
    for name in options:
        if name not in field_names:
            suggestion = synonyms.flag(name, (*field_names, *FIELD_OF, "length", "num"))  # those of `LM.generate` too
            raise UserError(f"unknown option '{name}': "
                            + (f"did you mean '{suggestion}'?" if suggestion else nearest(name, field_names)))
    for name in ("stop", "forbidden"):  # lists from callers become hashable
        if name in options:
            value = options[name]
            options[name] = (value,) if isinstance(value, str) else tuple(value)
    return Options(**options)


def by_field(options: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `LM.generate` as fields of `Options`. UserError for two names of one option."""
    for name, field in FIELD_OF.items():
        if name in options and field in options:
            raise UserError(f"{name} and {field} are two names of one option: give one of them")
    return {FIELD_OF.get(name, name): value for name, value in options.items()}


def check_options(lm, options: Options) -> None:
    """UserError for options out of range or that do not fit the model."""
    for check in OWNERS:
        check(lm, options)


def _check_sampler(lm, options: Options) -> None:
    objective, sampler = lm.config.diffusion, lookup(ALL_SAMPLERS, options.sampler, "sampler")
    if type(sampler) is not type(ALL_SAMPLERS[objective.sampler]):
        raise UserError(f"sampler '{options.sampler}' does not go with a model of kind '{objective.kind}': use "
                        f"{objective.sampler}")
    sampler.check(lm, options)


def _check_numbers(lm, options: Options) -> None:
    if options.steps is not None and options.steps < 1:
        raise UserError(f"steps is {options.steps}, expected at least 1")
    if options.threshold is not None and not options.threshold >= 0:
        raise UserError(f"threshold is {options.threshold}, expected at least 0")
    if options.min_length < 0:
        raise UserError(f"min_length is {options.min_length}, expected at least 0")


def _check_block_size(lm, options: Options) -> None:
    requested, size = options.block_size, lm.config.block_size
    is_auto = requested == AUTO and lm.config.diffusion.kind == "mixed"
    if lm.is_bidirectional and not is_auto:
        if requested is not None and not (isinstance(requested, int) and 0 < requested <= lm.context):
            raise UserError(f"block_size is {requested}, expected 1 to {lm.context}, tokens that are written at a time")
    elif requested not in (None, size) and not is_auto:
        raise UserError(f"block_size is {requested}, expected {size}, the one it was trained with")
    if ALL_SAMPLERS[options.sampler].can_remask and requested not in (None, size):
        raise UserError(f"sampler '{options.sampler}' rewrites the whole block: leave block_size out")


def _check_forbidden(lm, options: Options) -> None:
    vocab = lm.config.model.vocab_size
    for token in options.forbidden:
        if not 0 <= token < vocab:
            raise UserError(f"forbidden token {token} is out of range, expected 0 to {vocab - 1}")
    never = {*options.forbidden, lm.special.mask, *([lm.special.end] if options.min_length else [])} - {-1}
    if len(never) >= vocab:
        raise UserError("every token is forbidden: at least one must be left to draw")


def _check_stop(lm, options: Options) -> None:
    if options.stop and lm.tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this checkpoint has none")
    if any(not text for text in options.stop):
        raise UserError("a stop string is empty, expected at least one character")


OWNERS = (  # in the order of their messages
    _check_sampler,
    lambda lm, options: check_filters(options.filters),
    denoise.check_cache_dtype,
    _check_numbers,
    _check_block_size,
    auto_size.check,
    approximate_cache.check,
    _check_forbidden,
    constraint.check,
    _check_stop,
    lambda lm, options: check_bos(lm.config.diffusion, lm.config.model, lm.special.end),
    denoise.check_target_shift,
)
