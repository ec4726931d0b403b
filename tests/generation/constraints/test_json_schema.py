"""JSON schemas against json.dumps of values that they allow, and json.loads of texts drawn from their automata."""

import json
import random

import numpy as np
import pytest
from toy_text import accepts

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.generation.constraints.dfa import START, compile_node
from bd3lm_jax.generation.constraints.json_schema import schema_node


def string(**limits):
    return {"type": "string", **limits}


PERSON = {"type": "object", "title": "a person", "required": ["name"], "properties": {
    "name": string(minLength=1, maxLength=5), "age": {"type": "integer"}, "tags": {
        "type": "array", "items": {"enum": ["a\n", 2, None]}, "minItems": 1, "maxItems": 2}}}
CASES = [
    (PERSON, [{"name": "Zoë", "age": 41, "tags": ["a\n"]}, {"name": 'a"\\\nb', "age": -1, "tags": [2, None]}],
     [{"name": "", "age": 1, "tags": [2]}, {"name": "abcdef", "age": 1, "tags": [2]},
      {"name": "a", "age": 1.5, "tags": [2]}, {"age": 1, "name": "Zoë", "tags": [2]},
      {"name": "a", "age": 1, "tags": []}, {"name": "a", "age": 1, "tags": [2, 2, 2]}]),
    (string(pattern=r"^[^a]{2}$"), ["bb", '""', "\n\\", "é日"], ["ab", "b", "bbb"]),
    ({"type": ["number", "null"]}, [0, -1.5, 1e30, 1e-7, None], ["0", True, [0]]),
    ({"anyOf": [{"const": {"a": [1, "é"]}}, {"type": "boolean"}]}, [{"a": [1, "é"]}, True, False], [{"a": [1]}, None]),
    ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 0}},
     [[], [[]], [[], []]], [[[1]]]),
    ({"type": "number", "enum": [1, 2.5]}, [1, 2.5], [2]),
]


@pytest.mark.parametrize("schema, values, others", CASES)
def test_what_a_schema_accepts(schema, values, others):
    dfa = compile_node(schema_node(schema))
    for value in values:
        assert accepts(dfa, json.dumps(value, ensure_ascii=False)), value
    for value in others:
        assert not accepts(dfa, json.dumps(value, ensure_ascii=False)), value


def random_text(dfa, rng) -> str:
    """A walk over bytes that stops with probability 0.2 where it may."""
    state, text = START, bytearray()
    while not (dfa.accepting[state] and (rng.random() < 0.2 or not dfa.transitions[state].any())):
        text.append(rng.choice(np.flatnonzero(dfa.transitions[state]).tolist()))
        state = dfa.transitions[state, text[-1]]
    return text.decode()


def test_every_accepted_text_is_json_of_the_schema():
    dfa, rng = compile_node(schema_node(PERSON)), random.Random(0)
    for _ in range(100):
        value = json.loads(random_text(dfa, rng))
        assert list(value) == ["name", "age", "tags"]
        assert 1 <= len(value["name"]) <= 5 and isinstance(value["age"], int)
        assert 1 <= len(value["tags"]) <= 2 and all(tag in ("a\n", 2, None) for tag in value["tags"])


@pytest.mark.parametrize("schema, message", [
    ([], "expected a JSON schema"), ({}, "none of type"), ({"type": "strng"}, "did you mean 'string'"),
    (string(maxlength=3), "'maxlength' in schema .*did you mean 'maxLength'"),
    ({"type": "object"}, "without properties"),
    ({"type": "object", "properties": {"a": {"type": "array"}}}, r"schema\.a is an array without items"),
    ({"type": "object", "properties": {"name": {"type": "null"}}, "required": ["nam"]}, "did you mean 'name'"),
    (string(minLength=3, maxLength=2), "minLength 3 above maxLength 2"), (string(minLength=-1), "at least 0"),
    (string(pattern="a", maxLength=2), "pattern and maxLength"), (string(pattern="(a"), "position 0"),
    (string(pattern=5), "expected a regular expression"), ({"enum": []}, "one or more"),
    ({"type": "string", "enum": [1]}, "of type integer"), ({"$ref": "#"}, "none of type"),
])
def test_errors(schema, message):
    with pytest.raises(UserError, match=message):
        schema_node(schema)
