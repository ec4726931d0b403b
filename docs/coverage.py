"""How often the 95 % intervals of this library hold the truth: python -m docs.coverage [TRIALS]

The population are the 1,035 documents of *Persuasion* with what they cost under models that count (bigram and unigram
of a 2048-token BPE, 4-gram of bytes), trained on the other novels. A trial draws documents with replacement and asks
whether the interval of the library holds the figure of the population. With noise: every document's cost is read from
two draws, as a diffusion model's is. A missing interval holds nothing. Prints a Markdown table.
"""

import math
import sys
from functools import partial

import numpy as np

from bd3lm_jax.config import Config
from bd3lm_jax.core import stats
from bd3lm_jax.data import corpora
from bd3lm_jax.data.prepare import prepare_tokenizer
from bd3lm_jax.data.textmetrics import ngram_nats
from bd3lm_jax.data.tokenizers import ByteTokenizer
from configs import tiny

DOCUMENTS = (3, 10, 30, 200, 1035)
NOISE = 0.2  # standard deviation of a draw, part of a document's cost


def population() -> dict[str, np.ndarray]:
    """Of every document: its tokens, bytes and words, and its nats under each model."""
    data = Config.from_dict(tiny.get_config().to_dict()).data
    texts = {split: list(corpora.load_documents(data, split)) for split in ("train", "test")}
    found = {"bytes": np.array([len(text.encode()) + 1.0 for text in texts["test"]]),
             "words": np.array([len(text.split()) + 1.0 for text in texts["test"]])}
    for name, tokenizer, order in (("bigram", prepare_tokenizer(data), 2), ("unigram", prepare_tokenizer(data), 1),
                                   ("bytes 4-gram", ByteTokenizer(), 4)):
        train, test = ([np.append(ids, tokenizer.end_id) for ids in tokenizer.encode_batch(texts[split])]
                       for split in ("train", "test"))
        nats = ngram_nats(np.concatenate(train), np.concatenate(test), tokenizer.vocab_size, order)
        document = np.repeat(np.arange(len(test)), list(map(len, test)))
        found[name] = np.bincount(document, nats)
        if order == 2:
            found["tokens"] = np.bincount(document).astype(np.float64)
    return found


def kinds(documents: dict[str, np.ndarray]) -> dict[str, tuple]:
    """By kind of interval: (function of drawn documents and a generator -> stats.Interval, truth)."""
    def ratio(model, unit, noise, drawn, rng):
        nats = with_noise(drawn[model], noise, rng)
        return stats.two_part_interval(nats, nats, drawn[unit])

    def difference(ours, theirs, unit, drawn, rng):
        del rng
        return stats.difference_interval(*(stats.Estimates(drawn[model][None], drawn[model][None], drawn[unit])
                                           for model in (ours, theirs)), same_rows=True)

    def figure(model, unit):
        return documents[model].sum() / documents[unit].sum()

    found = {}
    for model in ("bigram", "unigram"):
        for name, unit in (("nats a token", "tokens"), ("bits a byte", "bytes"), ("word perplexity", "words")):
            found[f"{name}, {model}"] = partial(ratio, model, unit, 0), figure(model, unit)
    found["bits a byte with noise, bigram"] = partial(ratio, "bigram", "bytes", NOISE), figure("bigram", "bytes")
    for ours, theirs, name, unit in (("bigram", "unigram", "nats a token", "tokens"),
                                     ("bigram", "unigram", "bits a byte", "bytes"),
                                     ("bigram", "bytes 4-gram", "bits a byte", "bytes")):
        found[f"{name}, {ours} less {theirs}"] = (partial(difference, ours, theirs, unit),
                                                  figure(ours, unit) - figure(theirs, unit))
    return found


def with_noise(nats_N: np.ndarray, noise: float, rng) -> np.ndarray:
    """Two draws of every document, or the one exact cost."""
    return nats_N * (1 + noise * rng.standard_normal((2, len(nats_N)))) if noise else nats_N[None]


def coverage(trials: int, sizes=DOCUMENTS, seed: int = 0) -> dict[str, list[float]]:
    """Part of the trials whose interval holds the truth, by kind, for each number of documents."""
    documents, rng = population(), np.random.default_rng(seed)
    found = {}
    for name, (interval, truth) in kinds(documents).items():
        found[name] = []
        for size in sizes:
            inside = 0
            for index in rng.integers(0, len(documents["bytes"]), (trials, size)):
                measured = interval({key: values[index] for key, values in documents.items()}, rng)
                inside += measured.low <= truth <= measured.high
            found[name].append(inside / trials)
    return found


def main(trials: int) -> None:
    print(f"| 95 % interval of | {' | '.join(f'{size:,}' for size in DOCUMENTS)} |")
    print("|---" * (1 + len(DOCUMENTS)) + "|")
    for name, parts in coverage(trials).items():
        print(f"| {name} | {' | '.join(f'{part:.3f}' for part in parts)} |")
    print(f"\n{trials} trials: a coverage of .95 has a standard error of {math.sqrt(0.95 * 0.05 / trials):.4f}.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4000)
