"""Filling holes in texts: masks anywhere, of known length or of a length that the model chooses.

What the model sees of the text around a hole is what it sees in training:

- a bidirectional model (MDLM) everything, on both sides;
- a block model everything before, and what stands behind the hole in the same block of S tokens. Text in later blocks
  stays as it is but is not seen: use a larger block size where it matters;
- an autoregressive model only what stands before, so that it fills holes at the end of a text alone.

After the last token a text may go on: the places that its last block has left are masks that are never filled.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.texts import decode_continuation
from bd3lm_jax.generation import generation
from bd3lm_jax.generation.compatibility import refuse
from bd3lm_jax.generation.options import Options, check_options
from bd3lm_jax.generation.prompts import Rows, encode, padded_length
from bd3lm_jax.likelihood import conditional

MARKER = re.compile(r"\[MASK(?::(\d+)(?:-(\d+))?)?\]")
MARKERS = "[MASK], [MASK:5] or [MASK:2-8]"
MAX_COMBINATIONS = 64  # combinations of hole lengths of one text
CRITERION = "log-likelihood in nats (a bound, unless it is exact) of the fixed text after each hole, given all before"
UNSUPPORTED_OPTIONS = ("stop", "min_length", "min_entropy", "window", "constraint", "forced")  # of texts that go on


class Span(NamedTuple):
    """A hole as asked for: from `min_tokens` to `max_tokens` tokens."""

    min_tokens: int
    max_tokens: int


class FilledSpan(NamedTuple):
    """A hole as filled: place of its first token in the text, its tokens and their text."""

    start: int
    tokens: list[int]
    text: str | None


class Infill(NamedTuple):
    """text and tokens: the whole, fixed tokens as they were. nfe: network calls, of all lengths tried. score: by
    CRITERION, None for a text without a choice of lengths."""

    text: str | None
    tokens: list[int]
    spans: list[FilledSpan]
    nfe: int
    score: float | None

    @property
    def holes(self) -> list[FilledSpan]:
        """`spans` under its earlier name."""
        return self.spans


class Candidate(NamedTuple):
    """A text with lengths chosen: number of the text, ids with masks in the holes, (start, end) of each hole."""

    number: int
    ids: np.ndarray
    spans: list[tuple[int, int]]

    @property
    def open_end(self) -> bool:
        return self.spans[-1][1] == len(self.ids)


def infill(lm, texts: Sequence, options: Options, *, draws: int) -> list[Infill]:
    """Fill the holes of every text; text i is keyed by (seed, i), whatever else is in the batch.

    texts: with markers `[MASK]` (one token), `[MASK:n]` (n tokens) and `[MASK:a-b]` (a to b tokens), or lists of ids
    in which the mask id stands for one token. Of a range every length is filled, under the same noise, and the best by
    CRITERION is kept; the criterion is estimated with `draws` draws (see `conditional.score`). It is about tokens that
    all lengths share, so that neither short nor long fills have an advantage by their length. Their masks are the same
    where lengths differ by whole blocks, as all do in a model of one block a row; where they do not, other tokens share
    a block, and only the random numbers of each token are the same. In a hole at the end of a text an end token may
    come early; elsewhere none is drawn. Where tokens carry the space before a word, a space before a marker is
    the hole's to write.

    Raises UserError for texts without holes, unknown markers, texts longer than the context, more than MOST_LENGTHS
    combinations of lengths, and what the model cannot see.
    """
    _check(lm, texts, options)
    candidates = [candidate for number, text in enumerate(texts)
                  for candidate in _candidates(lm, number, parse(lm, text))]
    tokens, _, nfe = generation.fill_rows(lm, options, _rows(lm, candidates))
    filled = [_cut_at_end(lm, candidate, row) for candidate, row in zip(candidates, tokens)]
    candidates_of_text = [[] for _ in texts]
    for i, candidate in enumerate(candidates):
        candidates_of_text[candidate.number].append(i)
    several = [i for members in candidates_of_text if len(members) > 1 for i in members]
    scores = _scores(lm, candidates, filled, several, draws, options.seed)
    results = []
    for members in candidates_of_text:
        best = max(members, key=lambda i: scores.get(i, 0.0))  # the shortest of equals
        results.append(_result(lm, candidates[best], filled[best], int(nfe[members].sum()), scores.get(best)))
    return results


def parse(lm, text) -> list[np.ndarray | Span]:
    """Fixed ids and holes of a text, in order. UserError for what is no text with holes."""
    ids = None if isinstance(text, str) else encode(lm, text)
    if not len(text):
        raise UserError(f"a text is empty, expected one with holes: {MARKERS}")
    if ids is not None:
        borders = np.flatnonzero(np.diff(ids == lm.special.mask)) + 1
        parts = [Span(len(run), len(run)) if run[0] == lm.special.mask else run for run in np.split(ids, borders)]
    else:
        parts = _parse_markers(lm, text)
    if not any(isinstance(part, Span) for part in parts):
        raise UserError(f"the text {_short(text)} has no hole, expected {MARKERS}"
                        if isinstance(text, str) else f"the ids hold no mask token {lm.special.mask}: nothing to fill")
    return parts


def _parse_markers(lm, text: str) -> list[np.ndarray | Span]:
    parts, at, own_space = [], 0, None
    for match in (*MARKER.finditer(text), None):
        fixed = text[at:match.start()] if match else text[at:]
        unknown = re.search(r"\[mask[^\]]{0,12}\]?", fixed, re.IGNORECASE)
        if unknown:
            raise UserError(f"unknown marker '{unknown[0]}', expected {MARKERS}")
        if match and fixed.endswith(" "):
            own_space = _tokens_carry_space(lm) if own_space is None else own_space
            fixed = fixed[:-1] if own_space else fixed
        ids = encode(lm, fixed, continues=at > 0)
        if (ids == lm.special.mask).any():
            raise UserError(f"the text {_short(fixed)} encodes to the mask token outside its markers")
        if len(ids):
            parts.append(ids)
        if match:
            parts.append(_span(match))
            at = match.end()
    return parts


def _span(match: re.Match) -> Span:
    min_tokens = int(match[1] or 1)
    max_tokens = int(match[2] or min_tokens)
    if max_tokens < max(min_tokens, 1):
        raise UserError(f"marker '{match[0]}' has no length of at least one token, expected {MARKERS}")
    return Span(min_tokens, max_tokens)


def _tokens_carry_space(lm) -> bool:
    """Whether " word" is a token, so that the space before a hole is the hole's."""
    if lm.tokenizer is None:
        return False
    ids = lm.tokenizer.encode("a a")
    return len(ids) > 1 and decode_continuation(lm.tokenizer, ids[:-1], ids[-1:]).startswith(" ")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _check(lm, texts, options: Options) -> None:
    check_options(lm, options)
    refuse(options, UNSUPPORTED_OPTIONS, "option '{name}' is for texts that are written on: infill has no use for it")
    if isinstance(texts, str) or not len(texts):
        raise UserError(f"texts are {texts!r}, expected a list of one or more texts or lists of token ids")


