"""Named texts that no run was trained on, and every other text an evaluation can read, as rows to be scored.

A new domain is one line in DOMAINS. Packaged ones are always there; the others come from a file of `--data_dir`, or
from TensorFlow Datasets where they were prepared.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bd3lm_jax.core import remote, stats
from bd3lm_jax.core.errors import UserError, nearest
from bd3lm_jax.core.schema import DataConfig
from bd3lm_jax.core.stats import ppl_of
from bd3lm_jax.data import corpora, mixture, text_files
from bd3lm_jax.data.corpus import ALL_SPLITS, Corpus
from bd3lm_jax.data.detokenize import detokenize, rules_of
from bd3lm_jax.data.prepare import prepare_corpus
from bd3lm_jax.data.token_bytes import RowsWithBytes, count_lossy_documents, warn_if_lossy
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.data.windows import ScoringConvention, rows_to_score

ALL = "all"
OWN = ""  # the run's own corpus
LOCAL_NAMES = tuple(kind + packed for kind in (".txt", ".jsonl") for packed in ("", ".xz", ".gz"))
SAMPLE_DOCUMENTS, SAMPLE_CHARS = 200, 2000  # that show whether a tokenizer knows a text


class MissingText(UserError):
    """A known domain whose text is not on this machine; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Domain:
    """title: for tables. resource: a packaged file, or tfds: the name of a data set, with the fields that make up a
    document. style: see detokenize.py. word_ppl: whether the field reports perplexity a word. file: what to put in
    `--data_dir`, for messages."""

    title: str
    resource: str = ""
    tfds: str = ""
    fields: tuple[str, ...] = ()
    style: str = "plain"
    word_ppl: bool = False
    file: str = "a document a line"


DOMAINS = {
    "austen": Domain("Persuasion"),
    "moby_dick": Domain("Moby-Dick", resource="moby_dick.txt.xz"),
    "sotu": Domain("State of the Union, 1980-2021", resource="sotu_since_1980.jsonl.xz"),
    "wikitext2": Domain("WikiText-2", style="wikitext", word_ppl=True, file="wiki.test.raw of WikiText-2"),
    "ptb": Domain("Penn Treebank", style="ptb", word_ppl=True, file="ptb.test.txt of the Penn Treebank"),
    "lm1b": Domain("LM1B", tfds="lm1b", fields=("text",), style="lm1b", word_ppl=True),
    "lambada": Domain("Lambada", tfds="lambada", fields=("passage",), style="lambada"),
    "ag_news": Domain("AG News", tfds="ag_news_subset", fields=("title", "description")),
    "pubmed": Domain("PubMed", tfds="scientific_papers/pubmed", fields=("article",), style="scientific_papers"),
    "arxiv": Domain("arXiv", tfds="scientific_papers/arxiv", fields=("article",), style="scientific_papers"),
}


class Text(NamedTuple):
    """A text as the rows that an evaluation scores.

    rows: `sized.RowsWithBytes`, or windows of them (windows.py). words_D: of the documents as they are distributed,
    each end of a document counted as one more; None where the field reports no perplexity a word. tokenizer: its
    identity. changed: how many documents the tokenizer does not give back as they were.
    """

    name: str
    split: str
    corpus: Corpus
    rows: Any
    convention: ScoringConvention
    stride: int
    words_D: np.ndarray | None
    tokenizer: str
    changed: int

    def describe(self, measured: Any) -> dict:
        """The numbers of the `eval` command: what `evaluate.LikelihoodResult` found here, with what was scored and how.

        `word_ppl` is exp(all nats / words); of a document that is scored in part, as many of its words count as of its
        bytes. `bits_per_byte_comparable`: whether the tokenizer gives every document back, so that the bits are those
        of the text and can be set beside those of another tokenizer.
        """
        result = measured.summary(self.rows)
        del result["nll_by_count"]
        described = {"data": self.name, "split": self.split, **result, "bits_per_byte_comparable": not self.changed,
                     "changed_documents": self.changed, "chunks": self.convention.context_mode,
                     "stride": self.stride,
                     "length": self.rows.length, "first_token": self.convention.first_token,
                     "end_token": self.convention.end_token}
        if self.words_D is not None:
            bytes_N = measured.bytes_N(self.rows)
            part_N = bytes_N / self.document_bytes()[:len(bytes_N)]
            words_N = self.words_D[:len(bytes_N)] * part_N
            nats = stats.two_part_interval(measured.documents_UxN, measured.rows_UxR, words_N).non_negative()
            described |= {"word_ppl": ppl_of(nats.value), "word_ppl_ci95": [ppl_of(nats.low), ppl_of(nats.high)],
                          "words": round(words_N.sum())}
        return described

    def document_bytes(self) -> np.ndarray:
        """Bytes of the documents, float64 [D], as `convention` counts the ends of documents."""
        return _bytes_of(self.corpus) - (self.convention.end_token == "skip")

    def comparable_with(self, other: "Text") -> bool:
        """Whether bits per byte under the two tokenizers are those of the same information."""
        return self.tokenizer == other.tokenizer or not (self.changed or other.changed)


