"""Chat templates as transformers renders them: dialogues to text by a program (jinja2) that comes with a model.

The program runs in a process of its own, in jinja2's immutable sandbox, with limits of time, memory and text.
"""

import datetime
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.typed import from_json
from bd3lm_jax.core.untrusted_files import read_text, read_within

TEMPLATE_FILE, CONFIG_FILE, SPECIAL_FILE = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
NAMED = "additional_chat_templates"  # directory of further ones, NAME.jinja
LIMITS = {"cpu_s": 10, "memory_mib": 1024, "characters": 1 << 22}  # of one dialogue
WALL_S = 120  # more than the time of the processor, which others may use
DATE = "SOURCE_DATE_EPOCH"  # environment variable: seconds since 1970, the date that reproducible builds use
CONFIG_READERS: dict[str, Callable[[Path], dict]] = {}  # of files that hold chat templates, by their ending
CHILD = Path(__file__).with_name("chat_child.py")

Messages = list[dict[str, str]]


class ChatTemplate:
    """The chat template of a tokenizer's directory or of a GGUF file. source: its text.

    `strftime_now` gives the time at which the object was made, or that of the variable SOURCE_DATE_EPOCH.
    """

    def __init__(self, directory: str | Path, name: str = ""):
        """name: of one of several templates, "" for the usual one. UserError if there is none, or no jinja2 to run
        it."""
        directory = Path(directory)
        self.directory = directory if _config_reader(directory) else _directory(directory)
        config, templates = templates_in(directory)
        self.source = _choose(self.directory, templates, name)
        if importlib.util.find_spec("jinja2") is None:
            raise UserError("chat templates need jinja2: pip install jinja2, or use data.name='plain'")
        self._setup = {"template": self.source, "variables": _special_tokens(config), "now": _now().isoformat(),
                       "limits": LIMITS}
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def render(self, messages: Messages, calls: Sequence[tuple[int, bool]]) -> list[str]:
        """The text of the first messages, for each of `calls` (how many, whether an answer is to follow).

        Raises UserError, with the line of the template, for whatever it raises, and for one that goes on without end.
        """
        with self._lock:
            process = self._process or self._start()
            return self._ask(process, {"messages": messages, "calls": list(calls)}, "refuses a dialogue")

    def _start(self) -> subprocess.Popen:
        self._process = subprocess.Popen([sys.executable, "-P", str(CHILD)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, self._process)
        self._ask(self._process, self._setup, "is not valid")
        return self._process

    def _ask(self, process: subprocess.Popen, request: dict, what: str) -> list[str]:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = _line(process.stdout.fileno(), time.monotonic() + WALL_S)
        except BrokenPipeError:
            line = b""
        is_complete = line.endswith(b"\n")
        answer = json.loads(line) if is_complete else {"error": (
            f"it was stopped after {LIMITS['cpu_s']} s of processor time, {WALL_S} s or {LIMITS['memory_mib']} MiB, "
            "the most that a dialogue may take"), "line": None}
        if not is_complete or "error" in answer and request is self._setup:
            _end(process)
            self._process = None
        if "error" in answer:
            at = "" if answer["line"] is None else f" (line {answer['line']})"
            raise UserError(f"the chat template of {self.directory} {what}{at}: {answer['error']}")
        return answer["texts"]


def _line(source: int, until: float) -> bytes:
    """One line of a pipe; without its end if that does not come in time."""
    parts = []
    while (left := until - time.monotonic()) > 0 and select.select([source], [], [], left)[0]:
        parts.append(os.read(source, 1 << 16))
        if not parts[-1] or parts[-1].endswith(b"\n"):
            break
    return b"".join(parts)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in filter(None, (process.stdin, process.stdout)):
        try:
            pipe.close()
        except OSError:  # what was not written is for nobody
            pass
    process.wait()


def _now() -> datetime.datetime:
    seconds = os.environ.get(DATE, "")
    if not seconds:
        return datetime.datetime.now()
    if not seconds.isdecimal() or len(seconds) > 11:
        raise UserError(f"{DATE} is '{seconds}', expected seconds since 1970")
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).replace(tzinfo=None)


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _config_reader(path: Path) -> Callable[[Path], dict] | None:
    return None if path.is_dir() else CONFIG_READERS.get(path.suffix.lower())


def chat_files_in(directory: Path) -> list[str]:
    """The files of a directory that say how a dialogue is written, as paths in it; a run keeps them."""
    names = [TEMPLATE_FILE, CONFIG_FILE, SPECIAL_FILE]
    named = sorted(f"{NAMED}/{path.name}" for path in (directory / NAMED).glob("*.jinja"))
    return [name for name in names if (directory / name).exists()] + named


def is_chat_file(name: str) -> bool:
    """Whether `chat_files_in` may name it."""
    return name in (TEMPLATE_FILE, CONFIG_FILE, SPECIAL_FILE) or Path(name).match(f"{NAMED}/*.jinja") and len(
        Path(name).parts) == 2


def chat_files(tokenizer: str | Path) -> dict[str, bytes]:
    """Name -> content of the files that say how a dialogue is written, in or beside `data.tokenizer`; {} if it is no
    path, or none of its files holds a chat template. What a GGUF file says of it becomes a tokenizer_config.json.
    UserError for JSON that cannot be read."""
    path = Path(tokenizer)
    config, templates = templates_in(path) if path.exists() else ({}, {})
    if not templates:
        return {}
    directory = _directory(path)
    own = {CONFIG_FILE: json.dumps(config, indent=2).encode()} if _config_reader(path) else {}
    return {name: read_within(directory, name) for name in chat_files_in(directory)} | own


def templates_in(path: Path) -> tuple[dict, dict[str, str]]:
    """Config of a tokenizer in, or beside, a path, {} without one; and its chat templates by name, the usual one
    "default". What a GGUF file says itself counts before the configs beside it."""
    directory = _directory(path)
    config = _read_config(directory / SPECIAL_FILE) | _read_config(directory / CONFIG_FILE)
    reader = _config_reader(path)
    if reader is not None:
        config |= reader(path)
    in_config = config.get("chat_template")
    found = {"default": in_config}
    if isinstance(in_config, list):  # [{"name": ..., "template": ...}, ...]
        found = {x.get("name"): x.get("template") for x in in_config if isinstance(x, dict)}
    elif isinstance(in_config, dict):
        found = in_config
    for path in sorted((directory / NAMED).glob("*.jinja")):
        found[path.stem] = _read_text(path)
    if (path := directory / TEMPLATE_FILE).exists():
        found["default"] = _read_text(path)
    return config, {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}


def _choose(directory: Path, templates: dict[str, str], name: str) -> str:
    if not templates:
        raise UserError(f"{directory} holds no chat template (chat_template in tokenizer_config.json): use data.name="
                        "'plain'")
    if name and name not in templates:
        raise UserError(f"{directory} holds no chat template called '{name}', expected one of {', '.join(templates)}")
    if not name and len(templates) > 1 and "default" not in templates:
        raise UserError(f"{directory} holds the chat templates {', '.join(templates)}, and none called 'default': put "
                        f"the one to use into {TEMPLATE_FILE}")
    return templates[name or ("default" if "default" in templates else next(iter(templates)))]


def _special_tokens(config: dict) -> dict[str, Any]:
    special = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()
               if key.endswith("_token")}
    return {"tools": None, "documents": None} | {key: x for key, x in special.items() if isinstance(x, str)}


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {path} cannot be read: {error}") from None


def _read_config(path: Path) -> dict:
    try:
        content = from_json(read_text(path)) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    return content if isinstance(content, dict) else {}
