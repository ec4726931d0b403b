"""Zero-shot suite: models measured on every named text that is there; one table, one plot, paired differences."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bd3lm_jax.checkpoints import hf, rundir
from bd3lm_jax.checkpoints.restore import published_config
from bd3lm_jax.config import DataConfig, LMConfig
from bd3lm_jax.core import jax_settings, log, plots
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.stats import format_interval
from bd3lm_jax.data.domains import DOMAINS, OWN, MissingText, Text
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.likelihood import compare
from bd3lm_jax.likelihood.evaluate import LikelihoodResult, LoadedRun, open_run
from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions, TextOptions

PLOT = "domains.png"
BETTER, WORSE, UNCLEAR = "better", "worse", "not told apart"
INCOMPARABLE = "not comparable"  # tokenizers differ, and not both give the text back


class Scored(NamedTuple):
    """A run on one text. result: the object of the `eval` command."""

    workdir: str
    text: Text
    measured: LikelihoodResult
    result: dict[str, Any]


@jax_settings.pinned()
def evaluate_suite(workdirs: Sequence[str], *, text: TextOptions = TextOptions(),
                   estimator: EstimatorOptions = EstimatorOptions(),
                   model: ModelOptions = ModelOptions()) -> dict[str, Any]:
    """The `eval --data=all` command: every model on the packaged texts and on those that `text.data_dir` or TFDS hold.

    workdirs: runs, and published checkpoints, which get rows of `model.length` tokens (`restore.restore_published`).
    One run is measured on its own corpus too. Of several, each is compared with the first, document by document, in
    bits per byte: tokenizers may differ. `text.data` is not used.

    Returns {"domains": results of `eval` with "workdir" and, from the second run on, "against"; "skipped": {name: why};
    "plot": path, in the first run directory, or in the working directory if there is none; "wall_s"}. Raises UserError
    before anything is measured.
    """
    began = time.perf_counter()
    if len(set(workdirs)) < len(workdirs):
        raise UserError(f"--workdir={','.join(workdirs)} names a run twice")
    paths = [hf.local(workdir) for workdir in workdirs]
    own = [path for path in paths if not hf.is_published(path)]
    length = model.length
    if length and len(own) == len(paths):
        raise UserError(f"--length={length} is for published checkpoints: runs have the length they were trained with")
    runs = [
        _own_rows(path) if path in own else published_config(path, hf.from_hf_config(path), length) for path in paths
    ]
    convention = text.convention_for([config for config, *_ in runs])
    skipped, texts = {}, {}
    for workdir, (config, data, tokenizer) in zip(workdirs, runs):
        for name in _names(runs, len(own)):
            try:
                opened = dataclasses.replace(text, data=name).open(data, config.block_size, tokenizer, convention)
                texts.setdefault(workdir, []).append(opened)
            except UserError as error:
                if name != OWN and not isinstance(error, MissingText):
                    raise
                skipped[name or data.source] = str(error)
    for name, reason in skipped.items():
        log.note(f"skipped {name}: {reason}")
    if not texts:
        raise UserError("none of the texts is here: see the lines above")
    scored = [_score(open_run(path, dataclasses.replace(model, length=0 if path in own else length))
                     ._replace(workdir=workdir).for_estimator(estimator.estimator), texts[workdir], estimator)
              for workdir, path in zip(workdirs, paths)]
    for others in scored[1:]:
        for first, other in zip(scored[0], others):
            other.result["against"] = difference(other, first)
    results = [part.result for parts in scored for part in parts]
    show(results)
    plot = plots.intervals(Path(own[0], "plots", PLOT) if own else Path(PLOT), "Zero-shot likelihood by text",
                           points(results), "bits per byte")
    return {"domains": results, "skipped": skipped, "plot": str(plot), "wall_s": time.perf_counter() - began}


def _own_rows(path: str) -> tuple[LMConfig, DataConfig, Tokenizer]:
    config, tokenizer = rundir.read(path)
    return config, config.data, tokenizer


def _names(runs, own_corpora: int) -> list[str]:
    """The run's own corpus, unless there are several models, or it has none or one of the domains; then the domains."""
    own = [] if len(runs) > 1 or not own_corpora or runs[0][1].source in DOMAINS else [OWN]
    return [*own, *DOMAINS]


