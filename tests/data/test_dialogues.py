"""Dialogues to rows: which tokens are prompts, by the texts they come from."""

import json

import numpy as np
import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import loader
from bd3lm_jax.data.corpora import load_documents
from bd3lm_jax.data.dialogues import Dialogue
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.tokenizers import ByteTokenizer

LINES = [{"prompt": "two and two?", "response": "four"}, {"prompt": "café", "response": "crème"},
         {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"},
                       {"role": "assistant", "content": "hi"}, {"role": "user", "content": "bye"},
                       {"role": "assistant", "content": "so long"}]}] * 3
TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture
def dialogues(tmp_path, data_config):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return lambda **changes: data_config(**{"source": "sft", "path": str(path), "valid_fraction": 0.1} | changes)


def expected(line):
    """(text, is an answer) of every piece of a dialogue without a template."""
    if "messages" not in line:
        return [(line["prompt"], False), (line["response"], True)]
    return [(x["content"], x["role"] == "assistant") for x in line["messages"]]


@pytest.mark.parametrize("layout", ["pack", "wrap", "pad"])
def test_rows_know_their_prompts(dialogues, layout):
    """Token by token: bytes of prompts 1, bytes of answers and end tokens 0, padding 0."""
    data = dialogues(packing=layout, seq_len=32)
    rows = prepare(data, "train", 4, ByteTokenizer())
    ids = np.arange(len(rows))
    tokens, prompt, documents = rows.tokens(ids), rows.prompt(ids), rows.documents(ids)
    for number, line in enumerate(LINES[:-1]):
        wanted = [(byte, not answer) for text, answer in expected(line) for byte in text.encode()] + [(256, False)]
        at = documents == number
        found = list(zip(tokens[at].tolist(), prompt[at].astype(bool).tolist()))
        assert sorted(found) == sorted(wanted)
        if layout != "pack":  # a piece that was cut off may fill a gap before the others
            assert found == wanted
    assert not prompt[documents < 0].any() and prompt.dtype == np.float32
    assert np.array_equal(rows.scored(ids), (documents >= 0) & (prompt == 0))
    assert loader.read_rows(rows, ids)["prompt"].shape == tokens.shape


def test_headings(dialogues):
    documents = list(load_documents(dialogues(name="plain"), "train"))
    assert documents[0] == "### User:\ntwo and two?\n\n### Assistant:\nfour"
    assert documents[2].startswith("### System:\nbe kind\n\n### User:\nhello\n\n### Assistant:\nhi\n\n### User:\nbye")
    assert [text for text, answer in documents[2].parts if answer] == ["hi", "so long"]
    assert "".join(text for text, _ in documents[2].parts) == documents[2]


def test_another_template_prepares_other_rows(dialogues):
    plain, joined = (prepare(dialogues(name=name), "train", 4, ByteTokenizer()) for name in ("plain", ""))
    assert plain.path != joined.path and plain.meta["tokens"] > joined.meta["tokens"]


def test_chat_templates(dialogues, tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<end>"}))
    document = list(load_documents(dialogues(name="chat", tokenizer=str(tmp_path)), "train"))[2]
    assert document == ("<system>be kind<end><user>hello<end><assistant>hi<end><user>bye<end><assistant>so long<end>")
    assert [text for text, answer in document.parts if answer] == ["hi<end>", "so long<end>"] and document.special
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    with pytest.raises(UserError, match="changes what it wrote when a dialogue goes on"):
        list(load_documents(dialogues(name="chat", tokenizer=str(tmp_path)), "train"))


def test_special_tokens_of_a_template_are_read(tokenizer_json):
    from bd3lm_jax.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_json)
    ids = tokenizer.encode_special("the<|endoftext|>")
    assert ids[-1] == tokenizer.end_id and tokenizer.end_id not in tokenizer.encode("the<|endoftext|>")
    assert ByteTokenizer().encode_special("a<b").tolist() == [97, 60, 98]


@pytest.fixture
def tokenizer_json(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.train_from_iterator(["the end"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(("line", "message"), [
    ({"prompt": "x"}, "train.jsonl line 1 has no text 'response': expected 'prompt' and 'response', or 'messages'"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "'messages' is not a list of objects .*system, user, assistant"),
    ({"messages": [{"role": "user", "content": "x"}]}, "line 1 holds no message of role 'assistant'"),
    ([1], "line 1 is a JSON list, expected an object"),
])
def test_lines_that_hold_no_dialogue(tmp_path, data_config, line, message):
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        list(load_documents(data_config(source="sft", path=str(tmp_path / "train.jsonl")), "train"))


def test_templates_that_are_not_there(dialogues, tmp_path):
    with pytest.raises(UserError, match="unknown data.name .how a dialogue becomes text. 'plan': did you mean 'plain'"):
        list(load_documents(dialogues(name="plan"), "train"))
    with pytest.raises(UserError, match="holds no chat template .*: use data.name='plain'"):
        list(load_documents(dialogues(name="chat", tokenizer=str(tmp_path)), "train"))


def test_a_dialogue_is_its_text():
    dialogue = Dialogue([("ask ", False), ("", True), ("tell", True)])
    assert dialogue == "ask tell" and dialogue.parts == (("ask ", False), ("tell", True)) and not dialogue.special
