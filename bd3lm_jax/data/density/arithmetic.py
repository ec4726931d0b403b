"""Arithmetic in text: numbers (results among them), the operators between them, and words for these."""

import re

from bd3lm_jax.data.density.source import Context, Span, Spans

ARGUMENT, CONTINUOUS = "", False
VERSION = 1  # raise it when the spans of a text change
NUMBER = r"\d+(?:[.,]\d+)*"
WORDS = "plus|minus|times|divided by|equals"
OPERATOR = re.compile(rf"(?<=[\d)%])\s*([-+*/×÷^<>=]+|\b(?:{WORDS})\b)\s*(?=[-($]*\d)")
AMOUNT = re.compile(rf"[$€£]?{NUMBER}%?")


def build(argument: str, context: Context) -> Spans:
    del argument, context
    return Spans(find, VERSION)


def find(text: str) -> list[Span]:
    """Spans in characters."""
    return sorted([match.span() for match in AMOUNT.finditer(text)]
                  + [match.span(1) for match in OPERATOR.finditer(text)])
