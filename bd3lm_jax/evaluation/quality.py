"""Quality of generated texts: perplexity under a scorer, never without the entropy, beside real text of equal lengths.

A low perplexity alone is no quality: a text that repeats one phrase has the lowest of all. Entropy, distinct n-grams
and repetition say so, and the same figures of real text say what is usual at that length.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bd3lm_jax.core import jax_settings, log, plots, stats
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.paths import scheme_of
from bd3lm_jax.core.stats import format_interval, ppl_of
from bd3lm_jax.data import corpora, textmetrics
from bd3lm_jax.evaluation.scorer import Scorer, Words
from bd3lm_jax.generation import sample_files
from bd3lm_jax.lm import load

LOW_ENTROPY = 4.0  # nats of the unigrams of a text: below it BD3-LM calls a sample degenerate
NO_REFERENCE = "none"
REFERENCE_DOCUMENTS = 20_000  # of the real text that are read, at most
AVERAGING = {"gen_ppl": "exp(nats of all texts / tokens of all texts)",
             "gen_ppl_sample_mean": "arithmetic mean of exp(nats / tokens) of each text",
             "intervals": "95 %, over texts"}


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """How texts are judged.

    scorer: directory of a causal model, "" for none: then words are counted and there is no perplexity. weights: of
    the scorer, "ema" or "params". reference: "" for the scorer's own corpus (`split` of it), "none", or a file as for
    samples. stride: of the windows over long texts, in tokens, 0 for half the context. max_tokens: what of each text
    counts, 0 for all. mauve: compute MAUVE as well. plot: where to draw several paths, "" for quality.png beside the
    first.
    """

    scorer: str = ""
    weights: str = "ema"
    split: str = "test"
    reference: str = ""
    stride: int = 0
    max_tokens: int = 0
    mauve: bool = False
    plot: str = ""


@jax_settings.pinned()
def evaluate_samples(paths: Sequence[str], options: QualityOptions) -> dict[str, Any]:
    """The `eval --samples` command: figures of the texts in each path (see `sample_files.read`).

    Returns {"scorer", "unit", "window", "stride", "max_tokens", "first_token", "averaging", "rows": [`figures` with
    "name", "path", "block_size", "nfe_per_token", "stops", "mauve", "reference"], "reference", "plot", "wall_s"}.
    Raises UserError if a path holds no text, and for a scorer that does not fit.
    """
    began = time.perf_counter()
    files = [sample_files.read(path) for path in paths]
    scorer, max_tokens = options.scorer, options.max_tokens
    tokens = Scorer(load(scorer, options.weights), scorer, options.stride) if scorer else Words()
    real, source = _real_texts(tokens, options.reference, options.split)
    rows = [_row(file, name, tokens, real, max_tokens, options.mauve)
            for file, name in zip(files, sample_files.names(files))]
    for note in dict.fromkeys(row.pop("mauve_note") for row in rows):
        if note:
            log.note(note)
    settings = {"scorer": scorer or None, "unit": tokens.unit, "window": tokens.window, "stride": tokens.stride,
                "max_tokens": max_tokens or None, "first_token": "skip" if tokens.first else "predict",
                "averaging": AVERAGING}
    show(rows, settings, source)
    plot_path = _save_plot(options.plot or _beside(paths[0]), rows) if len(rows) > 1 and scorer else None
    return {**settings, "rows": rows, "reference": source, "plot": plot_path, "wall_s": time.perf_counter() - began}


def figures(texts: Sequence[np.ndarray], nats: Sequence[np.ndarray] | None, first: int, window: int | None) -> dict:
    """What the tokens (ids [n], one or more) and their nats (None: not scored; the first `first` do not count) say.

    Returns samples, tokens, gen_ppl and gen_ppl_sample_mean with _ci95 (AVERAGING says what they are), entropy (mean
    of the unigram entropies of the texts, nats) with its interval, entropy_below_4 (share of texts), distinct_1, _2
    and _3 (of all texts together), repeated_4grams (share of tokens inside a 4-gram that occurs again in its text),
    longest_repeat (tokens of the longest passage that occurs twice in a text), length_median, length_max, and, where a
    text fills two windows, by_position.
    """
    sizes = np.array([len(ids) for ids in texts])
    entropies = np.array([textmetrics.entropy_of_tokens(ids) for ids in texts])
    entropy, *interval = stats.ratio_interval(entropies, np.ones(len(texts)))
    result: dict[str, Any] = {"samples": len(texts), "tokens": int(sizes.sum())}
    if nats is not None:
        result |= perplexity(np.array([x.sum() for x in nats]), sizes - first)
    result |= {
        "entropy": entropy, "entropy_ci95": interval, "entropy_below_4": float(np.mean(entropies < LOW_ENTROPY)),
        **{f"distinct_{n}": textmetrics.distinct(texts, n) for n in (1, 2, 3)},
        "repeated_4grams": sum(textmetrics.repeated_tokens(ids, 4) for ids in texts) / int(sizes.sum()),
        "longest_repeat": max(textmetrics.longest_repeat(ids) for ids in texts),
        "length_median": float(np.median(sizes)), "length_max": int(sizes.max())}
    if nats is not None and window is not None and sizes.max() >= 2 * window:
        result["by_position"] = by_position(texts, nats, first, window)
    return result


def perplexity(nats_N: np.ndarray, tokens_N: np.ndarray) -> dict[str, Any]:
    """gen_ppl, weighted by tokens, and gen_ppl_sample_mean of texts, each with its 95 % interval over texts."""
    mean, low, high, *_ = stats.two_part_interval(nats_N[None], nats_N[None], tokens_N).non_negative()
    ppl, ppl_low, ppl_high = stats.ratio_interval(np.exp(np.minimum(nats_N / tokens_N, 700)), np.ones(len(nats_N)))
    return {"gen_ppl": ppl_of(mean), "gen_ppl_ci95": [ppl_of(low), ppl_of(high)], "gen_ppl_sample_mean": ppl,
            "gen_ppl_sample_mean_ci95": [float(np.maximum(ppl_low, 1)), ppl_high]}  # no perplexity is below 1


def by_position(texts: Sequence[np.ndarray], nats: Sequence[np.ndarray], first: int, window: int) -> list[dict]:
    """Does a long text decay? gen_ppl and mean entropy of the tokens [0, window), [window, 2 window), ... of the texts.

    A text counts where it fills the stretch; a stretch that none fills is left out.
    """
    found = []
    for start in range(0, max(len(ids) for ids in texts) - window + 1, window):
        stretch = slice(start, start + window)
        inside = [(ids[stretch], x[stretch]) for ids, x in zip(texts, nats) if len(ids) >= stretch.stop]
        scored = np.full(len(inside), window - (first if start == 0 else 0))
        measured = perplexity(np.array([x.sum() for _, x in inside]), scored)
        found.append({"start": start, "stop": stretch.stop, "samples": len(inside), "gen_ppl": measured["gen_ppl"],
                      "gen_ppl_ci95": measured["gen_ppl_ci95"],
                      "entropy": float(np.mean([textmetrics.entropy_of_tokens(ids) for ids, _ in inside]))})
    return found


def _row(file: sample_files.Texts, name: str, tokens: Any, real: Sequence[str] | None, max_tokens: int,
         mauve: bool) -> dict[str, Any]:
    encoded = [tokens.encode(text)[:max_tokens or None] for text in file.texts]
    texts = [ids for ids in encoded if len(ids) > tokens.first]
    if not texts:
        raise UserError(f"{file.path}: none of {len(encoded)} texts has a {tokens.unit[:-1]} to score")
    row = {"name": name, "path": file.path, "block_size": file.block_size, "nfe_per_token": file.nfe_per_token,
           "stops": file.stops, "empty": len(encoded) - len(texts),
           **figures(texts, tokens.nats(texts), tokens.first, tokens.window)}
    same_lengths = None if real is None else cut_to_lengths([len(ids) for ids in texts], real, tokens)
    row["reference"] = None if same_lengths is None else figures(same_lengths, tokens.nats(same_lengths), tokens.first,
                                                                 tokens.window)
    row["mauve"], row["mauve_note"] = None, ""
    if mauve:
        row["mauve"], row["mauve_note"] = _mauve(texts, same_lengths, tokens)
    return row


def _real_texts(tokens: Any, reference: str, split: str) -> tuple[list[str] | None, str | None]:
    """Documents to compare with, and what they are; None and None where there are none."""
    if reference == NO_REFERENCE or (not reference and tokens.unit == "words"):
        return None, None
    if reference:
        documents = [text for text in sample_files.read(reference).texts if text.strip()]
        if not documents:
            raise UserError(f"--reference={reference} holds no text that is not blank")
        return documents, reference
    data = tokens.lm.data
    if data is None:
        log.note("no real text beside the samples: the scorer brings no corpus; use --reference=FILE")
        return None, None
    try:
        documents = list(itertools.islice(corpora.load_documents(data, split), REFERENCE_DOCUMENTS))
    except UserError as error:
        log.note(f"no real text beside the samples: {error}; use another --split, or --reference=FILE")
        return None, None
    return documents, f"{data.source}, {split}"


def cut_to_lengths(sizes: Sequence[int], documents: Sequence[str], tokens: Any) -> list[np.ndarray]:
    """Tokens of real text, one piece of each size: it begins with a document and goes on with the next ones.

    The beginnings are spread evenly over the documents. A piece is shorter only if all documents are.
    """
    pieces = []
    for k, size in enumerate(sizes):
        begin, parts = k * len(documents) // len(sizes), []
        for document in itertools.chain(documents[begin:], documents[:begin]):
            parts += [tokens.encode(document), tokens.separator]
            if sum(map(len, parts)) >= size:
                break
        pieces.append(np.concatenate(parts)[:size].astype(np.int64))
    return pieces


def _mauve(texts, same_lengths, tokens) -> tuple[float | None, str]:
    """MAUVE of texts against real ones (Pillutla et al. 2021, arXiv 2102.01454), or None and why not."""
    if same_lengths is None or tokens.unit == "words":
        return None, "no MAUVE: it needs a scorer and real text to compare with"
    try:
        import mauve  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None, "no MAUVE: pip install mauve-text torch transformers"
    real, written = ([tokens.lm.tokenizer.decode(ids) for ids in side] for side in (same_lengths, texts))
    try:
        return float(mauve.compute_mauve(p_text=real, q_text=written, verbose=False).mauve), ""
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # its own network could not be had
        return None, f"no MAUVE: {' '.join(str(error).split())}"


def _beside(path: str) -> Path:
    if scheme_of(path):
        return Path("quality.png")
    return Path(path) / "plots" / "quality.png" if Path(path).is_dir() else Path(path).parent / "quality.png"


def show(rows: Sequence[dict], settings: dict[str, Any], source: str | None) -> None:
    """Tables for people: perplexity beside entropy, then diversity and lengths; real text under each row."""
    lines = []
    for row in rows:
        lines += [row] if row["reference"] is None else [row, row["reference"] | {"name": "  real"}]
    unit = settings["unit"]
    title = (f"{unit} of {settings['scorer']}, windows of {settings['window']} every {settings['stride']}"
             if settings["scorer"] else "no --scorer: words, no perplexity")
    title += f", first {settings['max_tokens']} {unit}" if settings["max_tokens"] else ""
    log.table(f"{title}; real text: {source or 'none'}",
              ("text", "texts", "gen. PPL (95 %)", "mean PPL", "entropy", "below 4", "NFE"),
              [(line["name"], line["samples"], *_perplexities(line), f"{line['entropy']:.2f}",
                f"{line['entropy_below_4']:.0%}", _number(line.get("nfe_per_token"))) for line in lines])
    log.table(f"distinct n-grams, {unit} in repeated 4-grams, longest repeat, {unit} of a text",
              ("text", "distinct 1", "2", "3", "repeated", "longest", "median, max", "empty"),
              [(line["name"], *(f"{line[f'distinct_{n}']:.3f}" for n in (1, 2, 3)), f"{line['repeated_4grams']:.1%}",
                line["longest_repeat"], f"{line['length_median']:g}, {line['length_max']}", line.get("empty", ""))
               for line in lines])
    log.note("gen. PPL: of all tokens; mean PPL: mean of the texts' own. Below 4: texts with an entropy under 4 nats, "
             "among them all of fewer than 55 tokens. Compare at equal lengths: with real text.")


def _perplexities(line: dict) -> tuple[str, str]:
    if "gen_ppl" not in line:
        return "", ""
    ppl, mean = (f"{x:.1f}" if x < 100 else f"{x:.0f}" for x in (line["gen_ppl"], line["gen_ppl_sample_mean"]))
    return f"{ppl} ({format_interval(line['gen_ppl_ci95'], '.1f' if line['gen_ppl'] < 100 else '.0f')})", mean


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _save_plot(path: str | Path, rows: Sequence[dict]) -> str | None:
    try:
        plot_path = draw(path, rows)
    except OSError as error:  # the figures are worth more than their picture
        log.note(f"no plot: cannot write {path}: {error.strerror or error}; use --plot=FILE.png")
        return None
    return None if plot_path is None else str(plot_path)


def draw(path: str | Path, rows: Sequence[dict]) -> Path | None:
    """Generative perplexity against network calls a token, coloured by block size; None if no row has both."""
    plottable = [row for row in rows if row["nfe_per_token"] is not None]
    if not plottable:
        return None
    figure, axes = plots.new_figure("Quality against network calls", "network calls a token",
                                    "generative perplexity (H: unigram entropy, nats)")
    for size in sorted({row["block_size"] for row in plottable}, key=lambda size: (size is None, size)):
        points = [row for row in plottable if row["block_size"] == size]
        ppl = np.array([row["gen_ppl"] for row in points])
        bars = np.abs(np.array([row["gen_ppl_ci95"] for row in points]).T - ppl)
        axes.errorbar([row["nfe_per_token"] for row in points], ppl, yerr=bars, fmt="o", capsize=3, markersize=5,
                      label="block size not known" if size is None else f"block size {size}")
        for row in points:
            axes.annotate(f" {row['name']}, H {row['entropy']:.2f}", (row["nfe_per_token"], row["gen_ppl"]), fontsize=8)
    real = next((row["reference"] for row in plottable if row["reference"]), None)
    if real:
        axes.axhline(real["gen_ppl"], color="black", linestyle="--", linewidth=1,
                     label=f"real text, H {real['entropy']:.2f}")
    axes.set_yscale("log")
    axes.margins(x=0.25)  # room for the names
    axes.legend(frameon=False)
    return plots.save(figure, Path(path))
