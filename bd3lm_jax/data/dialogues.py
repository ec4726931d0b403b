"""Prompts and answers for supervised fine-tuning: JSON lines to texts whose parts know whether they are prompt.

A line holds "prompt" and "response", or "messages": a list of {"role", "content"} where every message of the role
"assistant" is an answer. `data.name` says how they become text:
    ""      prompt and answer one after the other, nothing between them
    "plain" every turn under its heading: "### User:", "### Assistant:", "### System:"
    "chat"  the chat template of the directory `data.tokenizer` (needs jinja2), whose special tokens are read as such
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bd3lm_jax.core.errors import UserError, lookup
from bd3lm_jax.core.schema import DataConfig
from bd3lm_jax.core.typed import check_characters
from bd3lm_jax.data.chat_template import ChatTemplate, Messages
from bd3lm_jax.data.corpus import Corpus, json_lines, local_files

ANSWERS = "assistant"  # the role whose messages are answers
ROLES = ("system", "user", ANSWERS)


class Dialogue(str):
    """A text with its parts, (text, whether it is an answer); special: whether special tokens in it are meant."""

    parts: tuple[tuple[str, bool], ...]
    special: bool

    def __new__(cls, parts: Iterable[tuple[str, bool]], special: bool = False) -> "Dialogue":
        whole = tuple((text, answer) for text, answer in parts if text)
        self = super().__new__(cls, "".join(text for text, _ in whole))
        self.parts, self.special = whole, special
        return self

    def __getnewargs__(self) -> tuple:
        """For copies that other processes get."""
        return self.parts, self.special


def sft(data: DataConfig, split: str) -> Corpus:
    """A file or directory of .jsonl files (also .xz, .gz, .bz2), see above. UserError for lines without a dialogue."""
    write, identity = lookup(TEMPLATES, data.name, "data.name (how a dialogue becomes text)")(data)

    def read(path: Path) -> Iterator[Dialogue]:
        dialogues = (write(_messages(path, number, record)) for number, record in json_lines(path))
        return (dialogue for dialogue in dialogues if dialogue.parts)

    return local_files(data, split, ".jsonl", read, key=f"sft {data.name} {identity}")


def _messages(path: Path, number: int, record: dict) -> Messages:
    where = f"{path} line {number}"
    messages = _read_messages(where, record)
    for message in messages:
        check_characters(message["content"], where)
    return messages


def _read_messages(where: str, record: dict) -> Messages:
    if record.get("messages") is None:  # null where another record has some
        missing = [key for key in ("prompt", "response") if not isinstance(record.get(key), str)]
        if missing:
            raise UserError(f"{where} has no text '{missing[0]}': expected 'prompt' and 'response', or 'messages'")
        return [{"role": "user", "content": record["prompt"]}, {"role": ANSWERS, "content": record["response"]}]
    messages = record["messages"]
    is_valid = isinstance(messages, list) and all(
        isinstance(x, dict) and x.get("role") in ROLES and isinstance(x.get("content"), str) for x in messages)
    if not is_valid:
        raise UserError(f"{where}: 'messages' is not a list of objects with \"content\" (text) and \"role\", one of "
                        f"{', '.join(ROLES)}")
    if not any(message["role"] == ANSWERS for message in messages):
        raise UserError(f"{where} holds no message of role '{ANSWERS}': nothing to learn")
    return messages


def _joined(data: DataConfig):
    del data
    return (lambda messages: Dialogue([(x["content"], x["role"] == ANSWERS) for x in messages])), ""


def _plain(data: DataConfig):
    del data

    def write(messages: Messages) -> Dialogue:
        parts = []
        for index, message in enumerate(messages):
            heading = f"### {message['role'].capitalize()}:\n"
            parts += [("\n\n" * (index > 0) + heading, False), (message["content"], message["role"] == ANSWERS)]
        return Dialogue(parts)

    return write, ""


def _chat(data: DataConfig):
    template = ChatTemplate(data.tokenizer)

    def write(messages: Messages) -> Dialogue:
        """An answer is what the template adds to the text that asks for it."""
        answers = [index for index, message in enumerate(messages) if message["role"] == ANSWERS]
        texts = template.render(messages, [call for i in answers for call in ((i, True), (i + 1, False))])
        parts, previous_text = [], ""
        for prompt_text, answered_text in zip(texts[::2], texts[1::2]):
            if not (prompt_text.startswith(previous_text) and answered_text.startswith(prompt_text)):
                raise UserError(f"the chat template of {data.tokenizer} changes what it wrote when a dialogue goes on: "
                                "answers cannot be told from prompts; use data.name='plain'")
            parts += [(prompt_text[len(previous_text):], False), (answered_text[len(prompt_text):], True)]
            previous_text = answered_text
        return Dialogue(parts, special=True)

    return write, template.source


TEMPLATES: dict[str, Callable] = {"": _joined, "plain": _plain, "chat": _chat}
