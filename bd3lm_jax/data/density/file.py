"""Annotations from a file: `file:PATH`, JSONL of `{"text": ..., "spans": [[start, end], ...]}`, a document a line.

Spans are characters of the text, from 0, the end exclusive; a third entry `[start, end, "quoted"]` is compared with
what stands there. Lines are matched with the documents by their text, in any order; `"sha256": ...` (hex, of the text
in UTF-8) may stand in for the text. Documents without a line have no dense token.
"""

import hashlib
import json
from pathlib import Path

from bd3lm_jax.core import paths, remote
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.typed import from_json
from bd3lm_jax.core.untrusted_files import MAX_TEXT_FILE, read_bytes
from bd3lm_jax.data.density.source import Context, Span, Spans

ARGUMENT, CONTINUOUS = "PATH", False


def check(argument: str) -> None:
    if not paths.scheme_of(argument) and not Path(argument).is_file():
        raise UserError(f"data.density='file:{argument}': there is no such file")


def build(argument: str, context: Context) -> Spans:
    del context
    annotations = Annotations(remote.fetch(argument))
    return Spans(annotations.find, annotations.digest, annotations.on_unmatched, annotations.on_end)


class Annotations:
    """Spans by the hash of their text. UserError, naming file and line, for what cannot be read or does not fit."""

    def __init__(self, path: Path):
        self.path, self.lines, self.documents, self.num_matched = path, {}, 0, 0
        try:
            content = read_bytes(path, MAX_TEXT_FILE)
            lines = content.decode().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        self.digest = hashlib.sha256(content).hexdigest()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._read(number, line)

    def find(self, text: str) -> list[Span]:
        self.documents += 1
        number, spans = self.lines.get(_digest(text), (0, ()))
        self.num_matched += number > 0
        for start, end, *quoted in spans:
            self._check_span(number, text, start, end, quoted)
        return [(start, end) for start, end, *_ in spans]

    def on_unmatched(self, text: str, span: Span) -> None:
        start, end = span
        number, _ = self.lines[_digest(text)]
        raise self._error(number, f"the span {start}..{end} ({text[start:end]!r}) holds no token")

    def on_end(self) -> None:
        if self.documents and not self.num_matched:
            raise UserError(f"{self.path}: none of its {len(self.lines)} texts is among the documents that are "
                            "annotated: expected the documents of the corpus, character by character")

    def _read(self, number: int, line: str) -> None:
        try:
            record = from_json(line)
        except json.JSONDecodeError as error:
            raise self._error(number, f"not JSON: {error.msg} at column {error.colno}") from None
        record = {key: x for key, x in record.items() if x is not None} if isinstance(record, dict) else record
        if not isinstance(record, dict) or not ("text" in record or "sha256" in record):
            raise self._error(number, "expected an object with \"text\" (or \"sha256\") and \"spans\"")
        text, spans = record.get("text"), record.get("spans")
        if not isinstance(text if "text" in record else record["sha256"], str):
            raise self._error(number, "\"text\" or \"sha256\" is no string")
        if not isinstance(spans, list) or not all(map(_is_span, spans)):
            raise self._error(number, f"\"spans\" is {json.dumps(spans)[:60]}, expected a list of [start, end]")
        if text is not None:
            text = text.rstrip("\r\n")
            for start, end, *quoted in spans:
                self._check_span(number, text, start, end, quoted)
        self.lines[record["sha256"] if text is None else _digest(text)] = (number, spans)

    def _check_span(self, number: int, text: str, start: int, end: int, quoted: list[str]) -> None:
        if not 0 <= start < end <= len(text):
            raise self._error(number, f"the span {start}..{end} is not inside its text of {len(text)} characters "
                              "(they are counted from 0, the end is exclusive)")
        if quoted and text[start:end] != quoted[0]:
            raise self._error(number, f"the span {start}..{end} is {text[start:end]!r}, not {quoted[0]!r}")

    def _error(self, number: int, what: str) -> UserError:
        return UserError(f"{self.path} line {number}: {what}")


def _is_span(span) -> bool:
    return (isinstance(span, list) and len(span) in (2, 3) and all(type(place) is int for place in span[:2])
            and all(isinstance(quoted, str) for quoted in span[2:]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
