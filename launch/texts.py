"""Texts of the command line, whose bytes are UTF-8 in every locale."""

import os
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from bd3lm_jax.core.errors import UserError


def decode_flags(values: flags.FlagValues, path: type) -> flags.FlagValues:
    """The flags with texts as UTF-8; those whose parser is a `path` stay as they came, which the file system takes."""
    for name in values:
        if not isinstance(values[name].parser, path):
            values[name].value = as_utf8(values[name].value, f"--{name}")
    return values


def decode_overrides(words: Sequence[str]) -> list[str]:
    """`--config.key=value` words with the key of a record as UTF-8; other values are numbers, names and paths."""
    name = "--config.data.field"
    return [as_utf8(word, name) if word.lstrip("-").startswith(f"{name.lstrip('-')}=") else word for word in words]


def as_utf8(value: Any, name: str) -> Any:
    """A text of the command line, or each of a list of them, in the encoding of all texts, whatever the locale's is."""
    if isinstance(value, list):
        return [as_utf8(item, name) for item in value]
    if not isinstance(value, str) or not re.search("[\ud800-\udfff]", value):
        return value
    try:
        return os.fsencode(value).decode("utf-8")  # the bytes that the locale has no characters for
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name}={value!a} is not UTF-8 ({error.reason}): give UTF-8 text") from None
