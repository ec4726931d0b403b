import json

import pytest

from bd3lm_jax.core import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def test_loss_curve_draws_every_logged_key(tmp_path, drawn):
    lines = [{"step": 10, "train/loss": 3.0, "train/nll": 4.0}, {"step": 20, "train/loss": 2.0, "valid/nll": 3.5},
             {"step": 30, "train/loss": None, "valid/nll": 3.0, "valid/nll_low": 2.5, "valid/nll_high": 3.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = plots.loss_curve(tmp_path)
    assert path == tmp_path / "plots" / "loss.png" and path.read_bytes().startswith(PNG)
    curves = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert curves == {"training loss": [[10, 3.0], [20, 2.0]], "training NLL": [[10, 4.0]],
                      "validation NLL": [[20, 3.5], [30, 3.0]]}
    band, = drawn[0].axes[0].collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(30, 2.5), (30, 3.75)}


def test_loss_curve_of_a_run_without_metrics(tmp_path, drawn):
    assert plots.loss_curve(tmp_path).exists()
    assert not drawn[0].axes[0].lines


def test_nll_by_count(tmp_path, drawn):
    path = plots.nll_by_count(tmp_path / "deep" / "k.png", [1, 2, 3], [1.0, 1.5, 1.75])
    assert path.read_bytes().startswith(PNG)
    assert drawn[0].axes[0].lines[0].get_xydata().tolist() == [[1, 1.0], [2, 1.5], [3, 1.75]]


def test_a_training_loss_that_is_the_nll_is_drawn_once(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "train/loss": 3.0, "train/nll": 3.0}) + "\n")
    plots.loss_curve(tmp_path)
    axes = drawn[0].axes[0]
    assert [line.get_label() for line in axes.lines] == ["training NLL"]
    assert axes.get_title(loc="left") == f"Training of {tmp_path.name}"


def test_ratio_bars(tmp_path, drawn):
    """Every ratio a point on a logarithmic axis, its number on the far side of the baseline."""
    path = plots.ratio_bars(tmp_path / "deep" / "bars.png", {
        "time": {("small", "a_b"): 1.0, ("small", "b"): 0.05, ("large", "a_b"): 1.0}, "memory": {("small", "b"): 2.0}},
        "Benchmark")
    assert path.read_bytes().startswith(PNG)
    time, memory = drawn[0].axes
    assert drawn[0].get_suptitle() == "Benchmark"
    labels = [label.get_text() for label in time.get_yticklabels()]
    assert labels == ["small", "a b", "b", "large", "a b"]

    def points(axes):
        return [(labels[round(y)], x) for x, y in axes.lines[0].get_xydata().tolist()]
    assert points(time) == [("a b", 1.0), ("b", 0.05), ("a b", 1.0)] and points(memory) == [("b", 2.0)]
    assert {axes.get_xscale() for axes in (time, memory)} == {"log"} and time.get_xlabel() == "time, ratio"
    assert [(text.get_text(), text.get_ha()) for text in time.texts + memory.texts] == [
        ("1", "left"), ("0.05", "right"), ("1", "left"), ("2", "left")]


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 100], [1, 4, 16], [7, 8, 512, 700]])
def test_labels_of_near_ticks_do_not_overlap(tmp_path, drawn, values):
    plots.nll_intervals(tmp_path / "x.png", "Sweep", "x", {"": [(x, 5.0, 4.5, 5.5) for x in values]})
    axes = drawn[0].axes[0]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    assert boxes and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_nll_intervals_of_numbers(tmp_path, drawn):
    path = plots.nll_intervals(tmp_path / "deep" / "sweep.png", "Sweep", "block size", {
        "seed=0": [(1, 5.0, 4.5, 5.25), (16, 6.0, 5.5, 6.5)], "seed=1": [(4, 5.5, 5.0, 6.0)]})
    assert path.read_bytes().startswith(PNG)
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_xscale(), list(axes.get_xticks())) == ("block size", "log", [1, 4, 16])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["seed=0", "seed=1"]
    lines = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert lines == [[[1, 5.0], [16, 6.0]], [[4, 5.5]]]
    bars = [segment.tolist() for segment in axes.containers[0].lines[2][0].get_segments()]
    assert bars == [[[1, 4.5], [1, 5.25]], [[16, 5.5], [16, 6.5]]]


def test_nll_intervals_of_names(tmp_path, drawn):
    plots.nll_intervals(tmp_path / "sweep.png", "Sweep", "", {"": [("cosine", 5.0, 4.5, 5.25), ("wsd", 5.5, 5.0, 6.0)]})
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cosine", "wsd"]
    assert axes.get_xlabel() == "validation NLL, nats per token" and axes.get_legend() is None
    assert axes.containers[0].lines[2][0].get_segments()[0].tolist() == [[4.5, 0], [5.25, 0]]


def test_nll_intervals_of_near_numbers_have_a_linear_axis(tmp_path, drawn):
    plots.nll_intervals(tmp_path / "sweep.png", "Sweep", "dropout", {"": [(0.0, 5.0, 4.5, 5.25), (0.1, 5.5, 5.0, 6.0)]})
    assert drawn[0].axes[0].get_xscale() == "linear"


def test_intervals(tmp_path, drawn):
    series = {"a": {"one": (1.0, 0.5, 2.0), "two": (3.0, 2.5, 3.5)}, "b": {"two": (2.0, 1.0, 4.0)}}
    path = plots.intervals(tmp_path / "deep" / "i.png", "Bits", series, "bits")
    assert path.read_bytes().startswith(PNG)
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"] and axes.get_xlabel() == "bits"
    for container, points in zip(axes.containers, series.values()):
        segments = container.lines[2][0].get_segments()
        assert [(low[0], high[0]) for low, high in segments] == [point[1:] for point in points.values()]
        assert container.lines[0].get_xdata().tolist() == [point[0] for point in points.values()]
        assert [round(y) for y in container.lines[0].get_ydata()] == [["one", "two"].index(case) for case in points]


def test_an_interval_that_is_not_known_is_a_point(tmp_path, drawn):
    plots.intervals(tmp_path / "i.png", "Bits", {"a": {"one": (1.0, None, None), "two": (3.0, 2.5, 3.5)}}, "bits")
    segments = drawn[0].axes[0].containers[0].lines[2][0].get_segments()
    assert [(low[0], high[0]) for low, high in segments] == [(1.0, 1.0), (2.5, 3.5)]


def test_noise_over_steps(tmp_path, drawn):
    """A band for clips, a line for each count at powers of two, and the largest."""
    def draw(lines):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert plots.noise_over_steps(tmp_path).read_bytes().startswith(PNG)
        return drawn[-1].axes[0]

    clips = draw([{"step": 10, "noise/clip": [0.3, 0.8]}, {"step": 15}, {"step": 20, "noise/clip": [0.45, 0.95]}])
    assert {0.3, 0.8, 0.45, 0.95} <= set(clips.collections[0].get_paths()[0].vertices[:, 1].tolist())
    laws = draw([{"step": 10, "noise/count_probs": [0.2, 0.3, 0.5]},
                 {"step": 20, "noise/count_probs": [0.1, 0.2, 0.7]}])
    assert {line.get_label(): line.get_xydata().tolist() for line in laws.lines} == {
        "1 masked": [[10, 0.2], [20, 0.1]], "2 masked": [[10, 0.3], [20, 0.2]], "3 masked": [[10, 0.5], [20, 0.7]]}