def _candidates(lm, number: int, parts: list[np.ndarray | Span]) -> list[Candidate]:
    """One for every combination of lengths. UserError for too many and for what the model cannot fill."""
    spans = [part for part in parts if isinstance(part, Span)]
    lengths = math.prod(span.max_tokens - span.min_tokens + 1 for span in spans)
    if lengths > MAX_COMBINATIONS:
        raise UserError(f"the ranges of a text have {lengths} combinations of lengths, expected at most "
                        f"{MAX_COMBINATIONS}: make them narrower")
    longest = sum(part.max_tokens if isinstance(part, Span) else len(part) for part in parts)
    if longest > lm.context:
        raise UserError(f"a text has up to {longest} tokens with its holes, expected at most {lm.context}, what the "
                        "model was trained on: cut the text or the holes")
    if isinstance(parts[-1], Span) and parts[-1].min_tokens < parts[-1].max_tokens:
        raise UserError(f"the text ends in a hole of {parts[-1].min_tokens} to {parts[-1].max_tokens} tokens, and no "
                        "text after "
                        f"it tells which length is best: write [MASK:{parts[-1].max_tokens}], an end token may come "
                        "early")
    if lm.config.diffusion.causal and any(isinstance(part, Span) for part in parts[:-1]):
        raise UserError("an autoregressive model does not see what follows a hole: put the one hole at the end of the "
                        "text, or take a block or bidirectional model")
    if not lm.config.diffusion.predicts_first_token and len(parts) == 1:
        raise UserError("this autoregressive model has no beginning token: begin the text with at least one token")
    return [_candidate(lm, number, parts, iter(chosen))
            for chosen in itertools.product(*(range(span.min_tokens, span.max_tokens + 1) for span in spans))]


