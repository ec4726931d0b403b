"""What is dense in Python source and in sums, written out by hand; annotations from files and their errors."""

import hashlib
import json

import numpy as np
import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.density import arithmetic, open_density, python
from bd3lm_jax.data.density.source import Context
from bd3lm_jax.data.tokenizers import get_tokenizer

PROGRAM = '''\
def fit(café, xs):
    total = 0  # if nothing is given
    for x in sorted(xs):
        if x > 3 and x:
            total += x
        else:
            total = café.add(x) if x else 1
    while not total:
        break
    return [y for y in xs if ok(y)]
'''
DENSE = ["for", "sorted", "if", "x > 3 and x", "else", "café.add", "if", "x", "else", "while", "not total", "break",
         "return", "for", "if", "ok", "ok(y)"]


def words(text, spans):
    return [text[start:end] for start, end in spans]


def test_python_spans_of_ten_lines():
    assert len(PROGRAM.splitlines()) == 10
    assert words(PROGRAM, python.find(PROGRAM)) == DENSE


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_python_tokens(name):
    """Nothing but the words above, and each of them whole."""
    annotation = open_density("python", 1.0, Context(str, np.zeros))
    ids, offsets = get_tokenizer(name, tuple).encode_offsets([PROGRAM])[0]
    values = annotation.of(PROGRAM, ids, offsets, 0)
    expected = {i for start, end in python.find(PROGRAM) for i in range(start, end)}
    found = {i for (s, e), dense in zip(offsets, values) if dense for i in range(s, e) if not PROGRAM[i].isspace()}
    extra = {"gpt2": {"().", "(", ")]", ".", ":", ")"}, "bytes": set()}[name]
    assert found >= {i for i in expected if not PROGRAM[i].isspace()}
    assert {PROGRAM[i] for i in found - expected} <= {c for word in extra for c in word}
    assert values[-1] == 0 and len(values) == len(ids) + 1


@pytest.mark.parametrize("text", ["It is a truth universally acknowledged.", "for x in", "x = '\0'", "((((" * 400, ""])
def test_what_does_not_parse_has_no_dense_token(text):
    assert python.find(text) == []


def test_other_line_ends_and_an_odd_escape():
    assert words("if a:\r\n  f('é\\d')\r\n", python.find("if a:\r\n  f('é\\d')\r\n")) == ["if", "a", "f"]


@pytest.mark.parametrize("text, expected", [
    ("We add 12 + 3.5 = 15.5 in all.", ["12", "+", "3.5", "=", "15.5"]),
    ("It costs $1,200, or 20% more than $1,000.", ["$1,200", "20%", "$1,000"]),
    ("7 plus 8 equals 15, 2*(3-1)=4", ["7", "plus", "8", "equals", "15", "2", "*", "3", "-", "1", "=", "4"]),
    ("A well-known plus - no sums here = nothing.", []),
    ("6 × 7 = 42; 9 ÷ 3", ["6", "×", "7", "=", "42", "9", "÷", "3"]),
])
def test_arithmetic(text, expected):
    assert words(text, arithmetic.find(text)) == expected


def annotate(path, documents, spec=None):
    """Dense characters of the documents, by bytes."""
    annotation = open_density(spec or f"file:{path}", 1.0, Context(str, np.zeros))
    tokenizer, found = get_tokenizer("bytes", tuple), []
    for text, (ids, offsets) in zip(documents, tokenizer.encode_offsets(documents)):
        dense = annotation.of(text, ids, offsets, 256)[:-1]
        found.append("".join(text[s] for (s, e), tag in zip(offsets, dense) if tag))
    annotation.on_end()
    return found


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_files_by_text_and_by_hash(tmp_path):
    digest = hashlib.sha256(b"other words").hexdigest()
    path = write(tmp_path / "tags.jsonl", {"sha256": digest, "spans": [[0, 5], [6, 7]]}, "",
                 {"text": "some text\n", "spans": [[5, 9, "text"]]}, {"text": "unused", "spans": []})
    assert annotate(path, ["some text", "not annotated", "other words"]) == ["text", "", "otherw"]


@pytest.mark.parametrize("line, words_", [
    ("{", "line 2: not JSON"),
    ([1], "line 2: expected an object"),
    ({"spans": []}, "line 2: expected an object"),
    ({"text": 3, "spans": []}, "is no string"),
    ({"text": "abc"}, 'line 2: "spans" is null, expected a list of [start, end]'),
    ({"text": "abc", "spans": [[0]]}, 'line 2: "spans" is [[0]]'),
    ({"text": "abc", "spans": [[0.0, 1]]}, '"spans" is [[0.0, 1]]'),
    ({"text": "abc", "spans": [[1, 4]]}, "line 2: the span 1..4 is not inside its text of 3 characters"),
    ({"text": "abc", "spans": [[2, 2]]}, "line 2: the span 2..2 is not inside its text"),
    ({"text": "abc", "spans": [[-1, 2]]}, "line 2: the span -1..2"),
    ({"text": "abc", "spans": [[0, 2, "bc"]]}, "line 2: the span 0..2 is 'ab', not 'bc'"),
])
def test_lines_that_do_not_fit(tmp_path, line, words_):
    path = write(tmp_path / "tags.jsonl", {"text": "first", "spans": []}, line)
    with pytest.raises(UserError) as error:
        annotate(path, ["first"])
    assert words_ in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_hash_whose_span_is_too_long_and_a_file_of_another_corpus(tmp_path):
    digest = hashlib.sha256(b"abc").hexdigest()
    path = write(tmp_path / "tags.jsonl", {"sha256": digest, "spans": [[0, 4]]})
    with pytest.raises(UserError, match="line 1: the span 0..4 is not inside its text of 3 characters"):
        annotate(path, ["abc"])
    with pytest.raises(UserError, match="none of its 1 texts is among the documents"):
        annotate(path, ["abd"])


def test_a_span_without_a_token(tmp_path):
    path = write(tmp_path / "tags.jsonl", {"text": "a b", "spans": [[1, 2]]})
    annotation = open_density(f"file:{path}", 1.0, Context(str, np.zeros))
    ids, offsets = get_tokenizer("bert-base-uncased", tuple).encode_offsets(["a b"])[0]
    with pytest.raises(UserError, match=r"line 1: the span 1..2 \(' '\) holds no token"):
        annotation.of("a b", ids, offsets, 0)
