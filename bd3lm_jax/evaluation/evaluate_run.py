"""The likelihood of one split under a run, and what another run makes of the same documents."""

import dataclasses
from typing import Any

from bd3lm_jax.checkpoints.hf import is_published, local
from bd3lm_jax.core import jax_settings, log
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.stats import format_interval, format_number
from bd3lm_jax.likelihood import compare, estimators
from bd3lm_jax.likelihood.estimators import default_estimator
from bd3lm_jax.likelihood.evaluate import open_run
from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions, TextOptions


@jax_settings.pinned()
def evaluate_run(workdir: str, *, text: TextOptions = TextOptions(), estimator: EstimatorOptions = EstimatorOptions(),
                 model: ModelOptions = ModelOptions(), baseline: str = "") -> dict[str, Any]:
    """The `eval` command: likelihood of a text under a checkpoint of a run, by default the newest.

    baseline: another run whose newest checkpoint to compare with on the same documents, or "" (see `compare.py`).
    Published checkpoints have no corpus of their own: they need `text.data`.
    """
    paths = {name: local(name) for name in (workdir, baseline) if name}
    published_paths = [name for name, path in paths.items() if is_published(path)]
    if workdir in published_paths and not text.data:
        raise UserError(f"{workdir} is a published checkpoint, which brings no corpus: give --data=austen or another "
                        "text")
    if model.length and not published_paths:
        raise UserError(f"--length={model.length} is for published checkpoints: {workdir} has the length it was "
                        "trained with")
    run = open_run(paths[workdir], model)._replace(workdir=workdir).for_estimator(estimator.estimator)
    estimators.make(estimator.estimator or default_estimator(run.config), run.config)  # refuse before a text is read
    newest = dataclasses.replace(model, block_size=0, step="latest")
    other = open_run(paths[baseline], newest)._replace(workdir=baseline) if baseline else None
    convention = text.convention_for([side.config for side in (run, other) if side is not None])
    scored = text.open(run.data, run.config.block_size, run.tokenizer, convention)
    measured = run.evaluator.measure(run.params, scored.rows, estimator)
    result = {**scored.describe(measured), **run.evaluator.autoregressive_summary(run.params, scored.rows),
              "step": run.step, "config_sha256": run.config_sha256}
    show(workdir, f"{scored.name}, {scored.split}", result, measured.nll_by_count)
    if other is not None:
        result["against"] = compare.against(run, scored, measured, other, text, estimator.draws)
        result["wall_s"] += result["against"].pop("wall_s")
    return result


def show(workdir: str, text: str, result: dict, by_count: dict) -> None:
    """Tables for people: the likelihood with both parts of its error, and by masked tokens of a block."""
    figures = [("nats/token", "nll", ".4f"), ("perplexity", "ppl", ".2f"), ("bits/byte", "bits_per_byte", ".4f")]
    if "ar_nll" in result:
        figures += [(f"AR mode, {name}", f"ar_{key}", form) for name, key, form in figures]
    log.table(f"{workdir}, {text}: {log.pluralize(result['documents'], 'document')}, {result['tokens']} tokens, "
              f"{result['estimator']}, {log.pluralize(result['draws'], 'draw')}", ("", "value", "95 % interval"),
              [(name, format_number(result[key], form), format_interval(result[f"{key}_ci95"], form))
               for name, key, form in figures])
    log.note(f"standard error of nats/token: {format_number(result['nll_document_se'], '.5f')} by the choice of "
             f"documents, {result['nll_mc_se']:.5f} by the draws")
    if "ci95_missing" in result:
        log.note(result["ci95_missing"])
    if 1 < len(by_count) <= 32:
        log.table("nats per masked token, by masked tokens in the block", [str(k) for k in by_count],
                  [[f"{nll:.3f}" for nll in by_count.values()]])
