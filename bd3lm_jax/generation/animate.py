"""Texts as they are written, in the terminal: one panel each, coloured by confidence."""

import time
from collections.abc import Iterable, Iterator

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from bd3lm_jax.core import log
from bd3lm_jax.core.errors import escape_control_characters
from bd3lm_jax.generation.stream import Event, piece

UNSURE, EVEN, SURE = (215, 95, 0), (175, 175, 95), (0, 175, 175)  # colours that all eyes can tell apart


def animate(events: Iterable[Event], lm, console: Console) -> Iterator[Event]:
    """Pass the events of a stream on and show them: live panels on a terminal that can move its cursor, else a line
    every few seconds and one at the end of each text. The panels show the whole row, prompts without colour."""
    live = console.is_terminal and not console.is_dumb_terminal
    return _live(events, lm, console) if live else _lines(events)


def colour(confidence: float) -> tuple[int, int, int]:
    """RGB from orange (0) over khaki (0.5) to teal (1)."""
    low, high, part = (UNSURE, EVEN, confidence * 2) if confidence < 0.5 else (EVEN, SURE, confidence * 2 - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high))
    return red, green, blue


class ColouredRow:
    """A row as it stands after the events that were applied: ids and confidence `[n]` (NaN: not drawn)."""

    def __init__(self, first: Event):
        self.ids, self.confidence = np.array(first.canvas), np.full(len(first.canvas), np.nan)

    def apply(self, event: Event) -> None:
        self.ids[event.start:event.start + len(event.canvas)] = event.canvas
        self.confidence[event.remasked] = np.nan
        self.confidence[event.revealed] = event.confidence

    def text(self, lm) -> Text:
        """Up to the first end token that was drawn."""
        styled = Text()
        for token, confidence in zip(self.ids.tolist(), self.confidence.tolist()):
            drawn = not np.isnan(confidence)
            style = "rgb({},{},{})".format(*colour(confidence)) if drawn else ""
            styled.append(escape_control_characters(piece(lm, token)), "dim" if token == lm.special.mask else style)
            if drawn and token == lm.special.end:
                break
        return styled


def _live(events: Iterable[Event], lm, console: Console) -> Iterator[Event]:
    rows, panels = {}, {}
    with Live(console=console, auto_refresh=False) as live:
        for event in events:
            row = rows.setdefault(event.number, ColouredRow(event))
            row.apply(event)
            panels[event.number] = Panel(row.text(lm), title=_headline(event), title_align="left")
            live.update(Group(*panels.values()), refresh=True)
            yield event
        live.vertical_overflow = "visible"  # what did not fit on the screen while it moved


def _lines(events: Iterable[Event]) -> Iterator[Event]:
    last = time.monotonic()
    for event in events:
        if event.sample is not None or time.monotonic() - last > log.PLAIN_SECONDS:
            last = time.monotonic()
            log.note(_headline(event))
        yield event


def _headline(event: Event) -> str:
    ending = "" if event.sample is None else f", stop: {event.sample.stop}"
    return f"sample {event.number}: block {event.block}, {event.nfe} network calls{ending}"
