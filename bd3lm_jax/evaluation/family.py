"""Runs of different objectives side by side: one bound for all where they have it, their own losses, speed and texts.

    from bd3lm_jax.evaluation.family import compare
    compare(["runs/ar", "runs/tiny", "runs/sedd"], split="test", scorer="runs/ar", texts=32, draws=1, seed=0)

Losses of different objectives are no likelihoods that could be compared. What can be is the bound that every network
gives which predicts masked tokens, however it was trained, under uniform counts ("exact_count"; for autoregression the
likelihood itself), and for the others the bound of their own objective, if it is one.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core import log, plots
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.stats import format_interval
from bd3lm_jax.data.domains import Text
from bd3lm_jax.evaluation import suite
from bd3lm_jax.evaluation.scorer import Scorer
from bd3lm_jax.evaluation.suite import Scored
from bd3lm_jax.evaluation.titles import run_titles
from bd3lm_jax.evaluation.tune_sampling import generate_texts, text_metrics
from bd3lm_jax.likelihood import estimators
from bd3lm_jax.likelihood.evaluate import open_run
from bd3lm_jax.likelihood.options import EstimatorOptions, TextOptions
from bd3lm_jax.lm import LM


def compare(workdirs: Sequence[str], *, split: str, scorer: str, texts: int, draws: int,
            seed: int) -> list[dict[str, Any]]:
    """A row for each run, measured on a split of its corpus.

    scorer: directory of a model with exact likelihood that judges `texts` texts of each run; "" for no texts.

    Returns rows of {"name", "title" (for people), "workdir", "kind", "block_size", "params", "step", "first_token" (the
    convention, which is one for all: "skip" if a run cannot predict it); "estimator" and, in bits per byte,
    "bound" with "bound_ci95" (None without a bound), "difference" and "difference_ci95" to the first run, paired by
    document; "native" and "native_ci95" (the bound of its own objective, where that is another); "train_loss" (the
    objective as optimised, mean of the last tenth of training), "train_tokens_per_s" (median while training);
    "gen_ppl", "gen_ppl_ci95", "entropy", "entropy_ci95" and "tokens_per_call" of its texts (None without), "no_texts"
    (why)}. The intervals are over documents and draws (texts), not over trainings. Raises UserError for runs of
    different corpora and for a scorer that does not fit.
    """
    scorer_model = Scorer(_model(scorer), scorer, 0) if scorer else None
    configs = [rundir.read(workdir)[0] for workdir in workdirs]
    options = TextOptions(split=split)
    convention = options.convention_for(configs)
    rows, first = [], None
    for workdir, title in zip(workdirs, run_titles(configs)):
        began = time.perf_counter()
        run = open_run(workdir)
        text = options.open(run.data, run.config.block_size, run.tokenizer, convention)
        row = {"name": Path(workdir).name, "title": title, "workdir": str(workdir), "kind": run.config.diffusion.kind,
               "block_size": run.config.block_size, "step": run.step, "params": _size(run.params),
               "first_token": convention.first_token}
        row |= _bounds(run, text, draws, seed)
        scored = row.pop("scored")
        if scored is not None:
            if first is None:
                first = scored
            elif text.corpus.fingerprint() != first.text.corpus.fingerprint():
                raise UserError(f"{workdir} is measured on {text.name}, {workdirs[0]} on {first.text.name}: compare "
                                "runs of one corpus")
            found = suite.difference(scored, first)
            row |= {"difference": found["difference"], "difference_ci95": found["difference_ci95"]}
        row |= _training(workdir) | _texts(run, scorer_model, texts, seed)
        log.note(f"{row['name']}: measured in {time.perf_counter() - began:.0f} s")
        rows.append(row)
    return rows


def _model(workdir: str) -> LM:
    from bd3lm_jax.lm import load

    return load(workdir)


def _size(params) -> int:
    import jax

    return sum(x.size for x in jax.tree.leaves(params))


def _bounds(run, text: Text, draws: int, seed: int) -> dict[str, Any]:
    """The common bound, and that of the run's own objective where it is another."""
    common, objective = estimators.default_estimator(run.config), run.config.diffusion
    row: dict[str, Any] = dict.fromkeys(("estimator", "bound", "bound_ci95", "difference", "difference_ci95", "native",
                                         "native_ci95", "scored"))
    for name in dict.fromkeys([common, *["native"] * _has_own_bound(objective)]):
        measured = run.evaluator.measure(run.params, text.rows, EstimatorOptions(name, draws, seed))
        result = text.describe(measured)
        if name == common:
            row |= {"estimator": name, "bound": result["bits_per_byte"], "bound_ci95": result["bits_per_byte_ci95"],
                    "scored": Scored(run.workdir, text, measured, result)}
        else:
            row |= {"native": result["bits_per_byte"], "native_ci95": result["bits_per_byte_ci95"]}
    return row


