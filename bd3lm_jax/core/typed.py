"""Sections of a config: nested mappings to frozen dataclasses, with errors that name the key."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, get_args, get_origin

from bd3lm_jax.core import migrations, synonyms
from bd3lm_jax.core.errors import UserError, nearest


class Nested(Protocol):
    """A config before it is read: a dict of dicts, or an ml_collections ConfigDict, which is no Mapping."""

    def items(self) -> Iterable[tuple[Any, Any]]: ...


def from_json(text: str | bytes) -> Any:
    """As json.loads, with its JSONDecodeError also for what is nested too deep or holds a number of too many digits."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise json.JSONDecodeError(reason, str(text), 0) from None


def check_characters(text: str, what: str) -> None:
    """UserError for halves of characters, which JSON and command lines can bring: no UTF-8 text holds them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds {text[error.start]!a} at character {error.start}, which is half of a character: "
                        "give UTF-8 text") from None


def check(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def one_of(name: str, value: Any, allowed: tuple) -> None:
    check(value in allowed, f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def as_mapping(name: str, value: Any) -> Mapping:
    check(hasattr(value, "items"), f"config key '{name}' is {value!r}, expected a section" if name else
          f"the config is {value!r}, expected what get_config() of a config file returns: a ConfigDict or a dict")
    return value


def check_known_keys(prefix: str, mapping: Mapping, allowed_keys: list[str]) -> None:
    for key in mapping:
        if key not in allowed_keys:
            synonym = synonyms.config_key(str(key), [prefix + name
                                                     for name in allowed_keys]) or synonyms.config_key(str(key))
            suggestion = f"did you mean '{synonym}'?" if synonym else nearest(key, allowed_keys)
            raise UserError(f"unknown config key '{prefix}{key}': {suggestion}")
    missing = [key for key in allowed_keys if key not in mapping]
    check(not missing, f"missing config key '{prefix}{missing[0] if missing else ''}'")


def default_values(kind: Any) -> dict[str, Any]:
    """The keys of a section, the dataclass `kind`, that have defaults, with them."""
    return {field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}


def as_section(name: str, values: Any, kind: type) -> Any:
    """A section of a config as the dataclass `kind`, keys that it lacks at their defaults. UserError for an unknown or
    ill-typed key, and for a missing one without a default."""
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    values = migrations.with_known_names(name, dict(as_mapping(name, values).items()), fields)
    values = default_values(kind) | values
    check_known_keys(f"{name}.", values, list(fields))
    return kind(**{key: as_type(f"{name}.{key}", values[key], fields[key]) for key in fields})


def as_type(key: str, value: Any, kind: type) -> Any:
    """`value` as `kind`: int widens to float, lists become tuples, nothing else is converted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(as_type(key, item, inner) for item, inner in zip(value, _kinds(key, value, get_args(kind))))
    base_type = get_origin(kind) or kind
    is_valid = isinstance(value, base_type) and not (base_type is int and isinstance(value, bool))
    expected = getattr(kind, "__name__", kind)
    check(is_valid, f"config key '{key}' is {value!r} ({type(value).__name__}), expected {expected}")
    return value


def _kinds(key: str, value: Any, kinds: tuple) -> tuple:
    """What the items of a tuple are to be: `kinds` of the form (kind, ...), or one for each item of a pair."""
    if kinds[-1] is Ellipsis:
        return (kinds[0],) * len(value)
    names = ", ".join(kind.__name__ for kind in kinds)
    check(len(value) == len(kinds), f"config key '{key}' holds {value!r}, expected pairs ({names})")
    return kinds


def flatten(nested: Mapping, prefix: str = "") -> dict:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
