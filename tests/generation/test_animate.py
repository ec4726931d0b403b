"""Texts in the terminal, and where there is none."""

import io

import pytest
from rich.console import Console
from toy_lm import END, LETTERS, make_lm

from bd3lm_jax.core import log
from bd3lm_jax.generation import stream
from bd3lm_jax.generation.animate import ColouredRow, animate, colour
from bd3lm_jax.generation.options import make_options


@pytest.fixture(scope="module")
def events():
    options = make_options(sampler="remdm_cap", steps=6, threshold=0.6, forbidden=[END])
    return list(stream.stream(make_lm(tokenizer=LETTERS), [[1, 2]], 1, 18, options))


@pytest.mark.ci_slow
def test_a_terminal_shows_a_panel_with_the_text(events):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=60)
    assert list(animate(iter(events), make_lm(tokenizer=LETTERS), console)) == events
    shown = console.file.getvalue()
    assert "\x1b[38;2;" in shown and "░" in shown
    plain = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=60)
    list(animate(iter(events), make_lm(tokenizer=LETTERS), plain))
    assert f"bc{events[-1].sample.text}" in plain.file.getvalue()
    assert f"sample 0: block 4, {events[-1].nfe} network calls, stop: length" in plain.file.getvalue()


def test_without_a_terminal_there_are_lines(events, capsys, monkeypatch):
    seconds = iter(range(0, 10_000, 3))
    monkeypatch.setattr("bd3lm_jax.generation.animate.time.monotonic", lambda: next(seconds))
    assert list(animate(iter(events), make_lm(tokenizer=LETTERS), Console(file=io.StringIO()))) == events
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and lines[-1] == f"sample 0: block 4, {events[-1].nfe} network calls, stop: length"
    assert 2 < len(lines) < len(events), f"a line every {log.PLAIN_SECONDS} seconds"
    assert "\x1b" not in captured.err


def test_a_row_is_painted_as_it_stands(events):
    row = ColouredRow(events[0])
    for event in events:
        row.apply(event)
        assert row.ids[event.start:event.start + len(event.canvas)].tolist() == event.canvas
    lm = make_lm(tokenizer=LETTERS)
    text = row.text(lm)
    assert text.plain == "bc" + events[-1].sample.text
    assert len([span for span in text.spans if str(span.style).startswith("rgb")]) == 16, "the prompt has no colour"


def test_colours_run_over_three_points():
    assert [colour(c) for c in (0.0, 0.5, 1.0)] == [(215, 95, 0), (175, 175, 95), (0, 175, 175)]
    assert colour(0.25) == (195, 135, 48)
