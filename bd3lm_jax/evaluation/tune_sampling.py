"""Which settings to sample with: many of them measured on one trained model, the best ones kept where `sample` finds
them (`settings.py`).

All settings write from the same seeds, in turns. The texts that are judged are of one length (the end token is put
off), since entropy and distinct n-grams depend on it; others end by themselves and show which settings end too early.
Quality is perplexity under a scorer, or, without one, the model's own bound: that flatters settings which follow the
model's favourites, so the scorer is the better judge.
"""

import importlib.metadata
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bd3lm_jax.core import log, plots, stats
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.stats import format_interval
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.evaluation import cache_cost
from bd3lm_jax.evaluation.quality import figures
from bd3lm_jax.evaluation.scorer import BATCH, Scorer
from bd3lm_jax.evaluation.settings import FILE, PREFERENCES
from bd3lm_jax.generation.generation import Sample
from bd3lm_jax.generation.sampling.auto_size import AUTO
from bd3lm_jax.lm import LM, load

EXACT = {"sampler": "first_hitting"}
THRESHOLDS = {"threshold": (0.9, 0.6, 0.3, 0.05), "entropy_bound": (0.1, 1.0, 3.0, 6.0), "factor": (1.0, 2.7)}
TOKENS_A_STEP = {"confidence": (1, 2, 4), "ancestral": (1, 2)}
SURE, BLOCK_CONFIDENCES = {"sampler": "threshold", "threshold": 0.6}, (0.2, 0.3, 0.4)  # of blocks of chosen sizes
SHORT_BLOCK = 32  # of a bidirectional model: written left to right in stretches of so many tokens
MIN_ENTROPY_RATIO = 0.9  # of the exact sampler's: with less a setting is never recommended
MAX_PPL_RATIO = {"balanced": 1.1, "speed": 1.5}  # perplexity against that of the exact sampler, at most
MIN_LENGTH_RATIO = 0.5  # the same of the mean length of texts that end by themselves
END_ROUNDS = 2  # of such texts; the first one also compiles
MAX_LENGTH = 256
CACHE_COST_ROWS = 64  # of the validation split, for the cache in less memory
RULE = (f"quality: the lowest perplexity; balanced, speed: the most tokens a call with at most "
        f"{MAX_PPL_RATIO['balanced']}, {MAX_PPL_RATIO['speed']} times that of the exact sampler (first_hitting); none "
        f"with less than {MIN_ENTROPY_RATIO:.0%} of its entropy or {MIN_LENGTH_RATIO:.0%} of its length where texts "
        "end by themselves")


def tune_sampling(workdir: str, *, scorer: str, rounds: int, texts: int) -> dict[str, Any]:
    """The `bench sampling --workdir` command: measure `candidates`, write the recommended ones to `workdir`.

    scorer: directory of a model with exact likelihood, "" for the model's own bound. texts: of each setting a round.

    Returns what it writes to sampling.json, beside plots/sampling.png: {"bench", "quality", "balanced", "speed" (fields
    of `options.Options`), "rule", "measured" (a row a setting, see `measure`), "cache" (see `cache_cost.nll_cost`),
    "scorer", "length", "texts", "step", "config_sha256" (of the checkpoint that was measured), "device", "versions",
    "wall_s"}. Raises UserError for rounds or texts below 1, a
    directory that cannot be written and a scorer that does not fit.
    """
    began = time.perf_counter()
    for name, value in (("rounds", rounds), ("texts", texts)):
        if value < 1:
            raise UserError(f"{name} is {value}, expected at least 1")
    lm = load(workdir)
    if lm.tokenizer is None:
        raise UserError(f"{workdir} has no tokenizer and no data: the settings of a run directory can be measured")
    corpus = lm.run_config(workdir).data
    assert lm.trained is not None  # what has a corpus is a run
    if not os.access(workdir, os.W_OK):
        raise UserError(f"cannot write in {workdir}, where {FILE} goes: use a copy of the run directory")
    scorer_model = Scorer(load(scorer), scorer, 0) if scorer else None
    length = min(MAX_LENGTH, lm.context)
    rows = measure(lm, candidates(lm), scorer_model, rounds, texts, length)
    rows_of_text = prepare(corpus, "valid", lm.config.block_size, lm.tokenizer)
    result = {"bench": "sampling", **recommend(rows), "rule": RULE, "measured": rows,
              "cache": cache_cost.nll_cost(lm, rows_of_text, CACHE_COST_ROWS, seed=0), "scorer": scorer or None,
              "length": length, "texts": texts * rounds, **lm.trained._asdict(), "device": jax.devices()[0].device_kind,
              "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
              "wall_s": time.perf_counter() - began}
    _show(workdir, result)
    log.save(Path(workdir) / FILE, result)
    draw(Path(workdir) / "plots" / "sampling.png", rows)
    return result


