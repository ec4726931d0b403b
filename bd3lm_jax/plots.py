"""Pictures of a run: PNG files for people."""

import os
from collections.abc import Sequence
from pathlib import Path

from bd3lm_jax.log import read_metrics

CURVES = {
    "train/loss": ("training loss", "#9ecae1"),
    "train/nll": ("training NLL", "#3182bd"),
    "valid/nll": ("validation NLL", "#e6550d"),
}


def loss_curve(workdir: str | os.PathLike) -> Path:
    """Draw what `metrics.jsonl` holds of the CURVES into `plots/loss.png`; returns its path."""
    lines = read_metrics(workdir)
    figure, axes = _figure("step", "nats per token")
    for key, (label, color) in CURVES.items():
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            marker = "o" if key.startswith("valid") else None
            axes.plot(*zip(*points), label=label, color=color, marker=marker, markersize=4, linewidth=1.5)
    if axes.lines:
        axes.legend(frameon=False)
    return _save(figure, Path(workdir) / "plots" / "loss.png")


def nll_by_count(path: str | os.PathLike, ks: Sequence[int], nll: Sequence[float]) -> Path:
    """Draw the NLL of a masked token (nats) against the number k of masked tokens in its block; returns the path."""
    figure, axes = _figure("masked tokens in the block", "nats per masked token")
    axes.plot(ks, nll, color="#3182bd", marker="o", markersize=4, linewidth=1.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, Path(path))


def _figure(xlabel: str, ylabel: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