def _candidate(lm, number: int, parts, lengths) -> Candidate:
    ids, spans = [], []
    for part in parts:
        start = len(ids)
        ids += [lm.special.mask] * next(lengths) if isinstance(part, Span) else part.tolist()
        if isinstance(part, Span):
            spans.append((start, len(ids)))
    return Candidate(number, np.array(ids, np.int32), spans)


def _rows(lm, candidates: list[Candidate]) -> Rows:
    """All but the holes is given, also the masks after the text."""
    width = padded_length(lm, max(len(candidate.ids) for candidate in candidates))
    tokens = np.full((len(candidates), width), lm.special.mask, np.int32)
    given = np.ones(tokens.shape, bool)
    for candidate, row, fixed in zip(candidates, tokens, given):
        row[:len(candidate.ids)] = candidate.ids
        for start, end in candidate.spans:
            fixed[start:end] = False
    last = np.array([candidate.spans[-1][1] for candidate in candidates], np.int32)
    ends = np.array([candidate.spans[-1][0] if candidate.open_end else width for candidate in candidates], np.int32)
    return Rows(tokens, given, last, ends, np.array([candidate.number for candidate in candidates], np.int32))


def _cut_at_end(lm, candidate: Candidate, row_L) -> np.ndarray:
    """The written text; one with a hole at its end stops before the end token."""
    ids = candidate.ids.copy()
    for start, end in candidate.spans:
        ids[start:end] = row_L[start:end]
    if not candidate.open_end:
        return ids
    start = candidate.spans[-1][0]
    ends = np.flatnonzero((ids[start:] == lm.special.end) | (ids[start:] == lm.special.mask))
    return ids[:start + ends[0]] if len(ends) else ids


def _scores(lm, candidates, filled, members: list[int], draws: int, seed: int) -> dict[int, float]:
    """CRITERION of some of the drafts, by index."""
    prompts, continuations, owners = [], [], []
    for i in members:
        borders = [start for start, _ in candidates[i].spans[1:]] + [len(filled[i])]
        for (_, start), end in zip(candidates[i].spans, borders):
            if start < end:
                prompts.append(filled[i][:start])
                continuations.append(filled[i][start:end])
                owners.append(i)
    scored = conditional.score(lm, prompts, continuations, estimator="exact_count", draws=draws, seed=seed,
                               greedy=False, batch=generation.ROWS, noise=continuations) if owners else []
    scores = dict.fromkeys(members, 0.0)
    for owner, score in zip(owners, scored):
        scores[owner] += score.nats
    return scores


def _result(lm, candidate: Candidate, ids, nfe: int, score: float | None) -> Infill:
    def text(start: int, end: int) -> str | None:
        return None if lm.tokenizer is None else decode_continuation(lm.tokenizer, ids[:start], ids[start:end])
    spans = [FilledSpan(start, ids[start:end].tolist(), text(start, end)) for start, end in candidate.spans]
    return Infill(text(0, len(ids)), ids.tolist(), spans, nfe, score)
