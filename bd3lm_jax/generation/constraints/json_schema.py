"""The texts that a JSON schema accepts, as a syntax tree of regex.py: a subset that needs no recursion.

    {"type": "object", "properties": {...}}      every property, in this order ("required" may name them)
    {"type": "array", "items": SCHEMA}           with "minItems", "maxItems"
    {"type": "string"}                           with "minLength", "maxLength", or a "pattern" that all of it must match
    {"type": "integer" | "number" | "boolean" | "null"}    or a list of types
    {"enum": [...]}   {"const": ...}   {"anyOf": [SCHEMA, ...]}
The text is what `json.dumps(value, ensure_ascii=False)` writes: one space after commas and colons, none elsewhere; a
number may also be written in other ways, such as 1.50 or 2e3. Annotations (title, description, ...) are skipped.
"""

import json
from collections.abc import Iterable

from bd3lm_jax.core.errors import UserError, lookup, nearest
from bd3lm_jax.generation.constraints.regex import (
    ANY,
    Characters,
    Either,
    Node,
    Repeat,
    Sequence,
    characters,
    literal,
    one_of,
    parse,
    without,
)

ANNOTATIONS = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}
ESCAPED = '"\\\b\f\n\r\t'  # characters that a string holds as a backslash and a letter
NEVER_BARE = characters([(0, 0x1F), *one_of(ESCAPED).ranges])
INTEGER = parse("-?(0|[1-9][0-9]*)")
NUMBER = parse(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
KEYWORDS = {"object": {"properties", "required", "additionalProperties"}, "array": {"items", "minItems", "maxItems"},
            "string": {"minLength", "maxLength", "pattern"}, "integer": set(), "number": set(), "boolean": set(),
            "null": set()}
PYTHON_TYPES = {dict: "object", list: "array", str: "string", int: "integer", float: "number", bool: "boolean",
                type(None): "null"}


def schema_node(schema: dict, where: str = "schema") -> Node:
    """The syntax tree of a schema; `where` names it in messages. UserError for what is wrong or not supported."""
    if not isinstance(schema, dict):
        raise UserError(f"{where} is {schema!r}, expected a JSON schema: an object with a type, enum, const or anyOf")
    keywords = set(schema) - ANNOTATIONS
    kinds = schema["type"] if isinstance(schema.get("type"), list) else [schema["type"]] if "type" in schema else []
    for kind in kinds:
        lookup(KEYWORDS, kind, f"type in {where}")
    if "anyOf" in schema:
        _check_keywords(keywords, {"anyOf"}, where)
        options = _filled_list(schema["anyOf"], f"anyOf in {where}")
        return Either(tuple(schema_node(option, f"{where}.anyOf[{i}]") for i, option in enumerate(options)))
    if "enum" in schema or "const" in schema:
        _check_keywords(keywords, {"type", "enum" if "enum" in schema else "const"}, where)
        values = _filled_list(schema["enum"], f"enum in {where}") if "enum" in schema else [schema["const"]]
        return Either(tuple(_literal_value(value, kinds, where) for value in values))
    if not kinds:
        raise UserError(f"{where} has none of type, enum, const, anyOf")
    _check_keywords(keywords, {"type"}.union(*(KEYWORDS[kind] for kind in kinds)), where)
    return Either(tuple(_typed(kind, schema, where) for kind in kinds))


def _check_keywords(keywords: set, allowed: set, where: str) -> None:
    for keyword in sorted(keywords - allowed):
        raise UserError(f"'{keyword}' in {where} is not supported here: {nearest(keyword, allowed)}")


def _filled_list(value, what: str) -> list:
    if not isinstance(value, list) or not value:
        raise UserError(f"{what} is {value!r}, expected a list of one or more")
    return value


def _literal_value(value, kinds: list[str], where: str) -> Node:
    """A value as it is written; `kinds`: the types that the schema allows, none for any."""
    kind = PYTHON_TYPES[type(value)]
    if kinds and kind not in kinds and not (kind == "integer" and "number" in kinds):
        raise UserError(f"{where} offers {value!r}, which is of type {kind}, and allows only {', '.join(kinds)}")
    return literal(json.dumps(value, ensure_ascii=False))


def _typed(kind: str, schema: dict, where: str) -> Node:
    if kind == "object":
        return _object(schema, where)
    if kind == "array":
        return _array(schema, where)
    if kind == "string":
        return _string(schema, where)
    fixed = {"integer": INTEGER, "number": NUMBER, "boolean": parse("true|false"), "null": literal("null")}
    return fixed[kind]


def _object(schema: dict, where: str) -> Node:
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        raise UserError(f"{where} is an object without properties: name each with its schema")
    for name in schema.get("required", ()):
        lookup(properties, name, f"required property in {where}")
    members = [Sequence((_literal_value(name, [], where), literal(": "), schema_node(part, f"{where}.{name}")))
               for name, part in properties.items()]
    return Sequence((literal("{"), *_separated(members), literal("}")))


def _array(schema: dict, where: str) -> Node:
    if "items" not in schema:
        raise UserError(f"{where} is an array without items: give the schema of its items")
    low, high = _limits(schema, "minItems", "maxItems", where)
    item = schema_node(schema["items"], f"{where}.items")
    if high == 0:
        return literal("[]")
    further = Repeat(Sequence((literal(", "), item)), max(low - 1, 0), None if high is None else high - 1)
    filled = Sequence((item, further))
    return Sequence((literal("["), filled if low else Repeat(filled, 0, 1), literal("]")))


def _string(schema: dict, where: str) -> Node:
    if "pattern" not in schema:
        return _quoted(Repeat(ANY, *_limits(schema, "minLength", "maxLength", where)))
    for keyword in ("minLength", "maxLength"):
        if keyword in schema:
            raise UserError(f"{where} has a pattern and {keyword}: say the length in the pattern, as in [a-z]{{2,5}}")
    if not isinstance(schema["pattern"], str):
        raise UserError(f"pattern in {where} is {schema['pattern']!r}, expected a regular expression")
    return _quoted(parse(schema["pattern"]))


def _quoted(node: Node) -> Node:
    return Sequence((literal('"'), _escape(node), literal('"')))


def _escape(node: Node) -> Node:
    """The node of a text, for the text inside a JSON string. Control characters without a letter cannot occur."""
    if isinstance(node, Characters):
        escaped = [c for c in ESCAPED if any(low <= ord(c) <= high for low, high in node.ranges)]
        return Either((without(node, NEVER_BARE), *(literal(json.dumps(c)[1:-1]) for c in escaped)))
    if isinstance(node, Repeat):
        return Repeat(_escape(node.part), node.low, node.high)
    return type(node)(tuple(_escape(part) for part in node[0]))


def _separated(nodes: Iterable[Node]) -> Iterable[Node]:
    for i, node in enumerate(nodes):
        yield from (literal(", "), node) if i else (node,)


def _limits(schema: dict, least: str, most: str, where: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    for name, value in ((least, low), (most, high)):
        if value is not None and (not isinstance(value, int) or value < 0):
            raise UserError(f"{name} in {where} is {value!r}, expected a number of at least 0")
    if high is not None and high < low:
        raise UserError(f"{where} has {least} {low} above {most} {high}")
    return low, high