def _has_own_bound(objective: Any) -> bool:
    """Whether its own bound is another than the common one and can be measured on any text."""
    return objective.bound is not None and not (objective.exact_likelihood or objective.extra_batch_keys or
                                                objective.kind == "masked")


def _training(workdir: str) -> dict[str, float | None]:
    lines = log.read_metrics(workdir)
    losses, rates = ([line[key] for line in lines if line.get(key) is not None]
                     for key in ("train/loss", "train/tokens_per_s"))
    last = max(len(losses) // 10, 1)
    return {"train_loss": float(np.mean(losses[-last:])) if losses else None,
            "train_tokens_per_s": float(np.median(rates)) if rates else None}


def _texts(run, scorer_model: Scorer | None, texts: int, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(("gen_ppl", "gen_ppl_ci95", "entropy", "entropy_ci95", "tokens_per_call",
                                         "no_texts"))
    if scorer_model is None:
        return row
    lm = LM(run.config, run.params, run.tokenizer, run.evaluator.model, run.data.seq_len)
    try:
        samples = generate_texts(lm, {}, texts, lm.context, lm.context, seed)
    except UserError as error:
        return row | {"no_texts": str(error)}
    found = text_metrics(lm, samples, scorer_model)
    calls = sum(sample.nfe for sample in samples)
    return row | {key: found[key] for key in ("gen_ppl", "gen_ppl_ci95", "entropy", "entropy_ci95")} | {
        "tokens_per_call": sum(len(sample.tokens) for sample in samples) / calls}


def show(rows: Sequence[dict[str, Any]], scorer: str) -> None:
    """The table for people."""
    log.table("bits per byte, 95 % intervals over documents and draws",
              ("run", "objective", "bound", "less the first's", "own bound"), [_likelihood(row) for row in rows])
    log.table(f"training, and texts scored by {scorer or 'nobody'}",
              ("run", "train loss", "tok/s", "gen. PPL", "entropy", "tokens a call"), [_texts_of(row) for row in rows])
    log.note("bound: under uniform counts, the likelihood itself for autoregression and block size 1. Intervals do not "
             "cover what another training with another seed would give. tok/s: while training; runs that were trained "
             "beside others do not compare.")


def _likelihood(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["title"], row["kind"], _estimate(row, "bound", ".3f"), _estimate(row, "difference", "+.3f"),
            _estimate(row, "native", ".3f"))


def _texts_of(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["title"], _number(row["train_loss"], ".3f"), _number(row["train_tokens_per_s"], ",.0f"),
            _estimate(row, "gen_ppl", ".0f"), _estimate(row, "entropy", ".2f"), _number(row["tokens_per_call"], ".2f"))


def _estimate(row: dict[str, Any], key: str, shape: str) -> str:
    return "" if row[key] is None else f"{row[key]:{shape}} ({format_interval(row[f'{key}_ci95'], shape)})"


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else format(value, shape)


def draw(path: str | Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Bounds with their intervals, a line a run, the best first: common ones, and those of the objectives themselves.
    """
    rows = sorted((row for row in rows if row["bound"] is not None), key=lambda row: row["bound"])
    series = {"bound under uniform counts": "bound", "bound of its own objective": "native"}
    points = {label: {row["title"]: (row[key], *row[f"{key}_ci95"]) for row in rows if row[key] is not None}
              for label, key in series.items()}
    return plots.intervals(path, "The same text under one bound: which objective learnt most?",
                           {label: found for label, found in points.items() if found}, "bits per byte")
