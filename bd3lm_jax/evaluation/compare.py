"""Two models on the same documents: the paired difference of their likelihoods, with its interval and p-value.

With the same rows and block size both models are scored on the same masks, so that the luck of the draw cancels as
well. The difference is that of the first model less that of the second: negative where the first is better.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from bd3lm_jax import log, stats
from bd3lm_jax.config import Config
from bd3lm_jax.errors import UserError
from bd3lm_jax.evaluation import estimators
from bd3lm_jax.evaluation.domains import Text, open_text
from bd3lm_jax.evaluation.evaluate import Measured, Opened


def against(run: Opened, text: Text, ours: Measured, other: Opened, which: dict[str, Any], draws: int) -> dict:
    """The "against" object of the `eval` command.

    ours: what `run` scored on `text`. which: arguments of `domains.open_text` that opened it. draws: of a round of
    `other`, which has as many rounds as `ours`. Nats per token where both have one tokenizer, else bits per byte alone.
    Raises UserError if the models score different tokens of a document.

    Returns `workdir`, `estimator`, `step`, `config_sha256` and `wall_s` of the other run, its `bits_per_byte` (and
    `nll`), and: `unit` of the difference, `difference`, `difference_ci95` (documents and draws), `difference_mc_se`
    (draws alone), `p_value` (paired t test over documents that it is 0), `unpaired_se` (the standard error without
    pairing), `same_masks`, and `draws_saved`: further draws that two separate runs would need for the same
    Monte-Carlo error (None where the pairing leaves no error at all).
    """
    config = other.config
    same_corpus = dataclasses.replace(run.config.data, length=config.data.length, layout=config.data.layout)
    other_rows = open_text(dataclasses.replace(config, data=same_corpus), other.tokenizer, **which).rows
    estimator = _counterpart(ours.estimator, config)
    same_rows = other_rows.meta["hash"] == text.rows.meta["hash"]
    same_masks = same_rows and estimator is ours.estimator and estimator.replicates > 1
    theirs = other.evaluator.measure(
        other.params, other_rows, estimator=estimator,
        draws=ours.round_draws if same_masks else draws, rounds=ours.rounds, target=None,
        seed=ours.seed if same_rows else ours.seed + 1)  # other rows: noise of their own
    same_tokens = run.tokenizer.identity == other.tokenizer.identity
    if same_tokens:
        size_N, unit = _same_tokens(ours, theirs), "nats per token"
    else:
        size_N = text.document_bytes() * math.log(2)
        unit = "bits per byte"
    found = _difference(ours, theirs, size_N, same_rows)
    summary = theirs.summary(other_rows)
    gain = _gain(ours, theirs, size_N, found)
    result = {
        "workdir": other.workdir, "estimator": summary["estimator"], "step": other.step,
        "config_sha256": other.config_sha256, "bits_per_byte": summary["bits_per_byte"],
        **({"nll": summary["nll"]} if same_tokens else {}), "unit": unit, "difference": found.value,
        "difference_ci95": [found.low, found.high], "difference_mc_se": found.mc_se, "p_value": found.p_value,
        "unpaired_se": math.hypot(*(_se(side, size_N) for side in (ours, theirs))), "same_masks": same_masks,
        "draws_saved": round(max(gain - 1, 0) * ours.draws) if math.isfinite(gain) else None, "wall_s": theirs.wall_s}
    _show(run.workdir, result, found)
    return result


def _counterpart(estimator: Any, config: Config) -> Any:
    """The same estimator for the other model: `estimator` itself where its masks fit (also with a law of counts that it
    has learnt), else one of its own, or the best one."""
    try:
        other = estimators.make(estimator.name, config)
    except UserError:
        other = estimators.make(estimators.default_estimator(config), config)
    shares = estimator.replicates > 1 and (other.name, other.block_size) == (estimator.name, estimator.block_size)
    return estimator if shares else other


def _same_tokens(ours: Measured, theirs: Measured) -> np.ndarray:
    """Tokens of the documents, which both must score."""
    if not np.array_equal(ours.tokens_N, theirs.tokens_N):
        raise UserError(f"the models score different tokens, {ours.tokens_N.sum():.0f} and {theirs.tokens_N.sum():.0f} "
                        "(an autoregressive model without diffusion.bos leaves out the first of each row): compare "
                        "models that score all of them")
    return ours.tokens_N


def _difference(ours: Measured, theirs: Measured, size_N: np.ndarray, same_rows: bool) -> stats.Interval:
    """Estimate u of one model is paired with estimate u of the other; an exact one is paired with all of them."""
    a, b = ours.rows_UxR, theirs.rows_UxR
    estimates = max(len(a), len(b))
    a, b = (np.broadcast_to(x, (estimates, x.shape[1])) for x in (a, b))
    rows_UxR = a - b if same_rows else np.concatenate([a, -b], axis=1)
    return stats.two_part_interval(ours.documents_UxN - theirs.documents_UxN, rows_UxR, size_N)


def _gain(ours: Measured, theirs: Measured, size_N, found: stats.Interval) -> float:
    """Monte-Carlo variance of the difference of two separate runs over that of the paired one; 1 if both are exact."""
    separate = [stats.monte_carlo_se(side.rows_UxR.T) / size_N.sum() for side in (ours, theirs)
                if len(side.rows_UxR) > 1]
    variance = sum(se**2 for se in separate)
    if found.mc_se == 0:
        return math.inf if variance else 1.0
    return variance / found.mc_se**2


def _se(side: Measured, size_N) -> float:
    interval = stats.two_part_interval(side.documents_UxN, side.rows_UxR, size_N)
    return math.hypot(interval.document_se, interval.mc_se)


def _show(workdir: str, result: dict, found: stats.Interval) -> None:
    masks = "the same masks" if result["same_masks"] else "masks of their own"
    low, high = result["difference_ci95"]
    log.table(f"{workdir} less {result['workdir']}: same documents, {masks}",
              (result["unit"], "95 % interval", "p", "se: documents", "se: draws", "se unpaired"),
              [(f"{result['difference']:+.4f}", f"{low:+.4f} .. {high:+.4f}", f"{result['p_value']:.2g}",
                f"{found.document_se:.5f}", f"{found.mc_se:.5f}", f"{result['unpaired_se']:.5f}")])
    if result["unit"] == "bits per byte":
        log.note("the tokenizers differ: only bits per byte compare")
    if result["draws_saved"]:
        log.note(f"the same masks saved {result['draws_saved']} draws")
