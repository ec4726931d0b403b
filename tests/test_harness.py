"""The methods that lm-evaluation-harness calls, on stand-ins for its requests; and the harness itself if installed."""

import copy
import functools
import sys
import types

import numpy as np
import pytest
from scipy.special import log_softmax
from toy_lm import CONTEXT, make_lm, masked

from bd3lm_jax import harness
from bd3lm_jax.config import Config, DataConfig
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.likelihood import conditional

END, MASK = 3, 12


class Letters:
    """Twelve letters; in texts a newline is the fourth one, which is the end token."""

    mask_id, end_id, identity = MASK, END, "letters"

    def encode(self, text):
        return np.array([END if letter == "\n" else ord(letter) - ord("a") for letter in text], np.int32)

    def decode(self, ids):
        return "".join("\n" if i == END else chr(ord("a") + i) for i in ids)


LETTERS = Letters()
OBJECTIVES = {"ar": AR(bos=True), "ar without beginning": AR(bos=False), "block": masked(4), "mdlm": masked(CONTEXT)}


def asked(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


@pytest.fixture
def make(monkeypatch):
    """A harness model of the toy network with an objective, by its name in OBJECTIVES."""
    @functools.cache
    def model(name, **options):
        lm = make_lm(OBJECTIVES[name], tokenizer=LETTERS)
        monkeypatch.setattr(harness, "load", lambda path, weights: lm)
        return harness.Harness(path="toy", **options)
    return model


def chain_rule(lm, text, start):
    """Log-likelihood of text[start:] under an autoregressive model, and whether each token is the likeliest."""
    inputs = LETTERS.encode("\n" + text if lm.config.diffusion.bos else text)[None, :-1]
    targets = LETTERS.encode(text)[start:]
    found = log_softmax(np.asarray(lm.logits(inputs)[0], np.float64)[-len(targets):, :MASK], -1)
    return found[np.arange(len(targets)), targets].sum(), bool((found.argmax(-1) == targets).all())


@pytest.mark.parametrize("name", ["ar", "ar without beginning"])
def test_likelihood_of_autoregression(make, name):
    model = make(name)
    found = model.loglikelihood(asked(("abc", "efg"), ("a", "h"), ("", "bce")))
    beginning = "" if name == "ar" else "\n"  # the harness's convention for a model that needs one
    for (nats, greedy), (text, start) in zip(found, [("abcefg", 3), ("ah", 1), (beginning + "bce", len(beginning))]):
        assert (nats, greedy) == (pytest.approx(chain_rule(model.lm, text, start)[0], rel=1e-5),
                                  chain_rule(model.lm, text, start)[1])


def test_bounds_are_those_of_score(make):
    options = {"draws": 3, "seed": 5, "estimator": "exact_count"}
    model = make("block", **options, greedy=False, batch_size="4")
    found = model.loglikelihood(asked(("abc", "efghi"), ("abc", "aab")))
    expected = conditional.score(model.lm, [[0, 1, 2]] * 2, [[4, 5, 6, 7, 8], [0, 0, 1]], **options, greedy=False,
                                 batch=4)
    assert [nats for nats, _ in found] == pytest.approx([x.nats for x in expected]) and not any(x for _, x in found)
    assert model.get_model_info()["mean_mc_se"] == pytest.approx(np.mean([x.mc_se for x in expected]))
    assert model.get_model_info()["draws"] == 3


def test_a_long_context_loses_its_beginning(make):
    model = make("ar")
    found, = model.loglikelihood(asked(("abcefghijk" * 4, "lab")))
    assert found[0] == pytest.approx(chain_rule(model.lm, ("abcefghijk" * 4)[-21:] + "lab", 21)[0], rel=1e-5)
    with pytest.raises(UserError, match="0 [+] 25 tokens, expected at most 24"):
        model.loglikelihood(asked(("abc", "a" * 25)))


@pytest.mark.parametrize("size", [0, 1, 23, 24, 25, 46, 47, 48, 100])
@pytest.mark.parametrize("beginning", [[], [99]])
def test_windows_score_every_token_once(size, beginning):
    ids, scored = np.arange(size), []
    pieces = list(harness.windows(ids, beginning, 24))
    for i, (prompt, continuation) in enumerate(pieces):
        assert 1 <= len(continuation) and len(prompt) + len(continuation) <= 24
        before = list(beginning) if i == 0 else list(range(continuation[0] - len(prompt), continuation[0]))
        assert prompt.tolist() == before and (i == 0 or len(prompt))
        scored += continuation.tolist()
    assert scored == list(range(size))
    if len(pieces) > 1:
        assert len(pieces[-1][0]) + len(pieces[-1][1]) == 24  # the last one has all the context it can have


@pytest.mark.parametrize("name", ["ar", "ar without beginning"])
def test_rolling_likelihood_of_autoregression(make, name):
    model, text = make(name), "abcefghijkl" * 3
    beginning = "" if name == "ar" else "\n"
    first = 24 - len(beginning)
    expected = chain_rule(model.lm, beginning + text[:first], len(beginning))[0]
    expected += chain_rule(model.lm, text[33 - 24:], 24 - (33 - first))[0]
    short = chain_rule(model.lm, beginning + "abc", len(beginning))[0]
    assert model.loglikelihood_rolling(asked((text,), ("",), ("abc",))) == pytest.approx([expected, 0, short], rel=1e-5)


def test_rolling_bound_of_whole_blocks(make, monkeypatch):
    """After an end token; without one, where rows began with documents, the bound is that of the whole row."""
    model, ids = make("block", estimator="exact"), LETTERS.encode("abcefghijkla")
    follows, = conditional.score(model.lm, [[END]], [ids], estimator="exact", draws=1, seed=0, greedy=False, batch=1)
    assert model.loglikelihood_rolling(asked(("abcefghijkla",))) == pytest.approx([follows.nats], rel=1e-5)
    monkeypatch.setattr(model, "lm", copy.copy(model.lm))
    model.lm.config = Config(model.lm.config.model, model.lm.config.diffusion, data=DataConfig(packing="pack"))
    expected = -model.lm.nll(ids[None], estimator="exact").total
    assert model.loglikelihood_rolling(asked(("abcefghijkla",))) == pytest.approx([expected], rel=1e-5)
    assert abs(expected - follows.nats) > 1e-3


@pytest.mark.ci_slow
@pytest.mark.parametrize("name", ["ar without beginning", "block", "mdlm"])
def test_texts_stop_where_they_should(make, name):
    model = make(name, seed=3)
    free = {"until": [], "max_gen_toks": 9, "do_sample": True}
    whole, short = model.generate_until(asked(("ab", free), ("abce", {**free, "max_gen_toks": 5})))
    assert 0 < len(short) <= 5 and 0 < len(whole) <= 9
    letter = whole[len(whole) // 2]
    cut, _ = model.generate_until(asked(("ab", {**free, "until": ["", letter]}), ("", free)))
    assert cut == whole.split(letter)[0]


def test_greedy_texts(make):
    """The same whatever the seed, found greedy by `loglikelihood`, and half a context of prompt is kept."""
    for name in ("ar", "block"):
        arguments = {"until": [], "max_gen_toks": 6}
        text, long = make(name).generate_until(asked(("ab", arguments), ("c" * 40, {"max_new_tokens": 100})))
        assert text == make(name, seed=9).generate_until(asked(("ab", arguments), ("b", arguments)))[0]
        assert len(text) == 6 and len(long) <= CONTEXT // 2
        other = ("b" if text[0] == "a" else "a") + text[1:]
        assert [x for _, x in make(name).loglikelihood(asked(("ab", text), ("ab", other)))] == [True, False]


class Signs(Letters):
    """In chats "<" is a token of its own, the twelfth letter."""

    def encode_special(self, text):
        return self.encode(text.replace("<", "l"))


TEMPLATE = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "<{{ m.role[0] }}{{ m.content | trim }}"
            "{% if not loop.last or m.role == 'user' %}{{ '\\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<a{% endif %}")


def test_chat_templates(monkeypatch, tmp_path, capsys):
    pytest.importorskip("jinja2")
    lm = make_lm(OBJECTIVES["ar"], tokenizer=Signs())
    monkeypatch.setattr(harness, "load", lambda path, weights: lm)
    model = harness.Harness(path=str(tmp_path))
    with pytest.raises(UserError, match="holds no chat template"):
        model.chat_template(True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "other", "template": "x"}]}')
    assert model.chat_template(False) is None and model.chat_template("other") == "x"
    assert model.chat_template(True) == TEMPLATE and model.tokenizer_name == "bd3lm_jax-letters"
    chat = [{"role": "user", "content": "bc "}, {"role": "assistant", "content": "efg "}]
    assert model.apply_chat_template(chat[:1]) == "<ubc\n<a"
    assert model.apply_chat_template(chat, add_generation_prompt=False) == "<ubc\n<aefg "
    system = {"role": "system", "content": "j"}  # which this template refuses
    assert model.apply_chat_template([system, *chat[:1]]) == "<ubc\n<a"
    assert model.apply_chat_template([system, *chat], add_generation_prompt=False) == "<ubc\n<aefg "
    said = capsys.readouterr().err
    assert "refuses a dialogue (line 1): no system; system messages are left out" in said and said.count("warning") == 1
    with pytest.raises(UserError, match=r"refuses a dialogue \(line 1\): no system"):
        model.apply_chat_template([system])
    written, pairs = [], []
    monkeypatch.setattr(lm, "generate", lambda prompts, **options: written.append(prompts) or [
        types.SimpleNamespace(tokens=[0, 1], text="ab")] * len(prompts))
    assert model.generate_until(asked(("<ubc\n<a", {"until": []}))) == ["ab"]
    assert written[0][0].tolist() == [11, 20, 1, 2, 3, 11, 0]
    monkeypatch.setattr(model, "_score", lambda found, greedy: pairs.extend(found) or [])
    model.loglikelihood(asked(("<a", "bc")))
    assert [ids.tolist() for ids in pairs[0]] == [[11, 0], [1, 2]]


