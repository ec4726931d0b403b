"""Two small domains that are there wherever the library is: Python source of installed packages, and sums in words.

Python documents are functions and classes at the top level of the modules of PACKAGES, all under permissive licences.
Whole modules are held out, so that no split holds the neighbours of another's functions. The text depends on the
versions that are installed: figures on it can be compared on one installation only.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

from bd3lm_jax.core.schema import DataConfig
from bd3lm_jax.data.corpus import Corpus

PACKAGES = {  # import name -> distribution and its licence
    "jax": ("jax", "Apache-2.0"), "flax": ("flax", "Apache-2.0"), "optax": ("optax", "Apache-2.0"),
    "chex": ("chex", "Apache-2.0"), "absl": ("absl-py", "Apache-2.0"),
    "ml_collections": ("ml-collections", "Apache-2.0"), "numpy": ("numpy", "BSD-3-Clause"), "rich": ("rich", "MIT"),
}
LEFT_OUT = ("test", "_vendor")  # words of paths
MIN_CHARS, MAX_CHARS = 80, 1500  # of a document
HELD_OUT = {"valid": range(0, 5), "test": range(5, 15)}  # hundredths of the modules, by hash
SUMS = {"train": 20_000, "valid": 500, "test": 1000}  # documents of arithmetic


def python_sources(data: DataConfig, split: str) -> Corpus:
    """Functions and classes of PACKAGES (those installed), in the order of their paths."""
    del data
    return Corpus(lambda: iter(_code()[split]), lambda: json.dumps(["python", split, "once", MAX_CHARS, _versions()]))


def arithmetic(data: DataConfig, split: str) -> Corpus:
    """Sentences of sums with their results; no sentence of one split is in another."""
    del data
    return Corpus(lambda: _sums(split), lambda: json.dumps(["arithmetic", split, SUMS[split]]))


def python_arithmetic(data: DataConfig, split: str) -> Corpus:
    """Both, a sum after every function as long as there are any."""
    code, sums = python_sources(data, split), arithmetic(data, split)

    def documents() -> Iterator[str]:
        pairs = itertools.zip_longest(code.documents(), sums.documents())
        return (document for pair in pairs for document in pair if document is not None)

    return Corpus(documents, lambda: code.fingerprint() + sums.fingerprint())


def _versions() -> list[list[str]]:
    return [[name, importlib.metadata.version(distribution)] for name, (distribution, _) in PACKAGES.items()
            if importlib.util.find_spec(name) is not None]


def _root(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None  # of those that `_versions` has found
    return Path(spec.origin).parent


@functools.cache
def _code() -> dict[str, list[str]]:
    """Documents by split. What stands in several modules counts once, for the first: no split holds it again."""
    found = {split: [] for split in ("train", *HELD_OUT)}
    earlier = set()
    for name, _ in _versions():
        root = _root(name)
        for path in sorted(root.rglob("*.py")):
            module = f"{name}/{path.relative_to(root).as_posix()}"
            if any(word in module for word in LEFT_OUT):
                continue
            new = [document for document in dict.fromkeys(_definitions(path)) if document not in earlier]
            earlier.update(new)
            found[_split_of(module)] += new
    return found


def _split_of(name: str) -> str:
    hundredth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 100
    return next((split for split, part in HELD_OUT.items() if hundredth in part), "train")


def _definitions(path: Path) -> Iterator[str]:
    """Source of the functions and classes at the top level of a file, of a length between the limits."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in strings
            tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return
    lines = text.split("\n")
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            source = "\n".join(lines[first - 1:node.end_lineno])
            if MIN_CHARS <= len(source) <= MAX_CHARS:
                yield source


def _sums(split: str) -> Iterator[str]:
    draw, count = random.Random(0), 0
    while count < SUMS[split]:
        text = _sum(draw)
        if _split_of(text) == split:
            count += 1
            yield text


def _sum(draw: random.Random) -> str:
    a, b, c = (draw.randint(2, 99) for _ in range(3))
    return draw.choice((
        f"We start with {a} and add {b}: {a} + {b} = {a + b}. Taking away {c} leaves {a + b - c}.",
        f"{a} boxes of {b} pens are {a} * {b} = {a * b} pens; with {c} more there are {a * b + c}.",
        f"The sum of {a}, {b} and {c} is {a} + {b} + {c} = {a + b + c}, so the double is {2 * (a + b + c)}.",
        f"If {a * b} apples are shared by {a} people, each gets {a * b} / {a} = {b} of them.",
        f"{a} plus {b} equals {a + b}, and {a + b} times {c} equals {(a + b) * c}.",
    ))
