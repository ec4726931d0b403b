"""Two models on the same documents: the paired difference of their likelihoods, with its interval and p-value.

With the same rows and block size both models are scored on the same masks, so that the luck of the draw cancels as
well. The difference is that of the first model less that of the second: negative where the first is better. Each model
is divided by what it was scored on: rows of other lengths may leave out other tokens.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from bd3lm_jax.config import LMConfig
from bd3lm_jax.core import log, stats
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.stats import Estimates, format_interval, format_number
from bd3lm_jax.data.domains import Text
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.likelihood.evaluate import LikelihoodResult, LoadedRun
from bd3lm_jax.likelihood.options import EstimatorOptions, TextOptions


def against(run: LoadedRun, text: Text, candidate: LikelihoodResult, other: LoadedRun, options: TextOptions,
            draws: int) -> dict:
    """The "against" object of the `eval` command.

    candidate: what `run` scored on `text`, which `options` opened. draws: of a round of `other`, which has as many
    rounds as `candidate`. Nats per token where both have one tokenizer and score the same tokens, else bits per byte.

    Returns `workdir`, `estimator`, `step`, `config_sha256` and `wall_s` of the other run, its `bits_per_byte` (and
    `nll`), and: `unit` of the difference, `difference`, `difference_ci95` (documents and draws), `difference_mc_se`
    (draws alone), `p_value` (paired t test over documents that it is 0), all four None where the bits of the two
    tokenizers do not compare (`comparable`), `unpaired_se` (the standard error without pairing), `same_masks`, and
    `draws_saved`: further draws that two separate runs would need for the same
    Monte-Carlo error (None where the pairing leaves no error at all).
    """
    config = other.config
    same_corpus = dataclasses.replace(run.data, seq_len=other.data.seq_len, packing=other.data.packing)
    other_text = options.open(same_corpus, config.block_size, other.tokenizer, text.convention)
    other_rows = other_text.rows
    estimator = _counterpart(candidate.estimator, config)
    same_rows = other_rows.meta["hash"] == text.rows.meta["hash"]
    same_masks = same_rows and estimator is candidate.estimator and estimator.replicates > 1
    baseline = other.evaluator.measure(other.params, other_rows, EstimatorOptions(
        estimator, candidate.round_draws if same_masks else draws,
        candidate.seed if same_rows else candidate.seed + 1), rounds=candidate.rounds)  # other rows: their own noise
    same_tokenizer, comparable = text.tokenizer == other_text.tokenizer, text.comparable_with(other_text)
    if same_tokenizer and np.array_equal(candidate.tokens_N, baseline.tokens_N):
        sides, unit = (candidate.per_token(), baseline.per_token()), "nats per token"
    else:
        sides, unit = (candidate.per_byte(text.rows), baseline.per_byte(other_rows)), "bits per byte"
    found = difference(*sides, same_rows)
    summary = baseline.summary(other_rows)
    gain = _gain(*sides, found)
    result = {
        "workdir": other.workdir, "estimator": summary["estimator"], "step": other.step,
        "config_sha256": other.config_sha256, "bits_per_byte": summary["bits_per_byte"],
        **({"nll": summary["nll"]} if same_tokenizer else {}), "unit": unit,
        **as_result(found, comparable), "difference_mc_se": found.mc_se if comparable else None,
        "unpaired_se": math.hypot(*(_se(side) for side in sides)), "same_masks": same_masks,
        "draws_saved": round(max(gain - 1, 0) * candidate.draws) if math.isfinite(gain) else None,
        "wall_s": baseline.wall_s
    }
    _show(run.workdir, result, found, same_tokenizer)
    return result


def difference(candidate: Estimates, baseline: Estimates, same_rows: bool) -> stats.Interval:
    """One model less another, document by document; `stats.difference_interval` where the last documents of a text may
    have no scored token in one of them."""
    documents = max(len(side.denominators_N) for side in (candidate, baseline))

    def padded(side: Estimates) -> Estimates:
        absent = documents - len(side.denominators_N)
        return Estimates(np.pad(side.documents_UxN, ((0, 0), (0, absent))), side.rows_UxR,
                         np.pad(side.denominators_N, (0, absent)))

    return stats.difference_interval(padded(candidate), padded(baseline), same_rows)


def as_result(found: stats.Interval, comparable: bool) -> dict[str, Any]:
    """The keys of a difference in results: numbers only where the two sides compare."""
    if not comparable:
        return {"comparable": False, "difference": None, "difference_ci95": None, "p_value": None}
    missing = {"ci95_missing": found.missing} if found.missing else {}
    return {"comparable": True, "difference": found.value, "difference_ci95": [found.low, found.high],
            "p_value": found.p_value, **missing}


def _counterpart(estimator: Any, config: LMConfig) -> Any:
    """The same estimator for the other model: `estimator` itself where its masks fit (also with a law of counts that it
    has learnt), else one of its own, or the best one."""
    try:
        other = estimators.make(estimator.name, config)
    except UserError:
        other = estimators.make(estimators.default_estimator(config), config)
    shares = estimator.replicates > 1 and (other.name, other.block_size) == (estimator.name, estimator.block_size)
    return estimator if shares else other


def _gain(candidate: Estimates, baseline: Estimates, found: stats.Interval) -> float:
    """Monte-Carlo variance of the difference of two separate runs over that of the paired one; 1 if both are exact."""
    separate = [stats.monte_carlo_se(side.rows_UxR.T) / side.denominators_N.sum() for side in (candidate, baseline)
                if len(side.rows_UxR) > 1]
    variance = sum(se**2 for se in separate)
    if found.mc_se == 0:
        return math.inf if variance else 1.0
    return variance / found.mc_se**2


def _se(side: Estimates) -> float:
    interval = stats.two_part_interval(*side)
    return math.hypot(interval.document_se, interval.mc_se)


def _show(workdir: str, result: dict, found: stats.Interval, same_tokenizer: bool) -> None:
    if not result["comparable"]:
        log.note(f"{workdir} and {result['workdir']} do not compare: the tokenizers differ, and not both give the text "
                 "back, so that their bits per byte are not of the same information")
        return
    masks = "the same masks" if result["same_masks"] else "masks of their own"
    log.table(f"{workdir} less {result['workdir']}: same documents, {masks}",
              (result["unit"], "95 % interval", "p"),
              [(f"{result['difference']:+.4f}", format_interval(result["difference_ci95"], "+.4f"),
                format_number(result["p_value"], ".2g"))])
    log.note(f"its standard error: {format_number(found.document_se, '.5f')} by the choice of documents, "
             f"{found.mc_se:.5f} by the draws; unpaired {format_number(result['unpaired_se'], '.5f')}")
    if found.missing:
        log.note(found.missing)
    if not same_tokenizer:
        log.note("the tokenizers differ: only bits per byte compare")
    elif result["unit"] == "bits per byte":
        log.note("the models score different tokens of these documents: bits per byte of those that each scores")
    if result["draws_saved"]:
        log.note(f"the same masks saved {log.pluralize(result['draws_saved'], 'draw')}")