def _score(run: LoadedRun, texts: Sequence[Text], estimator: EstimatorOptions) -> list[Scored]:
    scored = []
    for text in texts:
        log.note(f"{run.workdir}: {text.name}, {log.pluralize(len(text.rows), 'row')}")
        measured = run.evaluator.measure(run.params, text.rows, estimator)
        result = {**text.describe(measured), **run.evaluator.autoregressive_summary(run.params, text.rows),
                  "workdir": run.workdir, "step": run.step,
                  "config_sha256": run.config_sha256}
        scored.append(Scored(run.workdir, text, measured, result))
    return scored


def difference(candidate: Scored, baseline: Scored) -> dict[str, Any]:
    """Bits per byte of one run less those of another on the same documents, paired by document.

    Negative where the first is better. Numbers are None where the bits of the two tokenizers do not compare.
    """
    same_rows = candidate.text.rows.meta["hash"] == baseline.text.rows.meta["hash"]
    sides = [side.measured.per_byte(side.text.rows) for side in (candidate, baseline)]
    found = compare.difference(sides[0], sides[1], same_rows)
    return {"workdir": baseline.workdir, "unit": "bits per byte",
            **compare.as_result(found, candidate.text.comparable_with(baseline.text))}


def points(results: Sequence[dict]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """{run: {title of the text: (bits per byte, low, high)}}."""
    found = {}
    for result in results:
        run = found.setdefault(Path(result["workdir"]).name, {})
        run[title(result["data"])] = (result["bits_per_byte"], *result["bits_per_byte_ci95"])
    return found


def title(data: str) -> str:
    """What a text is called in tables."""
    return DOMAINS[data].title if data in DOMAINS else data


def show(results: Sequence[dict]) -> None:
    """The table for people: a line a text and run, the runs of a text under each other."""
    columns = ("text", "run", "documents", "tokens", "nats/token", "perplexity", "bits/byte", "95 % interval",
               "PPL a word", "bits/byte less the first run's")
    order = list(dict.fromkeys(result["data"] for result in results))
    lines = [_line(result) for data in order for result in results if result["data"] == data]
    compared = any("against" in result for result in results)
    log.table(f"{_convention_title(results[0])}", columns if compared else columns[:-1],
              [line if compared else line[:-1] for line in lines])


def _convention_title(result: dict) -> str:
    cut = "independent rows" if result["chunks"] == "independent" else f"windows every {result['stride']} tokens"
    words = {"predict": "predicted", "count": "counted", "skip": "given"}
    return (f"Zero-shot: {cut} of {result['length']} tokens, first tokens {words[result['first_token']]}, ends of "
            f"documents {words[result['end_token']]}")


def _line(result: dict) -> list[str]:
    word_ppl = f"{result['word_ppl']:.1f}" if "word_ppl" in result else ""
    return [title(result["data"]), Path(result["workdir"]).name, str(result["documents"]), str(result["tokens"]),
            f"{result['nll']:.4f}", f"{result['ppl']:.2f}", f"{result['bits_per_byte']:.4f}",
            format_interval(result["bits_per_byte_ci95"], ".4f"), word_ppl, _verdict(result.get("against"))]


def _verdict(against: dict | None) -> str:
    """A difference counts where its interval leaves out 0, and the two sides compare."""
    if against is None:
        return ""
    if not against["comparable"]:
        return INCOMPARABLE
    low, high = against["difference_ci95"]
    verdict = BETTER if high < 0 else WORSE if low > 0 else UNCLEAR
    return f"{against['difference']:+.4f} ({format_interval((low, high), '+.4f')}) {verdict}"