def convention_for(configs: Iterable[Any], *, context_mode: str, stride: int, first_token: str,
                   end_token: str) -> ScoringConvention:
    """The convention asked for, for models with these Configs; first_token "" is "predict" if all of them can.

    UserError where one cannot do what first_token says.
    """
    all_predict = all(config.diffusion.predicts_first_token for config in configs)
    if first_token == "predict" and not all_predict:
        raise UserError("--first_token=predict: an autoregressive model here has no beginning token "
                        "(diffusion.bos=False) and cannot predict the first token: use --first_token=skip")
    return ScoringConvention(context_mode, stride, first_token or ("predict" if all_predict else "skip"), end_token)


def open_text(own: DataConfig, block_size: int, tokenizer: Tokenizer, *, data: str, split: str, data_dir: str,
              convention: ScoringConvention) -> Text:
    """A text as rows for a model, tokenised and laid out as in its training.

    own: the model's own corpus, and how its rows are laid out. data: OWN for that corpus, a source of its mixture as it
    is written there, a name in DOMAINS, a .txt or .jsonl file (all of it, whatever the split) or a directory of them.
    split: of the own corpus, of its sources, of austen and of directories. data_dir: where the files of domains are,
    NAME.txt or NAME.jsonl (also .xz, .gz); "" for none.

    Raises UserError for a text that is empty, shorter than a block or foreign to the tokenizer, Missing (which is one)
    for a known domain that is not there.
    """
    stride = convention.stride_for(own.seq_len, block_size)
    found = _find(own, data, split, data_dir)
    corpus = _plain(found.corpus, found.style)
    name = data or found.source
    check_overlap(corpus.documents(), tokenizer, name)
    is_sliding = convention.context_mode == "sliding"
    section = dataclasses.replace(own, packing="wrap") if is_sliding else own
    rows = prepare_corpus(corpus, found.source, found.split, section, block_size, tokenizer)
    if rows.meta["tokens"] < block_size:
        raise UserError(f"the {found.split} split of '{name}' holds {rows.meta['tokens']} tokens, fewer than one block "
                        f"of {block_size}: give more text")
    words_D = None
    if found.word_ppl:
        end = convention.end_token == "count"
        words_D = np.array([len(document.split()) + end for document in _not_blank(found.corpus, found.style)],
                           np.float64)
    rows = RowsWithBytes(rows, tokenizer, _bytes_of(corpus))
    rows = rows_to_score(rows, convention, within_documents=own.packing != "wrap", block_size=block_size,
                         end_id=tokenizer.end_id)
    changed = count_lossy_documents(corpus.documents(), tokenizer)
    warn_if_lossy(changed, rows.meta["documents"], name)
    return Text(name, found.split, corpus, rows, convention, stride, words_D, tokenizer.identity, changed)


def check_overlap(documents: Iterable[str], tokenizer: Tokenizer, source: str) -> None:
    """UserError if less than half of the characters of the first documents survive encoding and decoding."""
    sample = [document[:SAMPLE_CHARS] for document in itertools.islice(documents, SAMPLE_DOCUMENTS)]
    decoded = [tokenizer.decode(ids[ids != tokenizer.unknown_id]) for ids in tokenizer.encode_batch(sample)]
    num_characters, num_recovered = (sum(len("".join(text.split())) for text in texts) for texts in (sample, decoded))
    if 2 * num_recovered < num_characters:
        raise UserError(
            f"the tokenizer ('{tokenizer.kind}') does not know the text of '{source}': of {num_characters} "
            f"characters {num_recovered} come back from its tokens; evaluate a text in the language and script that "
            "the model was trained on")


