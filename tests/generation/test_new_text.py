"""Text comes back as it was: prompt and written text joined are the text of all tokens, for every kind of tokenizer."""

import json
import types

import numpy as np
import pytest
from toy_lm import Letters

from bd3lm_jax.data.texts import decode_continuation, encode_continuation, num_stable_tokens
from bd3lm_jax.data.tokenizers import SubwordTokenizer
from bd3lm_jax.generation import generation, infill, stream
from bd3lm_jax.generation.options import make_options
from bd3lm_jax.scoring.score import SpecialIds

WORDS = ["▁the", "▁cat", "▁sat", "s", "▁", "é"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def library_json(tokens, pre_tokenizer, decoder, kind="BPE", **model):
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = {"type": kind, "vocab": vocab, **({"merges": []} if kind == "BPE" else {}), **model}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                       "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": inner})


def make(name):
    """A tokenizer and the ids of a text, cut into a prompt of two tokens and others."""
    end = ["</s>", "<unk>"]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    if name == "metaspace":
        tokens = end + WORDS
        model = library_json(tokens, metaspace, metaspace, "WordLevel", unk_token="<unk>")
        pieces = ["▁the", "▁cat", "▁sat", "s"]
    elif name == "byte fallback":
        tokens = end + WORDS + BYTES
        steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                 {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        model = library_json(tokens, {**metaspace, "split": False}, {"type": "Sequence", "decoders": steps},
                             byte_fallback=True, ignore_merges=True)
        pieces = ["▁the", "<0xC3>", "<0xA9>", "<0xE2>", "<0x80>", "<0x99>", "▁sat"]
    elif name == "byte level":
        tokens = end + ["the", "Ġcat", "Ã", "©", "Ġsat"]
        bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = library_json(tokens, bytes_, bytes_, ignore_merges=True)
        pieces = ["the", "Ġcat", "Ã", "©", "Ġsat"]
    else:
        tokens = end + ["the", "cat", "sat", "##s", "."]
        model = library_json(tokens, {"type": "BertPreTokenizer"}, {"type": "WordPiece", "prefix": "##",
                                                                    "cleanup": True},
                             "WordPiece", unk_token="<unk>", continuing_subword_prefix="##",
                             max_input_chars_per_word=100)
        pieces = ["the", "cat", "##s", "sat", "."]
    return SubwordTokenizer(name, model, 0, None), np.array([tokens.index(piece) for piece in pieces])


NAMES = ["metaspace", "byte fallback", "byte level", "word pieces"]
TEXTS = dict(zip(NAMES, ["the cat sats", "theé’ sat", "the caté sat", "the cats sat."]))


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_new_text_are_the_text(name):
    tokenizer, ids = make(name)
    assert tokenizer.decode(ids) == TEXTS[name]
    for cut in range(len(ids) + 1):
        before, new = tokenizer.decode(ids[:cut]).rstrip("\ufffd"), decode_continuation(tokenizer, ids[:cut], ids[cut:])
        assert before + new == TEXTS[name], cut


def whole(tokenizer):
    """As much of a model as texts need."""
    return types.SimpleNamespace(tokenizer=tokenizer, special=SpecialIds(tokenizer.mask_id, tokenizer.end_id))


@pytest.mark.parametrize("name", NAMES)
def test_samples_and_stops(name):
    tokenizer, ids = make(name)
    lm, prompt = whole(tokenizer), 1
    options = make_options()
    sample = generation.postprocess(lm, options, ids[prompt:], 1, "length", ids[:prompt])
    assert tokenizer.decode(ids[:prompt]) + sample.text == TEXTS[name]
    stop = sample.text[-4:-2]
    cut = generation.postprocess(lm, make_options(stop=[stop]), ids[prompt:], 1, "length", ids[:prompt])
    assert cut.text == sample.text[:sample.text.index(stop)] and cut.stop == "string"
    assert decode_continuation(tokenizer, ids[:prompt],
                               cut.tokens) == cut.text[:len(decode_continuation(tokenizer, ids[:1], cut.tokens))]


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_a_stream_are_the_text(name):
    """Left to right, a token a step: what is committed never changes, and ends as the sample."""
    tokenizer, ids = make(name)
    lm, committed = whole(tokenizer), ""
    view = stream._RowTracker.__new__(stream._RowTracker)
    view._lm, view._options, view._begin = lm, make_options(), 1
    for done in range(len(ids) + 1):
        row = np.where(np.arange(len(ids)) < max(done, 1), ids, tokenizer.mask_id)
        text, tentative = view._texts(row, done - 1)
        assert text.startswith(committed) or committed.startswith(text)
        committed = max(committed, text, key=len)
        assert tentative.count(stream.MASK_SIGN) == len(ids) - max(done, 1)
    expected = generation.postprocess(lm, make_options(), ids[1:], 1, "length", ids[:1]).text
    assert expected.startswith(committed)


def test_bytes_are_certain_once_a_whole_token_follows():
    tokenizer, ids = make("byte fallback")
    assert [num_stable_tokens(tokenizer, ids[:n]) for n in range(8)] == [0, 1, 1, 1, 1, 1, 1, 7]
    plain, ids = make("byte level")
    assert num_stable_tokens(plain, ids) == len(ids) and num_stable_tokens(Letters(), [1, 2]) == 2


def test_text_that_goes_on_has_no_space_before_it():
    tokenizer, _ = make("byte fallback")
    alone, behind = tokenizer.encode("s"), encode_continuation(tokenizer, "s")
    assert tokenizer.decode(np.concatenate([tokenizer.encode("the"), alone])) == "the s"
    assert tokenizer.decode(np.concatenate([tokenizer.encode("the"), behind])) == "thes"
    assert tokenizer.decode(np.concatenate([tokenizer.encode("the"), encode_continuation(tokenizer, " cat")])) == \
        "the cat"
    level, _ = make("byte level")
    assert encode_continuation(level, " cat").tolist() == level.encode(" cat").tolist()


@pytest.mark.parametrize("name, text", [("byte fallback", "the[MASK]s sat[MASK] sats"),
                                        ("byte level", "the[MASK] cat")])
def test_infill_leaves_fixed_text_as_it_was(name, text):
    lm = whole(make(name)[0])
    lm.config = types.SimpleNamespace(model=types.SimpleNamespace(vocab_size=lm.tokenizer.vocab_size))
    draft = infill._candidate(lm, 0, infill.parse(lm, text), iter([1] * text.count("[MASK]")))
    ids = draft.ids.copy()
    hole = lm.tokenizer.encode(" cat")[-1]
    for start, _ in draft.spans:
        ids[start] = hole
    found = infill._result(lm, draft, ids, 1, None)
    assert found.text == text.replace("[MASK]", " cat")
    assert [filled.text for filled in found.spans] == [" cat"] * len(draft.spans)
