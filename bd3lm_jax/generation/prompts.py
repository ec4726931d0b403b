"""Prompts as rows of tokens, which the sampling loop fills."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.texts import encode_continuation
from bd3lm_jax.generation.approximate_cache import NO_TOKEN
from bd3lm_jax.generation.options import Options

BUCKET = 64  # rows of tokens and prompts are padded to multiples of this, so that few lengths compile


class Rows(NamedTuple):
    """Host arrays: tokens int32 and given bool `[B, L]`, L a multiple of the block size; length, earliest_end and
    number (of the request, which keys its noise) int32 `[B]`."""

    tokens: np.ndarray
    given: np.ndarray
    length: np.ndarray
    earliest_end: np.ndarray
    number: np.ndarray


def encode_prompts(lm, prompts, num: int, length: int, window: bool) -> list[np.ndarray]:
    """Ids of every request, int32. UserError for what cannot be continued to `length` tokens."""
    if num < 1:
        raise UserError(f"num is {num}, expected at least 1 sample")
    if length < 1 or (length > lm.context and not window):
        raise UserError(f"length is {length}, expected 1 to {lm.context}, the tokens the model was trained on"
                        + (", or a sliding window (sliding_window=True, --sliding_window)"
                           if length > lm.context else ""))
    positions = lm.config.model.positions
    if positions is not None and length > positions:
        raise UserError(f"length is {length}, and model.kind='{lm.config.model.kind}' has learned {positions} "
                        "positions: it cannot write more, nor with a sliding window")
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
        if not len(ids) and not lm.config.diffusion.predicts_first_token:
            raise UserError("this autoregressive model has no beginning token: give it a prompt of at least one token")
        encoded += [ids] * num
    return encoded


def encode(lm, text, continues: bool = False) -> np.ndarray:
    """Ids int32 `[n]` of a text or a list of ids, within the vocabulary; continues: the text follows other text."""
    if isinstance(text, str):
        if lm.tokenizer is None:
            raise UserError("this checkpoint has no tokenizer: give prompts as lists of token ids")
        text = encode_continuation(lm.tokenizer, text) if continues else lm.tokenizer.encode(text)
    try:
        ids = np.asarray(text)
    except ValueError:  # lists of several lengths
        ids = None
    if ids is None or ids.ndim != 1 or ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"a prompt is {text!r}, expected a text or a list of token ids")
    vocab = lm.config.model.vocab_size
    if ids.size and not (0 <= ids.min() and ids.max() < vocab):
        raise UserError(f"a prompt holds token ids from {ids.min()} to {ids.max()}, expected integers 0 to {vocab - 1}")
    return ids.astype(np.int32)


def prompt_rows(lm, prompts: list[np.ndarray], length: int, options: Options) -> Rows:
    """One row a prompt, the prompt on the left, forced tokens in their places. UserError for forced tokens that have
    no place in the text."""
    tokens = np.zeros((len(prompts), padded_length(lm, length)), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = prompt
    starts = np.array([len(prompt) for prompt in prompts], np.int32)
    given, earliest_end = np.arange(tokens.shape[1]) < starts[:, None], starts + options.min_length
    for i, forced in enumerate(_forced_by_request(options.forced, len(prompts))):
        for place, token in _forced_tokens(lm, forced, len(prompts[i]), length).items():
            tokens[i, place], given[i, place] = token, True
            earliest_end[i] = max(earliest_end[i], place + 1)
    return Rows(tokens, given, np.full_like(starts, length), earliest_end, np.arange(len(prompts), dtype=np.int32))


def _forced_by_request(forced, count: int) -> list[Mapping]:
    """Forced tokens of each request."""
    if forced is None or isinstance(forced, Mapping):
        return [forced or {}] * count
    if not isinstance(forced, (list, tuple)) or len(forced) != count:
        raise UserError(f"forced is {forced!r}, expected {{place: token id or text}}, or a list of {count} such dicts, "
                        "one a request")
    return [one or {} for one in forced]


def _forced_tokens(lm, forced: Mapping, prompt: int, length: int) -> dict[int, int]:
    """Ids by place; a text takes as many places as it has tokens."""
    token_at, vocab = {}, lm.config.model.vocab_size
    for place, token_or_text in forced.items():
        try:
            first = int(place)
        except (TypeError, ValueError):
            raise UserError(f"forced place {place!r} is no number, expected {prompt} to {length - 1}") from None
        ids = encode(lm, token_or_text, continues=first > 0).tolist() if isinstance(token_or_text,
                                                                                    str) else [token_or_text]
        if not ids:
            raise UserError(f"the text forced at place {first} is empty, expected at least one token")
        for at, token in enumerate(ids, first):
            if not prompt <= at < length:
                raise UserError(f"a token is forced at place {at}, expected {prompt} to {length - 1}: after the prompt "
                                f"and within length {length}")
            if not isinstance(token, (int, np.integer)) or not 0 <= token < vocab:
                raise UserError(f"{token!r} is forced at place {at}, expected a text or a token id 0 to {vocab - 1}")
            if token == lm.special.mask:
                raise UserError(f"the mask token {token} is forced at place {at}, and is never part of a text")
            if token_at.setdefault(at, token) != token:
                raise UserError(f"tokens {token_at[at]} and {token} are both forced at place {at}, expected one")
    return token_at


def padded_length(lm, length: int) -> int:
    """Tokens a row is padded to: whole blocks, few different numbers of them."""
    unit = lm.config.block_size * (1 if lm.is_bidirectional else max(1, BUCKET // lm.config.block_size))
    return -(-length // unit) * unit


def align_to_windows(rows: Rows, options: Options) -> tuple[Rows, np.ndarray]:
    """The rows with a window beginning where each prompt ends, and how many places `[B]` that has put before them."""
    length, window = rows.tokens.shape[1], options.block_size
    if not options.approximate_cache or window >= length:
        return rows, np.zeros(len(rows.tokens), np.int32)
    lead_B = (-np.cumprod(rows.given, axis=1).sum(1) % window).astype(np.int32)
    size = -(-(length + lead_B.max()) // window) * window
    place_BxL = np.arange(size) - lead_B[:, None]
    inside_BxL, at_BxL = (place_BxL >= 0) & (place_BxL < length), np.clip(place_BxL, 0, length - 1)
    tokens, given = (np.take_along_axis(x, at_BxL, axis=1) for x in (rows.tokens, rows.given))
    return rows._replace(tokens=np.where(inside_BxL, tokens, NO_TOKEN).astype(np.int32), given=given | ~inside_BxL,
                         length=np.where(rows.length > 0, rows.length + lead_B, 0).astype(np.int32),
                         earliest_end=rows.earliest_end + lead_B), lead_B
