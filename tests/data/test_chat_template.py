"""Chat templates: what transformers renders (tests/data/tokenizers/classes/chats.json), and programs that misbehave."""

import datetime
import json

import pytest
from places import DATA

pytest.importorskip("jinja2")
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import chat_template
from bd3lm_jax.data.chat_template import ChatTemplate

CHATS = json.loads((DATA / "tokenizers" / "classes" / "chats.json").read_text())
MESSAGES = CHATS["messages"]
ENDLESS = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def make(tmp_path):
    def made(template, **config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
        return ChatTemplate(tmp_path)
    return made


@pytest.mark.parametrize("number", range(0, len(CHATS["chats"]), 2))
def test_what_transformers_renders(make, number):
    """Without and with the beginning of an answer."""
    plain, more = CHATS["chats"][number:number + 2]
    template = make(plain["template"], eos_token={"content": "</s>"}, bos_token="<s>")
    assert template.render(MESSAGES, [(len(MESSAGES), False), (len(MESSAGES), True)]) == [plain["text"], more["text"]]
    assert template.render(MESSAGES, []) == []


def test_the_date(make, monkeypatch):
    template = "{{ strftime_now('%Y-%m-%d') }}"
    assert datetime.date.fromisoformat(make(template).render(MESSAGES, [(1, False)])[0]).year >= 2024
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert make(template).render(MESSAGES, [(1, False)]) == ["1970-01-02"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH is 'today', expected seconds since 1970"):
        make(template)


@pytest.mark.parametrize("template, message", [
    ("a\n{% for %}", r"is not valid \(line 2\): Expected an expression"),
    ("\n\n{{ raise_exception('roles\n must alternate') }}", r"refuses a dialogue \(line 3\): roles must alternate"),
    ("a\n{{ 1 / 0 }}", r"\(line 2\): ZeroDivisionError: division by zero"),
    ("{{ messages[0].content + 1 }}", r"\(line 1\): TypeError: can only concatenate str"),
    ("\n{{ messages[99].content }}", r"\(line 2\): list object has no element 99"),
    ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", r"\(line 1\): RecursionError"),
    ("{{ 'a' * 10 ** 10 }}", r"\(line 1\): MemoryError"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", r"\(line 1\): OverflowError: Range too big"),
    ("{% for i in range(99999) %}{% for i in range(99999) %}xxxx{% endfor %}{% endfor %}", "more than 4,194,304 chara"),
    ("{{ messages.append(1) }}", r"\(line 1\): access to attribute 'append' of 'list' object is unsafe"),
    ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ messages | nothing }}", r"is not valid \(line 1\): No filter named 'nothing'"),
    ("(" * 5 + "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is not valid: RecursionError"),
])
def test_errors_are_one_line_with_their_place(make, template, message):
    with pytest.raises(UserError, match=f"^the chat template of .*{message}") as error:
        make(template).render(MESSAGES, [(1, False)])
    assert "\n" not in str(error.value)


def test_an_endless_template_is_stopped(make, monkeypatch):
    monkeypatch.setattr(chat_template, "LIMITS", {**chat_template.LIMITS, "cpu_s": 1})
    template = make("{% if messages | length > 1 %}" + ENDLESS + "{% endif %}ok")
    for _ in range(2):  # it begins anew after that
        assert template.render(MESSAGES, [(1, False)]) == ["ok"]
        with pytest.raises(UserError, match="refuses a dialogue: it was stopped after 1 s of processor time"):
            template.render(MESSAGES, [(2, False)])


def test_named_templates(make, tmp_path):
    def named(*names):
        return [{"name": name, "template": name.upper()} for name in names]

    assert make(named("tool_use", "default")).source == "DEFAULT" and make(named("only")).source == "ONLY"
    with pytest.raises(UserError, match="holds the chat templates a, b, and none called 'default': put the one to use"):
        make(named("a", "b"))
    assert ChatTemplate(tmp_path, "b").source == "B"
    with pytest.raises(UserError, match="no chat template called 'c', expected one of a, b"):
        ChatTemplate(tmp_path, "c")
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("more")
    assert ChatTemplate(tmp_path).source == "file" and ChatTemplate(tmp_path, "rag").source == "more"


def test_no_process_outlives_its_template(make):
    template = make("x")
    template.render(MESSAGES, [(1, False)])
    process = template._process
    del template
    assert process.poll() is not None