class _Source(NamedTuple):
    source: str
    split: str
    corpus: Corpus  # as distributed
    style: str = "plain"
    word_ppl: bool = False


def _find(own: DataConfig, data: str, split: str, data_dir: str) -> _Source:
    if data in (OWN, own.source):
        return _Source(own.source, split, corpora.open_corpus(own, split))
    if data == "austen":
        austen = dataclasses.replace(own, source="austen", path="", mixture=())
        return _Source(data, split, corpora.open_corpus(austen, split))
    if data in DOMAINS:
        domain = DOMAINS[data]
        split, corpus = _open_domain(own, data, domain, data_dir)
        return _Source(data, split, corpus, domain.style, domain.word_ppl)
    sources = mixture.sections(own)
    if data in sources:
        return _Source(sources[data].source, split, corpora.open_corpus(sources[data], split))
    path = remote.fetch(data)
    if not path.exists():
        raise UserError(f"--data={data} is no file or directory of .txt or .jsonl text, and no named text: "
                        f"{nearest(data, (*DOMAINS, ALL))}")
    split = ALL_SPLITS if path.is_file() else split
    section = _local_section(own, path)
    return _Source(section.source, split, corpora.open_corpus(section, split))


def _open_domain(own: DataConfig, name: str, domain: Domain, data_dir: str) -> tuple[str, Corpus]:
    """Split and corpus of a domain: packaged, from a file of `data_dir`, or from TFDS."""
    if domain.resource:
        return ALL_SPLITS, corpora.embedded(domain.resource)
    if data_dir and not Path(data_dir).is_dir():
        raise UserError(f"--data_dir={data_dir} is not a directory")
    files = [Path(data_dir, name + ending) for ending in LOCAL_NAMES if data_dir]
    path = next((path for path in files if path.is_file()), None)
    if path is not None:
        return ALL_SPLITS, corpora.open_corpus(dataclasses.replace(_local_section(own, path), field="text"), ALL_SPLITS)
    if not (domain.tfds and corpora.tfds_is_prepared(domain.tfds)):
        raise MissingText(_download_hint(name, domain, data_dir))
    sections = [dataclasses.replace(own, source="tfds", path="", name=domain.tfds, field=field, mixture=())
                for field in domain.fields]
    parts = [corpora.open_corpus(section, "test") for section in sections]
    return "test", Corpus(lambda: map(" ".join, zip(*(part.documents() for part in parts), strict=True)),
                          lambda: " ".join(part.fingerprint() for part in parts))


def _download_hint(name: str, domain: Domain, data_dir: str) -> str:
    message = (f"{domain.title} is not here: put {domain.file} in {data_dir or 'a directory'} as {name}.txt "
               f"(or .jsonl){'' if data_dir else ' and give --data_dir=DIRECTORY'}")
    if domain.tfds:
        message += (f", or with '.[data]' installed prepare it once: python -c \"import tensorflow_datasets as tfds; "
                    f"tfds.builder('{domain.tfds}', file_format='array_record').download_and_prepare()\"")
    return message


def _local_section(own: DataConfig, path: Path) -> DataConfig:
    jsonl = bool(text_files.find(path, ".jsonl")[0]) if path.is_dir() else text_files.has_ending(path, ".jsonl")
    return dataclasses.replace(own, source="jsonl" if jsonl else "text", path=str(path), name="", mixture=())


def _plain(corpus: Corpus, style: str) -> Corpus:
    """The documents as plain text, without blank ones."""
    rules = rules_of(style)
    if not rules:
        return corpus

    return Corpus(lambda: (detokenize(document, style) for document in _not_blank(corpus, style)),
                  lambda: f"{corpus.fingerprint()} {rules}")


def _not_blank(corpus: Corpus, style: str) -> Iterator[str]:
    """The documents as they are distributed, without those of which no plain text is left."""
    return (document for document in corpus.documents() if detokenize(document, style).strip())


def _bytes_of(corpus: Corpus) -> np.ndarray:
    """UTF-8 bytes of the documents, float64 [D], each with the newline that its end token stands for."""
    return np.array([len(document.encode()) + 1 for document in corpus.documents()], np.float64)