def candidates(lm: LM) -> list[dict[str, Any]]:
    """Settings that make a difference to this model, the exact sampler first: fields of `options.Options`."""
    size = lm.config.block_size
    if lm.config.diffusion.kind == "mixed":
        sizes = [{"block_size": size} for size in lm.config.trained_block_sizes]
        sizes += [{"block_size": AUTO, "block_confidence": value} for value in BLOCK_CONFIDENCES]
        return [EXACT, *({**setting, **size} for setting in (EXACT, SURE) for size in sizes)]
    if size == 1:
        return [EXACT]  # one token a call
    found = [EXACT, *({"sampler": sampler, "threshold": value} for sampler, values in THRESHOLDS.items()
                      for value in values)]
    found += [{"sampler": sampler, "steps": size // tokens} for sampler, numbers in TOKENS_A_STEP.items()
              for tokens in numbers if size % tokens == 0]
    if size >= lm.context and size % SHORT_BLOCK == 0 and size > SHORT_BLOCK:
        found += [{**setting, "block_size": SHORT_BLOCK} for setting in (
            EXACT, {"sampler": "threshold", "threshold": 0.5}, {"sampler": "confidence", "steps": SHORT_BLOCK // 2})]
    return found


def measure(lm: LM, settings: Sequence[dict], scorer: Scorer | None, rounds: int, texts: int,
            length: int) -> list[dict[str, Any]]:
    """A row for each setting; the first one is the exact sampler.

    name, settings, tokens_per_call (tokens over network calls), tokens_per_s (of a batch of `texts`), speedup (to the
    exact sampler, in the same round; both medians over rounds), gen_ppl and gen_ppl_ci95 under the scorer (self_nll and
    self_nll_ci95 in nats a token without one), entropy, entropy_ci95, distinct_1, _2, _3, mean_length (of texts that
    end by themselves, at most `length`), rejected (why it is never recommended, or "") and pareto (of the others, none
    is better in quality and tokens a call).
    """
    log.note(f"{len(settings)} settings: texts that end by themselves")
    ending = [[generate_texts(lm, setting, texts, length, 0, seed) for setting in settings]
              for seed in range(END_ROUNDS)]
    samples, seconds = [[] for _ in settings], np.zeros((rounds, len(settings)))
    for round_ in range(rounds):
        log.note(f"texts of {length} tokens, round {round_ + 1} of {rounds}")
        for i, setting in enumerate(settings):
            started = time.perf_counter()
            samples[i] += generate_texts(lm, setting, texts, length, length, round_)
            seconds[round_, i] = time.perf_counter() - started
    rows = []
    for i, setting in enumerate(settings):
        tokens = sum(len(sample.tokens) for sample in samples[i])
        rows.append({"name": name_of(setting), "settings": setting,
                     "tokens_per_call": tokens / sum(sample.nfe for sample in samples[i]),
                     "tokens_per_s": tokens / rounds / float(np.median(seconds[:, i])),
                     "speedup": float(np.median(seconds[:, 0] / seconds[:, i])), **text_metrics(lm, samples[i], scorer),
                     "mean_length": float(np.mean([len(sample.tokens) for part in ending for sample in part[i]]))})
    for row in rows:
        row["rejected"] = _rejection_reason(row, rows[0])
    for row in rows:
        row["pareto"] = not row["rejected"] and not any(_dominates(other, row) for other in rows)
    return rows


def _rejection_reason(row: dict, exact: dict) -> str:
    """Why a setting is never recommended, in words; "" where it may be."""
    if row["entropy"] < MIN_ENTROPY_RATIO * exact["entropy"]:
        return "low entropy"
    return "ends early" if row["mean_length"] < MIN_LENGTH_RATIO * exact["mean_length"] else ""


def generate_texts(lm: LM, setting: dict, texts: int, length: int, min_length: int, seed: int) -> list[Sample]:
    """Texts from nothing; a model that cannot begin by itself gets the end token to begin with."""
    prompts = None if lm.config.diffusion.predicts_first_token else [[lm.special.end]]
    return lm.generate(prompts, num=texts, length=length, min_length=min_length, seed=seed, **setting)


def text_metrics(lm: LM, samples: Sequence[Sample], scorer: Scorer | None) -> dict[str, Any]:
    """Perplexity under the scorer, or the model's own bound, with entropy and distinct n-grams beside it."""
    if scorer is not None:
        texts = [ids for ids in (scorer.encode(sample.text or "") for sample in samples) if len(ids) > scorer.first]
        found = figures(texts, scorer.nats(texts), scorer.first, scorer.window)
        keys = ["gen_ppl", "gen_ppl_ci95"]
    else:
        texts = np.array([sample.tokens for sample in samples], np.int32)
        nats = np.concatenate([lm.nll(texts[i:i + BATCH]).per_token.sum(1) for i in range(0, len(texts), BATCH)])
        scored = texts.shape[1] - (not lm.config.diffusion.predicts_first_token)
        nll, *interval = stats.ratio_interval(nats, np.full(len(nats), scored))
        found = {"self_nll": nll, "self_nll_ci95": interval, **figures(list(texts), None, 0, None)}
        keys = ["self_nll", "self_nll_ci95"]
    return {key: found[key] for key in (*keys, "entropy", "entropy_ci95", "distinct_1", "distinct_2", "distinct_3")}


def name_of(setting: dict) -> str:
    """{"sampler": "threshold", "threshold": 0.9, "block_size": 32} -> "threshold 0.9, block_size 32"."""
    name = setting["sampler"] + (f" {setting['threshold']:g}" if "threshold" in setting else "")
    return ", ".join([name, *(f"{key} {setting[key]}" for key in ("steps", "block_size", "block_confidence")
                              if key in setting)])


def nll_of(row: dict) -> float:
    """Nats a token by which settings are compared."""
    return math.log(row["gen_ppl"]) if "gen_ppl" in row else row["self_nll"]


def _dominates(row: dict, other: dict) -> bool:
    """Whether a setting that may be recommended is as good in both, and better in one."""
    gains = nll_of(other) - nll_of(row), row["tokens_per_call"] - other["tokens_per_call"]
    return not row["rejected"] and min(gains) >= 0 and max(gains) > 0


def recommend(rows: Sequence[dict]) -> dict[str, dict]:
    """Settings for each preference, by RULE. The first row is the exact sampler."""
    eligible = [row for row in rows if not row["rejected"]]
    chosen = {"quality": min(eligible, key=nll_of)}
    for name, ratio in MAX_PPL_RATIO.items():
        good = [row for row in eligible if nll_of(row) <= nll_of(rows[0]) + math.log(ratio)]
        chosen[name] = max(good, key=lambda row: (row["tokens_per_call"], -nll_of(row)))
    return {name: chosen[name]["settings"] for name in PREFERENCES}


def _show(workdir: str, result: dict[str, Any]) -> None:
    rows = result["measured"]
    by = "gen. PPL" if result["scorer"] else "self NLL"
    log.table(f"{workdir}: {log.pluralize(result['texts'], 'text')} of {result['length']} tokens"
              + (f", scored by {result['scorer']}" if result["scorer"] else ""),
              ("setting", "a call", "tok/s", f"{by} (95 %)", "entropy", "dist. 2", "length"),
              [("* " * row["pareto"] + row["name"] + (f": {row['rejected']}" if row["rejected"] else ""),
                f"{row['tokens_per_call']:.2f}", f"{row['tokens_per_s']:,.0f}", _quality(row), f"{row['entropy']:.2f}",
                f"{row['distinct_2']:.3f}", f"{row['mean_length']:.0f}") for row in rows])
    log.note("* no other is better in both quality and tokens a call; length: mean, where texts end by themselves")
    if not result["scorer"]:
        log.note("self NLL: the model's own bound on its texts, in nats a token; it flatters what follows the model's "
                 "favourites: better give --scorer=DIR")
    if result["cache"]:
        log.table(f"{workdir}: cache in less memory, {CACHE_COST_ROWS} validation rows at most, the same masks",
                  ("cache_dtype", "bytes a token", "nll change", "95 % interval"),
                  [(row["cache_dtype"], f"{row['bytes_per_token']:,}", f"{row['nll_change']:+.6f}",
                    format_interval(row["nll_change_ci95"], "+.6f")) for row in result["cache"]])
    for name in PREFERENCES:
        log.note(f"--prefer={name}: {name_of(result[name])}")
    log.note(f"{RULE}. Written to {Path(workdir) / FILE}, where sample --prefer=... reads it.")


def _quality(row: dict) -> str:
    key, digits = ("gen_ppl", 0) if "gen_ppl" in row else ("self_nll", 2)
    return f"{row[key]:.{digits}f} ({format_interval(row[f'{key}_ci95'], f'.{digits}f')})"


def draw(path: Path, rows: Sequence[dict]) -> Path:
    """Quality against tokens a call; the Pareto-optimal settings are joined, they and the exact sampler are named, and
    what is never recommended is grey."""
    key = "gen_ppl" if "gen_ppl" in rows[0] else "self_nll"
    label = "generative perplexity" if key == "gen_ppl" else "own bound, nats a token"
    figure, axes = plots.new_figure("Speed against quality", "tokens a network call",
                                    f"{label} (H: unigram entropy, nats)")
    named = 0
    for row in sorted(rows, key=lambda row: row["tokens_per_call"]):
        color = "lightgrey" if row["rejected"] else "#e6550d" if row["pareto"] else "#3182bd"
        bars = np.abs(np.array(row[f"{key}_ci95"]) - row[key])[:, None]
        axes.errorbar([row["tokens_per_call"]], [row[key]], yerr=bars, fmt="o", markersize=5, capsize=3, color=color)
        if row["pareto"] or row is rows[0]:
            axes.annotate(f"  {row['name']}, H {row['entropy']:.2f}", (row["tokens_per_call"], row[key]), fontsize=8,
                          va=("top", "bottom")[named % 2])  # neighbours often lie close together
            named += 1
    front = sorted((row["tokens_per_call"], row[key]) for row in rows if row["pareto"])
    axes.plot(*zip(*front), color="#e6550d", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    if key == "gen_ppl":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.25)  # room for the names
    return plots.save(figure, path)
