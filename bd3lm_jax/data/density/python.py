"""Python syntax: words of control flow, conditions, and the names of what is called. Other text has no dense token.

A document is one piece of source that parses by itself, such as a function.
"""

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Iterator

from bd3lm_jax.data.density.source import Context, Span, Spans

ARGUMENT, CONTINUOUS = "", False
VERSION = 1  # raise it when the spans of a text change
CONTROL = frozenset("if elif else for while break continue return raise try except finally with yield await assert"
                    .split())


def build(argument: str, context: Context) -> Spans:
    del argument, context
    return Spans(find, VERSION)


def find(text: str) -> list[Span]:
    """Spans in characters, empty if the text does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in strings
            tree = ast.parse(text)
        words = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return []
    lines = _Lines(text)
    spans = [(lines.character(*word.start), lines.character(*word.end)) for word in words
             if word.type == tokenize.NAME and word.string in CONTROL]
    for part in _parts(tree):
        assert part.end_lineno is not None and part.end_col_offset is not None  # of what was parsed
        spans.append((lines.byte(part.lineno, part.col_offset), lines.byte(part.end_lineno, part.end_col_offset)))
    return sorted(spans)


def _parts(tree: ast.AST) -> Iterator[ast.expr]:
    """Conditions, and what is called."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.match_case) and node.guard is not None:
            yield node.guard
        elif isinstance(node, ast.Call):
            yield node.func


class _Lines:
    """Where the lines of a text start, as Python counts them."""

    def __init__(self, text: str):
        self.text = text
        self.starts = [0, *(match.end() for match in re.finditer(r"\r\n|\r|\n", text))]

    def character(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def byte(self, line: int, column: int) -> int:
        """The character at a column counted in UTF-8 bytes."""
        start = self.starts[line - 1]
        end = self.starts[line] if line < len(self.starts) else len(self.text)
        return start + len(self.text[start:end].encode()[:column].decode())
