"""JSON of a run directory with a checksum of what it holds: a damaged number is found, not used.

Earlier versions wrote no checksum; what they wrote is read as it stands.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

from bd3lm_jax.core.typed import from_json

CHECKSUM_KEY = "crc32"  # the last key of an object


class ChecksumError(ValueError):
    """What was written is not what stands there."""


def add_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its checksum."""
    return {**record, CHECKSUM_KEY: _checksum(record)}


def verify_checksum(text: str | bytes) -> dict[str, Any]:
    """The object in a JSON text without its checksum. Damaged if it is none, or its checksum is that of another."""
    try:
        record = from_json(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ChecksumError(f"is not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ChecksumError(f"holds a JSON {type(record).__name__}, expected an object")
    checksum = record.pop(CHECKSUM_KEY, None)
    if checksum is not None and checksum != _checksum(record):
        raise ChecksumError(f"does not match its checksum, key '{CHECKSUM_KEY}'")
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record).encode()):08x}"