def test_options_of_the_sampler(make, monkeypatch):
    """Every option of `generate` is a model argument; what a task asks for comes first."""
    model, chosen = make("block", steps=2, min_p=0.1, temperature=0.5, sampler="first_hitting"), []
    monkeypatch.setattr(model, "lm", copy.copy(model.lm))
    monkeypatch.setattr(model.lm, "generate", lambda prompts, **options: chosen.append(options) or [
        types.SimpleNamespace(tokens=[0], text="a")] * len(prompts))
    model.generate_until(asked(("ab", {"until": []}), ("abc", {"do_sample": True, "temperature": 0.7, "min_p": 0.2,
                                                               "threshold": 0.9})))
    plain, asked_for = ({name: x for name, x in options.items() if name not in ("length", "seed", "stop")}
                        for options in chosen)
    assert plain == {"steps": 2, "min_p": 0.1, "temperature": 0.5, "sampler": "first_hitting"}
    assert asked_for == plain | {"temperature": 0.7, "min_p": 0.2, "threshold": 0.9}
    assert model.get_model_info()["steps"] == 2


@pytest.mark.parametrize(("options", "message"), [
    ({"path": "toy", "min_q": 0.1}, "unknown model argument 'min_q': did you mean 'min_p'"),
    ({"path": ""}, "give --model_args path=RUN_DIRECTORY"),
    ({"path": "toy", "drws": 3}, "unknown model argument 'drws': did you mean 'draws'"),
    ({"path": "toy", "batch_size": 0}, "batch_size is 0"),
    ({"path": "toy", "batch_size": "many"}, "batch_size is 'many', expected a positive number or auto"),
])
def test_bad_model_arguments(make, options, message):
    make("ar")
    with pytest.raises(UserError, match=message):
        harness.Harness(**options)


