"""A corpus: sums, one a line, such as "17 + 4 = 21".

    python -m launch train --import=examples.plugins.corpus --config.data.source=sums --config.data.tokenizer=bytes \
        --workdir=runs/sums
"""

from bd3lm_jax.data.corpora import SOURCES, Corpus

SIZE = 60  # numbers below
SPLITS = {"train": range(0, 9), "valid": (9,), "test": (10,)}  # by (a + 2 b) modulo 11, so that no two share a sum


def sums(data, split):
    """data: the section `data` of the config. Documents in a fixed order, and what changes when they do."""
    del data

    def documents():
        for a in range(SIZE):
            for b in range(SIZE):
                if (a + 2 * b) % 11 in SPLITS[split]:
                    yield f"{a} + {b} = {a + b}"

    return Corpus(documents, lambda: f"sums below {SIZE}, {split}")


SOURCES["sums"] = sums
