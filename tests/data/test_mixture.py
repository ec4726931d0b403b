"""Mixtures of sources: exact rates at every moment, each source its own epochs, nothing but seed and step decides."""

import collections
import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bd3lm_jax.config import Config, DataConfig
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data import corpora
from bd3lm_jax.data.corpora import load_documents
from bd3lm_jax.data.domains import open_text
from bd3lm_jax.data.loader import Loader
from bd3lm_jax.data.mixture import MixedRows, SourceSchedule
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.data.tokenizers import ByteTokenizer
from launch.arguments import load_config

BLOCK = 8
FIBONACCI = [1, 1]
while len(FIBONACCI) < 24:
    FIBONACCI.append(sum(FIBONACCI[-2:]))
RATES = {
    "one": [3.0], "halves": [1.0, 1.0], "unlike": [0.7, 0.3], "written": [0.1, 0.2, 0.7], "rare": [1.0, 1e-4],
    "alike": [1.0] * 37, "fibonacci": [float(x) for x in FIBONACCI],
    "random": np.random.default_rng(0).exponential(size=50).tolist(),
    "tiny": [1e-12, 1.0, 3.3333333333333335],
}


@pytest.mark.parametrize("weights", RATES.values(), ids=RATES)
def test_counts_never_leave_their_rates(weights):
    """Counted one by one: after n positions every source has fewer than 1.7 more or less than its weight of n."""
    number = 20_000
    shares = SourceSchedule(weights)
    source, index = shares.assign(np.arange(number))
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    np.testing.assert_array_equal(index, counts[np.arange(number), source] - 1)
    asked = np.arange(1, number + 1)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(counts - asked).max() < 1.7
    for n in (1, 2, 17, 1000, number):
        assert shares.counts(n) == counts[n - 1].tolist()
    assert shares.counts(0) == [0] * len(weights)