def test_bad_requests(make):
    model = make("block", draws=0)
    with pytest.raises(UserError, match="draws is 0"):
        model.loglikelihood(asked(("a", "b")))
    with pytest.raises(UserError, match="a continuation is empty"):
        model.loglikelihood(asked(("a", "")))
    with pytest.raises(UserError, match="unknown generation argument 'num_beams'"):
        model.generate_until(asked(("a", {"num_beams": 4})))


def test_a_checkpoint_without_tokenizer(monkeypatch):
    monkeypatch.setattr(harness, "load", lambda path, weights: make_lm())
    with pytest.raises(UserError, match="toy has no tokenizer, and the harness asks in texts"):
        harness.Harness(path="toy")


def test_the_harness_knows_the_model(make):
    api = pytest.importorskip("lm_eval.api", reason="lm-eval is not installed")
    kind = harness.register()
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    make("ar")
    model = get_model("bd3lm_jax").create_from_arg_string("path=toy,draws=2", {"batch_size": "auto", "device": None})
    assert isinstance(model, api.model.LM) and type(model) is kind is harness.register()
    request = Instance("loglikelihood", {}, ("abc", "efg"), 0)
    assert model.loglikelihood([request]) == [pytest.approx(chain_rule(model.lm, "abcefg", 3), rel=1e-5)]


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    harness.register.cache_clear()
    with pytest.raises(UserError, match="pip install lm-eval"):
        harness.register()
