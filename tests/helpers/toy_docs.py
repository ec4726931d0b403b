"""Commands and snippets of README.md and docs/*.md, as a reader would copy them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
PROGRAMS = ("python", "pip", "pytest", "bash", "bd3lm")
VARIABLE = re.compile(r"[A-Za-z_]\w*=")


class Command(NamedTuple):
    """One command line. words: without variables before it; out: the file that its output goes to, or ""."""

    page: str
    text: str
    words: tuple[str, ...]
    out: str = ""

    @property
    def launch(self) -> tuple[str, ...] | None:
        """What stands after `python -m launch` or `bd3lm`; None for another program."""
        if self.words[:3] == ("python", "-m", "launch"):
            return self.words[3:]
        return self.words[1:] if self.words[0] == "bd3lm" else None


class Snippet(NamedTuple):
    page: str
    line: int
    code: str


def commands(page: Path) -> list[Command]:
    """In the order of the page: lines of its shell blocks, and commands in its running text."""
    content, found = page.read_text(encoding="utf-8"), []
    for block in FENCE.finditer(content):
        if block[1] in ("bash", ""):
            found += [(block.start(), line) for line in block[2].replace("\\\n", " ").splitlines()]
    blank = FENCE.sub(lambda block: " " * len(block[0]), content)
    found += [(span.start(), " ".join(span[1].split())) for span in SPAN.finditer(blank)]
    variables, result = {}, []
    for _, line in sorted(found, key=lambda one: one[0]):
        result += _parsed(page.name, line, variables)
    return result


def _parsed(page: str, line: str, variables: dict[str, str]) -> Iterator[Command]:
    """The commands of a line. variables: what earlier lines of the page have set, as `F=runs/x`."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # running text
        return
    for part in _split(words, "&&"):
        while part and VARIABLE.match(part[0]):
            name, _, value = part.pop(0).partition("=")
            variables[name] = value
        if not part or part[0] not in PROGRAMS or len(part) == 1 and part[0] != "pytest":
            continue
        for name, value in variables.items():
            part = [re.sub(rf"\${name}\b", lambda _: value, word) for word in part]
        out = part[part.index(">") + 1] if ">" in part else ""
        yield Command(page, " ".join(line.split()), tuple(part[:part.index(">")] if out else part), out)


def _split(words: list[str], separator: str) -> Iterator[list[str]]:
    part = []
    for word in [*words, separator]:
        if word == separator:
            yield part
            part = []
        else:
            part.append(word)


def snippets(page: Path) -> list[Snippet]:
    content = page.read_text(encoding="utf-8")
    return [Snippet(page.name, content[:block.start()].count("\n") + 1, block[2])
            for block in FENCE.finditer(content) if block[1] == "python"]