def test_rates_are_exact_as_written():
    for n in (10**9, 10**18):
        assert SourceSchedule([0.7, 0.3]).counts(n) == [7 * n // 10, 3 * n // 10]
        assert SourceSchedule([1.0, 2.0, 5.0]).counts(8 * n) == [n, 2 * n, 5 * n]
    assert SourceSchedule([0.125, 0.25]).parts == [1, 2]
    irrational = SourceSchedule([2**0.5, 1.0])
    assert abs(irrational.counts(10**15)[0] / 10**15 - Fraction(2**0.5) / (1 + Fraction(2**0.5))) < 1e-7


def test_far_positions_cost_nothing():
    shares, far = SourceSchedule(RATES["random"]), 10**17
    source, index = shares.assign(np.arange(far, far + 1000))
    before, after = shares.counts(far), shares.counts(far + 1000)
    assert (np.array(after) - before).tolist() == np.bincount(source, minlength=50).tolist()
    for k in np.unique(source):
        assert index[source == k].tolist() == list(range(before[k], after[k]))


class Fake:
    """Rows of which only the number matters."""

    length, path = 4, Path("cache/rows")

    def __init__(self, size, name):
        self.size = size
        self.meta = {"hash": name, "rows": size, "tokens": 4 * size, "documents": size, "bytes": size,
                     "split": "train", "layout": "wrap"}

    def __len__(self):
        return self.size


def test_every_source_goes_through_its_rows_epoch_after_epoch():
    rows = MixedRows({"a": Fake(7, "a"), "b": Fake(5, "b"), "c": Fake(7, "c")}, [0.5, 0.2, 0.3])
    ids = rows.ids_at(3, np.arange(1000))
    firsts = {"a": range(0, 7), "b": range(7, 12), "c": range(12, 19)}
    orders = {}
    for name, own in firsts.items():
        found = [int(i) for i in ids if i in own]
        assert abs(len(found) - 1000 * dict(a=0.5, b=0.2, c=0.3)[name]) < 2
        epochs = [found[i:i + len(own)] for i in range(0, len(found) - len(own), len(own))]
        assert all(sorted(epoch) == list(own) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 5
        orders[name] = [i - own[0] for i in found]
    assert orders["a"][:70] != orders["c"][:70]  # sources of the same size
    assert ids.tolist() != rows.ids_at(4, np.arange(1000)).tolist()
    assert [x["rows_seen"] for x in rows.usage(1000)] == list(map(len, orders.values()))
    assert rows.usage(1000)[1]["epochs"] == 200 / 5


def test_batches_depend_on_seed_and_place_alone():
    rows = MixedRows({"a": Fake(70, "a"), "b": Fake(50, "b")}, [0.5, 0.2])
    whole = rows.ids_at(1, np.arange(960)).tolist()
    for batch in (1, 6, 32):
        order = np.random.default_rng(batch).permutation(960 // batch)
        found = {step: rows.ids_at(1, np.arange(step * batch, (step + 1) * batch)).tolist() for step in order}
        assert sum((found[step] for step in range(960 // batch)), []) == whole


@pytest.fixture
def mixed_config(data_config, tmp_path):
    (tmp_path / "letters.txt").write_text("".join(f"{'abc' * (1 + i % 5)}{i}\n" for i in range(40)))
    records = "".join(json.dumps({"text": "x" * (1 + i % 9)}) + "\n" for i in range(30))
    (tmp_path / "more.jsonl").write_text(records)
    specs = f"text:{tmp_path / 'letters.txt'}", f"jsonl:{tmp_path / 'more.jsonl'}"

    def make(weights=(0.7, 0.3), **changes):
        return data_config(source="mixture", mixture=tuple(zip(specs, weights)), **changes)

    return make


def test_rows_are_those_of_the_sources(mixed_config, data_config, tmp_path):
    rows = prepare(mixed_config(packing="pack"), "train", BLOCK, ByteTokenizer())
    own = [prepare(data_config(source="text", path=str(tmp_path / "letters.txt"), packing="pack"), "train", BLOCK,
                   ByteTokenizer()),
           prepare(data_config(source="jsonl", path=str(tmp_path / "more.jsonl"), packing="pack"), "train", BLOCK,
                   ByteTokenizer())]
    assert [part.path for part in rows.parts] == [part.path for part in own]  # one cache, alone or mixed
    ids = np.random.default_rng(0).integers(0, len(rows), 60)
    for name in ("tokens", "segments", "positions", "scored"):
        expected = np.concatenate([getattr(part, name)(np.arange(len(part))) for part in own])
        found = getattr(rows, name)(ids)
        np.testing.assert_array_equal(found, expected[ids])
        assert found.dtype == expected.dtype
    documents = list(load_documents(mixed_config(), "train"))
    first = own[0].meta["documents"]
    owners = rows.documents(np.arange(len(rows)))
    assert rows.meta["documents"] == len(documents) == owners.max() + 1
    for row, owner in enumerate(owners):
        at = np.flatnonzero(owner >= 0)
        assert all((owner[at] >= first) == (row >= len(own[0])))
    assert sorted(rows.stream().tolist()) == sorted(
        256 if byte == 10 else byte for text in documents for byte in text.encode() + b"\n")
    assert prepare(mixed_config((0.6, 0.4)), "train", BLOCK, ByteTokenizer()).meta["hash"] != rows.meta["hash"]


def test_the_loader_mixes(mixed_config):
    rows = prepare(mixed_config(), "train", BLOCK, ByteTokenizer())
    loader, counts = Loader(rows, 6, 2, None), collections.Counter()
    for step in range(50):
        ids, batch = loader.get(step)
        np.testing.assert_array_equal(batch["tokens"], rows.tokens(ids))
        np.testing.assert_array_equal(ids, rows.ids_at(2, np.arange(6 * step, 6 * step + 6)))
        counts.update((ids >= len(rows.parts[0])).tolist())
    assert abs(counts[True] - 90) < 2


def test_validation_is_over_all_and_over_each(mixed_config):
    """`eval` of the mixture scores the validation texts of all sources, of a source by its name those of that one."""
    data = mixed_config()
    config = SimpleNamespace(data=data, block_size=BLOCK, diffusion=SimpleNamespace(causal=False))
    convention = SimpleNamespace(context_mode="independent", stride=0, first_token="predict", end_token="count",
                                 stride_for=lambda *sizes: 0)
    texts = {name: list(open_text(config.data, config.block_size, ByteTokenizer(), data=name, split="valid",
                                  data_dir="", convention=convention).corpus.documents())
             for name in ("", "mixture", *(spec for spec, _ in data.mixture))}
    everything, again, first, second = texts.values()
    assert everything == again == first + second and len(first) == 4 and len(second) == 3
    rows = prepare(data, "valid", BLOCK, ByteTokenizer())
    assert rows.meta["documents"] == 7


def test_one_tokenizer_from_all_texts(mixed_config):
    tokenizer = prepare_tokenizer(mixed_config(tokenizer="bpe:262"))
    ids = tokenizer.encode("abcabcabcxxxx")
    assert len(ids) < 8  # merges of both sources
    assert prepare_tokenizer(mixed_config((0.1, 0.9), tokenizer="bpe:262")).identity == tokenizer.identity


@pytest.mark.parametrize("changes, message", [
    ({"mixture": ()}, "expected pairs"),
    ({"mixture": (("austen",),)}, "expected pairs"),
    ({"mixture": (("austen", 0.0),)}, "weight of 'austen' is 0.0, expected a positive"),
    ({"mixture": (("austen", -1.0),)}, "is -1.0, expected a positive"),
    ({"mixture": (("austen", float("nan")),)}, "is nan, expected a positive"),
    ({"mixture": (("austen", float("inf")),)}, "is inf, expected a positive"),
    ({"mixture": (("austin", 1.0),)}, "unknown source 'austin': did you mean 'austen'"),
    ({"mixture": (("austen", 1.0), ("austen", 2.0))}, "'austen' 2 times"),
    ({"mixture": (("text", 1.0),)}, "expected 'text:PATH'"),
    ({"mixture": (("text:", 1.0),)}, "expected 'text:PATH'"),
    ({"mixture": (("tfds", 1.0),)}, "expected 'tfds:NAME'"),
    ({"mixture": (("austen:x", 1.0),)}, "expected 'austen'"),
    ({"mixture": (("sft:x.jsonl", 1.0),)}, "prompts from answers"),
    ({"mixture": (("mixture", 1.0),)}, "leave it out"),
    ({"mixture": (("austen", 1.0),), "path": "x"}, "data.path='x' has no effect"),
    ({"mixture": (("austen", 1.0),), "name": "x"}, "data.name='x' has no effect"),
    ({"mixture": (("austen", 1.0),), "density": "arithmetic"}, "data.density='arithmetic' has no effect"),
    ({"source": "austen", "mixture": (("austen", 1.0),)}, "use data.source='mixture'"),
])
def test_bad_mixtures_are_one_line(data_config, changes, message):
    with pytest.raises(UserError, match=message) as error:
        corpora.check(data_config(**{"source": "mixture"} | changes))
    assert "\n" not in str(error.value)


def test_missing_files_are_named(data_config):
    data = data_config(source="mixture", mixture=(("austen", 1.0), ("text:/nowhere.txt", 1.0)))
    with pytest.raises(UserError, match="nowhere.txt"):
        prepare(data, "train", BLOCK, ByteTokenizer())


def test_from_the_command_line_and_back_from_json():
    words = ["--config.data.source=mixture", "--config.data.mixture=(('austen', 1), ('arithmetic', 0.5))"]
    config = load_config("configs/tiny.py", words)
    assert config.data.mixture == (("austen", 1.0), ("arithmetic", 0.5))
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and isinstance(again.data, DataConfig)
    for bad, message in (("(('austen', 'much'),)", "expected float"), ("(('austen', 1, 2),)", "expected pairs"),
                         ("((3, 1.0),)", "expected str"), ("('austen', 1.0)", "expected tuple")):
        with pytest.raises(UserError, match=message):
            load_config("configs/tiny.py", [words[0], f"--config.data.mixture={bad}"])
