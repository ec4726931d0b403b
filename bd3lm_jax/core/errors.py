"""Errors that a person reads: one line saying what was wrong, what was expected and how to fix it."""

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

# Control characters but \t and \n, marks and overrides of direction, ends of lines beyond ASCII, halves of characters.
CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_ERROR_CHARS = 1500  # characters of an error that are shown


class UserError(Exception):
    """Wrong input, found at the door: nothing was started. Command-line exit code 2.

    agreed: of many processes of a run all raise it at the same point, so that they can leave together.
    """

    exit_code = 2

    def __init__(self, message: str, on_all_processes: bool = False):
        super().__init__(message)
        self.on_all_processes = on_all_processes


class RunError(UserError):
    """Work that had started could not go on (full disk, loss not finite, damaged checkpoint). Exit code 1."""

    exit_code = 1


class Preempted(UserError):
    """The run was told to stop and has saved its state: run the same command again. Exit code 42."""

    exit_code = 42


class WatchdogTimeout(UserError):
    """Nothing happened for too long (watchdog.py): run the same command again. Exit code 75."""

    exit_code = 75


def one_line(error: Exception) -> str:
    """What an error says, on one line that a terminal can show; the middle of a very long one is left out."""
    line = " ".join(str(error).split())
    line = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in line)
    return line if len(line) <= MAX_ERROR_CHARS else f"{line[:MAX_ERROR_CHARS // 2]} ... {line[-MAX_ERROR_CHARS // 2:]}"


def escape_control_characters(text: str) -> str:
    """A text as a terminal may show it: what would steer the terminal, or turn the order of what it shows, is escaped.

    Ends of lines and tabs stay. This is for every text that is not our own: generated ones, names, values of configs.
    """
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest known name, else the list of what is known."""
    candidates = sorted(candidates)
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"did you mean '{matches[0]}'?" if matches else f"known: {', '.join(candidates)}"


def program() -> str:
    """How the user starts a command: `bd3lm` if this process was started so, else `python -m launch`."""
    return "bd3lm" if Path(*sys.argv[:1]).stem == "bd3lm" else "python -m launch"


def command_line(words: str) -> str:
    """`"train --workdir=DIR"` -> the whole command, for a message that names it."""
    return f"{program()} {words}"


def lookup(registry: Mapping, name: str, what: str):
    """`registry[name]`, or a UserError that names `what` and the nearest registered name."""
    if name not in list(registry):  # what a file holds may have no hash
        raise UserError(f"unknown {what} '{name}': {nearest(str(name), registry)}")
    return registry[name]
