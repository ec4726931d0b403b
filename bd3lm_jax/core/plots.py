"""Pictures of a run: PNG files for people, each with a title that says what is drawn."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from bd3lm_jax.core import files
from bd3lm_jax.core.log import note, read_metrics

LABEL = 40  # characters of a line of a label
LABEL_GAP = 0.09  # of the width of an axis, between the labels of two ticks at least
CURVES = {
    "train/loss": ("training loss", "#9ecae1"),
    "train/nll": ("training NLL", "#3182bd"),
    "valid/nll": ("validation NLL", "#e6550d"),
}


def loss_curve(workdir: str | os.PathLike) -> Path:
    """Draw what `metrics.jsonl` holds of the CURVES, with 95 % intervals, into `plots/loss.png`; returns its path.

    A training loss that is the training NLL is drawn once.
    """
    lines = read_metrics(workdir)
    figure, axes = new_figure(f"Training of {_name(workdir)}", "step", "nats per token")
    curves = {key: [(line["step"], line[key]) for line in lines if line.get(key) is not None] for key in CURVES}
    if curves["train/loss"] == curves["train/nll"]:
        curves["train/loss"] = []
    for key, (label, color) in CURVES.items():
        points = curves[key]
        if points:
            marker = "o" if key.startswith("valid") else None
            axes.plot(*zip(*points), label=label, color=color, marker=marker, markersize=4, linewidth=1.5)
    intervals = [(line["step"], line["valid/nll_low"], line["valid/nll_high"])
                 for line in lines if line.get("valid/nll_low") is not None]
    if intervals:
        steps, low, high = zip(*intervals)
        axes.fill_between(steps, low, high, color=CURVES["valid/nll"][1], alpha=0.2, linewidth=0)
    if axes.lines:
        axes.legend(frameon=False)
    return save(figure, Path(workdir) / "plots" / "loss.png")


def nll_by_count(path: str | os.PathLike, ks: Sequence[int], nll: Sequence[float]) -> Path:
    """Draw the NLL of a masked token (nats) against the number k of masked tokens in its block; returns the path."""
    figure, axes = new_figure("How hard a block is by how much of it is masked", "masked tokens in the block",
                              "nats per masked token")
    axes.plot(ks, nll, color="#3182bd", marker="o", markersize=4, linewidth=1.5)
    axes.locator_params(axis="x", integer=True)
    return save(figure, Path(path))


def ratio_bars(path: str | os.PathLike, panels: Mapping[str, Mapping[tuple[str, str], float]], title: str) -> Path:
    """Draw positive ratios as dots at the end of a line from 1, a panel a measure: {measure: {(case, variant): ratio}}.

    The dashed line is the baseline, 1; the axes are logarithmic, so that twice and half are as far from it. Returns
    the path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for panel in panels.values() for key in panel))
    ticks = []  # label and point from top to bottom: every case has a heading
    for case in dict.fromkeys(case for case, _ in keys):
        ticks += [(case, None)] + [(variant.replace("_", " "), (case, variant))
                                   for inside, variant in keys if inside == case]
    figure = Figure(figsize=(3 * len(panels) + 4, 0.25 * len(ticks) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (measure, panel) in zip(all_axes, panels.items()):
        ys = [y for y, (_, key) in enumerate(ticks) if key in panel]
        ratios = [panel[ticks[y][1]] for y in ys]
        axes.set_xscale("log")
        axes.hlines(ys, 1, ratios, color="#3182bd", linewidth=2)
        axes.plot(ratios, ys, "o", color="#3182bd", markersize=6)
        for y, ratio in zip(ys, ratios):  # away from the line of the baseline
            axes.annotate(f"{ratio:.3g}", (ratio, y), xytext=(-6 if ratio < 1 else 6, 0), textcoords="offset points",
                          ha="right" if ratio < 1 else "left", va="center", fontsize=8)
        axes.axvline(1, color="black", linestyle="--", linewidth=1)
        axes.set_xlabel(f"{measure}, ratio")
        low, high = min(1, *ratios) / 1.2, max(1, *ratios) * 1.2
        room = (high / low) ** 0.2  # for the numbers
        axes.set_xlim(low / room, high * room)
        _round_ticks(axes)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_yticks(range(len(ticks)), [label for label, _ in ticks])
    for label, (_, key) in zip(all_axes[0].get_yticklabels(), ticks):
        label.set_fontweight("normal" if key else "bold")
    all_axes[0].set_ylim(len(ticks) - 0.5, -0.5)
    return save(figure, Path(path))


def _round_ticks(axes) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, or nearer where these are fewer than three."""
    low, high = axes.get_xlim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[m * 10.0**power for power in powers for m in steps if low <= m * 10.0**power <= high]
               for steps in ((1,), (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))]
    ticks = next((choice for choice in choices if len(choice) >= 3), choices[-1])
    _set_ticks(axes, ticks)


def _set_ticks(axes, values: Sequence[float]) -> None:
    """A tick at each value; a label where the one before leaves room for it."""
    low, high = axes.get_xlim()
    place = math.log if axes.get_xscale() == "log" else float
    labels, last = [], -math.inf
    for x in values:
        position = (place(x) - place(low)) / (place(high) - place(low))
        has_room = position - last >= LABEL_GAP
        labels.append(f"{x:g}" if has_room else "")
        last = position if has_room else last
    axes.set_xticks(values, labels)
    axes.minorticks_off()


def _name(workdir: str | os.PathLike) -> str:
    return Path(workdir).absolute().name


def new_figure(title: str, xlabel: str, ylabel: str):
    """(figure, axes) in the style of all pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure, path: str | os.PathLike) -> Path:
    """Write a picture, and its directory if there is none; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_replace(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    note(f"plot: {path}")
    return path


def nll_intervals(path: str | os.PathLike, title: str, xlabel: str,
                  curves: Mapping[str, Sequence[tuple[float | str, float, float, float]]]) -> Path:
    """Draw validation NLLs (nats) with their 95 % intervals: {curve: [(x, nll, low, high), ...]}; returns the path.

    x: all numbers, on a logarithmic axis beyond a factor of 10, or all names, each with a line of its own.
    """
    figure, axes = new_figure(title, xlabel, "validation NLL, nats per token")
    for label, points in curves.items():
        xs, nll, low, high = zip(*points)
        bars = [[y - end for y, end in zip(nll, low)], [end - y for y, end in zip(nll, high)]]
        if isinstance(xs[0], str):
            figure.set_figheight(max(0.3 * len(xs) + 1.5, 2.5))
            axes.errorbar(nll, xs, xerr=bars, fmt="o", markersize=4, capsize=3)
        else:
            axes.errorbar(xs, nll, yerr=bars, fmt="o-", markersize=4, capsize=3, linewidth=1.5, label=label)
    values = {x for points in curves.values() for x, *_ in points}
    numbers = sorted(x for x in values if not isinstance(x, str))
    if not numbers:
        axes.set(xlabel=axes.get_ylabel(), ylabel="")
        axes.invert_yaxis()
    elif 0 < 10 * numbers[0] < numbers[-1]:
        axes.set_xscale("log")
        _set_ticks(axes, numbers)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return save(figure, Path(path))


def intervals(path: str | os.PathLike, title: str,
              series: Mapping[str, Mapping[str, tuple[float, float | None, float | None]]], xlabel: str) -> Path:
    """Draw estimates with their intervals, a line a case: {series: {case: (value, low, high)}}; returns the path.

    low and high are None where the interval is not known.
    """
    cases = list(dict.fromkeys(case for points in series.values() for case in points))
    figure, axes = new_figure("", xlabel, "")
    figure.suptitle(title)
    figure.set_figheight(0.14 * len(cases) * (len(series) + 1) + 1.5)
    for i, (label, points) in enumerate(series.items()):
        offset = 0.6 * ((i + 0.5) / len(series) - 0.5)
        ys = [cases.index(case) + offset for case in points]
        values = [value for value, _, _ in points.values()]
        errors = [(0.0, 0.0) if low is None or high is None else (value - low, high - value)
                  for value, low, high in points.values()]
        axes.errorbar(values, ys, xerr=list(zip(*errors)), label=label, fmt="o", markersize=4, capsize=3, linewidth=1.5)
    axes.set_yticks(range(len(cases)), [textwrap.fill(case, LABEL) for case in cases], fontsize="small")
    axes.set_ylim(len(cases) - 0.5, -0.5)
    if len(series) > 1:
        side_by_side = max(map(len, series)) < LABEL // 2
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=1 + side_by_side)  # above all points
    return save(figure, Path(path))


def noise_over_steps(workdir: str | os.PathLike) -> Path:
    """Draw the noise that was chosen from the data, the metrics `noise/clip` (a band of mask probabilities) and
    `noise/count_probs` (a line a count), into `plots/noise.png`; returns its path."""
    lines = read_metrics(workdir)
    clips, count_distributions = ([(line["step"], line[key]) for line in lines if key in line]
                                  for key in ("noise/clip", "noise/count_probs"))
    figure, axes = new_figure(f"Noise that {_name(workdir)} was trained with", "step",
                              "mask probability" if clips else "probability of the count")
    if clips:
        steps, intervals = zip(*clips)
        low, high = zip(*intervals)
        axes.fill_between(steps, low, high, step="post", color="#9ecae1")
        axes.set_ylim(0, 1)
    if count_distributions:
        steps, probs = zip(*count_distributions)
        for count, values in enumerate(zip(*probs), start=1):
            if count & (count - 1) == 0 or count == len(probs[0]):
                axes.plot(steps, values, marker="o", markersize=4, linewidth=1.5, label=f"{count} masked")
        axes.legend(frameon=False)
    return save(figure, Path(workdir) / "plots" / "noise.png")
