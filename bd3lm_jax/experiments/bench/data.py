"""The data path: reading batches from prepared rows, and preparing them, each against the least that it could cost.

loader is what training reads (memory-mapped rows with their segments and positions); memory takes rows of an array of
ready token ids. prepare tokenises, packs and writes the embedded corpus; tokenizer only tokenises text in memory.
"""

import dataclasses
import tempfile
from collections.abc import Callable

import numpy as np

from bd3lm_jax.config import DataConfig
from bd3lm_jax.data import corpora
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.data.prepare import prepare
from bd3lm_jax.data.tokenizers import get_tokenizer
from bd3lm_jax.experiments.bench.runner import Variant, compare

LAYOUTS = ("wrap", "pack")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes: `batch` rows of `length` tokens a batch, `batches` a run; documents in blocks of `block_size` if packed.
    `path`: a text file, one document a line, or "" for the embedded corpus."""

    batch: int
    length: int
    batches: int
    block_size: int
    tokenizer: str
    path: str


AUSTEN = Case(batch=32, length=1024, batches=200, block_size=16, tokenizer="gpt2", path="")
NOTE = "Ratios to memory (reading) and to tokenizer (preparing). Rows lie in the page cache; CPU: all threads."
AGAINST = ()
LIMITS = ()


def run(rounds: int, against: str) -> list[dict]:
    """Rows of the embedded corpus with the GPT-2 tokenizer; they also have rows_per_s and tokens_per_s."""
    del against
    return run_case(AUSTEN, rounds)


def run_case(case: Case, rounds: int) -> list[dict]:
    """Both halves for every layout, in a temporary cache directory."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for layout in LAYOUTS:
            data = DataConfig(source="text" if case.path else "austen", path=case.path, tokenizer=case.tokenizer,
                              seq_len=case.length, packing=layout, cache_dir=directory, workers=1)
            rows += preparing(case, data, rounds) + reading(case, data, rounds)
    return rows


def reading(case: Case, data: DataConfig, rounds: int) -> list[dict]:
    """`batches` batches a run."""
    prepared = prepare(data, "train", case.block_size, get_tokenizer(case.tokenizer, tuple))
    loader = Loader(prepared, case.batch, seed=0, sharding=None)
    ids = [loader.get(step)[0] for step in range(case.batches)]
    memory = prepared.tokens(np.arange(len(prepared)))
    variants = _variants(memory=lambda: [memory[row_ids] for row_ids in ids],
                         loader=lambda: [loader.get(step) for step in range(case.batches)])
    rows = compare(f"reading {case.batches} batches of {case.batch} x {case.length}, {data.packing}", variants,
                   "memory",
                   rounds)
    num_rows = case.batches * case.batch
    return _with_rates(rows, num_rows, num_rows * case.length)


def preparing(case: Case, data: DataConfig, rounds: int) -> list[dict]:
    """The train split, from text to rows on disk."""
    tokenizer = get_tokenizer(case.tokenizer, tuple)
    documents = list(corpora.open_corpus(data, "train").documents())

    def build():
        with tempfile.TemporaryDirectory(dir=data.cache_dir) as empty:
            return prepare(dataclasses.replace(data, cache_dir=empty), "train", case.block_size, tokenizer)

    meta = build().meta
    rows = compare(f"preparing {meta['tokens']:,} tokens ({case.tokenizer}), {data.packing}",
                   _variants(tokenizer=lambda: tokenizer.encode_batch(documents), prepare=build), "tokenizer", rounds)
    return _with_rates(rows, meta["rows"], meta["tokens"])


def _variants(**actions: Callable) -> list[Variant]:
    return [Variant(name, action, wait=lambda result: result) for name, action in actions.items()]


def _with_rates(rows: list[dict], num_rows: int, tokens: int) -> list[dict]:
    return [row | {"rows_per_s": num_rows / row["median_ms"] * 1e3, "tokens_per_s": tokens / row["median_ms"] * 1e3}
            for row in rows]
