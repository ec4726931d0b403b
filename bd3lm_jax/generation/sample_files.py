"""Texts that were generated, as files hold them."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.core import files, remote
from bd3lm_jax.core.errors import UserError, command_line
from bd3lm_jax.core.typed import from_json
from bd3lm_jax.core.untrusted_files import MAX_TEXT_FILE, read_text

SEPARATOR = "\n--\n"  # between the texts of a .txt file
FORMS = 'the JSON result of sample, lines of {"text": ...}, or a run directory'


class Texts(NamedTuple):
    """Generated texts. nfe_per_token: network calls over tokens, as the sampler counted both; None: not known.

    block_size: of the sampler, None if not known. stops: {why a text ended: how many}.
    """

    name: str
    path: str
    texts: list[str]
    nfe_per_token: float | None
    block_size: int | None
    stops: dict[str, int]


def read(path: str) -> Texts:
    """The texts in `path`: results of `python -m launch sample` (a JSON object, or one a line), JSONL of {"text": ...},
    a .txt file with "--" on a line between texts, or a run directory (the file of samples/ of the highest step).

    Raises UserError, naming the file and line, if there is no such file, no text in it, or something else.
    """
    where, block_size = remote.fetch(path), None
    if where.is_dir():
        block_size = rundir.read(where)[0].block_size
        where = _newest(where)
    content = _content(where)
    if where.suffix == ".txt":
        return Texts(Path(path).stem, path, content.removesuffix("\n").split(SEPARATOR), None, block_size, {})
    results = _objects(where, content)
    samples = [sample for result in results for sample in _samples(where, result)]
    sizes = {size for size in map(_block_size, results) if size is not None}
    return Texts(Path(path).stem, path, [sample["text"] for sample in samples], _nfe_per_token(samples),
                 sizes.pop() if len(sizes) == 1 else block_size,
                 dict(Counter(sample["stop"] for sample in samples if sample.get("stop") is not None)))


def write(path: str, samples: Sequence[dict[str, Any]]) -> None:
    """JSON lines, a sample each; all of them or what was there before. RunError if they cannot be written."""
    with files.errors(path, "choose another --out"):
        files.write(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples).encode())


def names(texts: Sequence[Texts]) -> list[str]:
    """What to call them in tables: their names, or their paths where two have one name."""
    short = [file.name for file in texts]
    return short if len(set(short)) == len(short) else [file.path for file in texts]


def _newest(workdir: Path) -> Path:
    found = [file for file in workdir.glob("samples/[!.]*") if file.suffix in (".txt", ".json", ".jsonl")]
    if not found:
        raise UserError(f"{workdir} has no texts in samples/: {command_line('sample')} --workdir={workdir} > FILE.json")
    return max(found, key=lambda file: ([int(number) for number in re.findall(r"\d+", file.stem)], file.name))


def _content(file: Path) -> str:
    try:
        content = read_text(file, MAX_TEXT_FILE)
    except FileNotFoundError:
        raise UserError(f"no file {file}: expected {FORMS}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: byte {error.start}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    if not content.strip():
        raise UserError(f"{file} holds no samples: expected {FORMS}")
    return content


def _objects(file: Path, content: str) -> list[dict[str, Any]]:
    """The JSON objects of a file: one of any layout, or one a line."""
    try:
        found = [from_json(content)]
    except json.JSONDecodeError:
        lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
        found = [_line(file, number, line) for number, line in lines]
    for value in found:
        if not isinstance(value, dict):
            raise UserError(f"{file} holds a JSON {type(value).__name__}, expected {FORMS}")
    return found


def _line(file: Path, number: int, line: str) -> Any:
    try:
        return from_json(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {number} is not JSON ({error.msg} at column {error.colno}): expected {FORMS}; a "
                        'file of plain texts is called .txt and has "--" on a line between them') from None


def _samples(file: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    samples = [result] if result.get("samples") is None else result["samples"]
    if not isinstance(samples, list) or not samples:
        raise UserError(f"{file} holds no samples: expected {FORMS}")
    for sample in samples:
        if not isinstance(sample, dict) or not isinstance(sample.get("text"), str):
            raise UserError(f"{file} holds a sample without text (a checkpoint without tokenizer writes ids alone): "
                            f"expected {FORMS}")
    return samples


def _block_size(result: dict[str, Any]) -> int | None:
    sampler, own = result.get("sampler"), result.get("block_size")
    return sampler.get("block_size") if own is None and isinstance(sampler, dict) else own


def _nfe_per_token(samples: Sequence[dict[str, Any]]) -> float | None:
    if any(sample.get(key) is None for sample in samples for key in ("nfe", "num_tokens")):
        return None
    tokens = sum(sample["num_tokens"] for sample in samples)
    return sum(sample["nfe"] for sample in samples) / tokens if tokens else None
