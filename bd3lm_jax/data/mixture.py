"""Several sources at given rates: `data.mixture`, pairs (source, weight), with `data.source="mixture"`.

A source is written as its name, with what it needs after a colon: "austen", "text:PATH", "jsonl:PATH", "tfds:NAME".
Which source the row at position n of a run comes from is decided by n and the weights alone, and evenly: among the
first n rows, whatever n, there are fewer than 2 more or less of a source than its weight asks for. Every source goes
through its own rows in its own order, epoch after epoch.
"""

import dataclasses
import hashlib
import heapq
import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from bd3lm_jax.core.errors import UserError, nearest
from bd3lm_jax.data.order import feistel_rows_at

SOURCE = "mixture"
ARGUMENTS = {"text": "path", "jsonl": "path", "tfds": "name"}  # the key of DataConfig that stands after the colon
UNSUPPORTED_SOURCES = {
    "sft": "which knows prompts from answers and others do not", SOURCE: "which is what it stands in"
}
RESOLUTION = 1 << 24  # weights whose common denominator is larger are rounded to one part in this
EXAMPLE = "(('austen', 0.7), ('text:my_texts', 0.3))"


def check(source: str, mixture: tuple, other_keys: dict[str, str], sources: Sequence[str]) -> None:
    """UserError unless `data.mixture` fits `data.source`. given: other keys and values that say what is read."""
    if source != SOURCE:
        if mixture:
            raise UserError(f"data.mixture has no effect with data.source='{source}': use data.source='{SOURCE}', or "
                            "data.mixture=()")
        return
    if not mixture or not all(len(pair) == 2 for pair in mixture):
        raise UserError(f"data.mixture is {mixture!r}, expected pairs (source, weight), e.g. {EXAMPLE}")
    specs = [spec for spec, _ in mixture]
    for spec, weight in mixture:
        _check_source(spec, [name for name in sources if name not in UNSUPPORTED_SOURCES])
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data.mixture: the weight of '{spec}' is {weight}, expected a positive number")
        if specs.count(spec) > 1:
            raise UserError(f"data.mixture names '{spec}' {specs.count(spec)} times: give it once, with all its weight")
    for key, value in other_keys.items():
        if value:
            raise UserError(f"data.{key}={value!r} has no effect with data.source='{SOURCE}': use ''")


def _check_source(spec: str, sources: list[str]) -> None:
    name, colon, argument = spec.partition(":")
    if name in UNSUPPORTED_SOURCES:
        raise UserError(f"data.mixture names '{spec}', {UNSUPPORTED_SOURCES[name]}: leave it out")
    if name not in sources:
        raise UserError(f"data.mixture names an unknown source '{spec}': {nearest(name, sources)}")
    key = ARGUMENTS.get(name)
    if bool(key) != bool(argument) or colon and not key:
        raise UserError(f"data.mixture names '{spec}', expected " + (f"'{name}:{key.upper()}'" if key else f"'{name}'"))


def sections(data: Any) -> dict[str, Any]:
    """The DataConfig of each source of a mixture, by its name in `data.mixture`."""
    result = {}
    for spec, _ in data.mixture:
        name, _, argument = spec.partition(":")
        argument_field = {ARGUMENTS[name]: argument} if argument else {}
        result[spec] = dataclasses.replace(data,
                                           **{"source": name, "path": "", "name": "", "mixture": ()} | argument_field)
    return result


class SourceSchedule:
    """Which of K sources each position takes, and how many before it did.

    The sources are the leaves of a Huffman tree of their weights; a node sends floor(p n + 1/2) of its first n
    positions to its left, p being the part of its weight that is there. The rounding above a leaf adds up to at most
    half of the sum of (weight of the leaf / weight of the node) over the nodes from the leaf to below the root, whose
    weights grow at least like Fibonacci numbers in a Huffman tree: less than 1.7, whatever the weights and how many.
    """

    def __init__(self, weights: Sequence[float]):
        self.parts = _whole_parts(weights)
        heap: list[tuple[int, int, Any]] = [(part, k, k) for k, part in enumerate(self.parts)]  # leaves and nodes
        heapq.heapify(heap)
        for order in itertools.count(len(heap)):
            if len(heap) == 1:
                break
            small, large = heapq.heappop(heap), heapq.heappop(heap)
            part = small[0] + large[0]
            heapq.heappush(heap, (part, order, (large[0], part, large[2], small[2])))
        self._tree = heap[0][2]

    def assign(self, position_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [N] twice: the source of each position, and how many positions before it have the same one."""
        source_N, index_N = np.zeros_like(position_N), np.zeros_like(position_N)

        def walk(node, position: np.ndarray, where: np.ndarray) -> None:
            if isinstance(node, int):
                source_N[where], index_N[where] = node, position
                return
            share, whole, left, right = node
            before = _rounded(share, whole, position)
            goes_left = _rounded(share, whole, position + 1) > before
            walk(left, before[goes_left], where[goes_left])
            walk(right, (position - before)[~goes_left], where[~goes_left])

        walk(self._tree, position_N, np.arange(len(position_N)))
        return source_N, index_N

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` positions each source has."""
        result = [0] * len(self.parts)

        def walk(node, number: int) -> None:
            if isinstance(node, int):
                result[node] = number
                return
            share, whole, left, right = node
            walk(left, _rounded(share, whole, number))
            walk(right, number - _rounded(share, whole, number))

        walk(self._tree, number)
        return result


def _rounded(share: int, whole: int, number):
    """floor(share / whole * number + 1/2), exactly, without numbers beyond int64."""
    return share * (number // whole) + (2 * share * (number % whole) + whole) // (2 * whole)


def _whole_parts(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of the weights as they are written."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    parts = [part // math.gcd(*parts) for part in parts]
    total = sum(parts)
    return parts if total <= RESOLUTION else [max(1, round(Fraction(part * RESOLUTION, total))) for part in parts]


class MixedRows:
    """The rows of several sources as one split, like `prepare.Rows`: those of the first source, then of the next."""

    has_density = has_prompt = False

    def __init__(self, parts: dict[str, Any], weights: Sequence[float]):
        """parts: the `Rows` of each source, in the order of the weights."""
        self.names, self.parts, self.weights = list(parts), list(parts.values()), list(weights)
        self.shares, self.length, self.path = SourceSchedule(weights), self.parts[0].length, self.parts[0].path.parent
        self._first_K = np.cumsum([0, *map(len, self.parts)])
        metas = [part.meta for part in self.parts]
        self._first_document_K = np.cumsum([0, *(meta["documents"] for meta in metas)])
        identity = json.dumps([[meta["hash"], part] for meta, part in zip(metas, self.shares.parts)])
        self.meta = {"source": SOURCE, "split": metas[0]["split"], "layout": metas[0]["layout"], "length": self.length,
                     **{key: sum(meta[key] for meta in metas) for key in ("rows", "tokens", "documents", "bytes")},
                     "hash": hashlib.sha256(identity.encode()).hexdigest()[:20]}

    def __len__(self) -> int:
        return int(self._first_K[-1])

    def ids_at(self, seed: int, position_N: np.ndarray) -> np.ndarray:
        """int64 [N]: rows at rising positions of a run."""
        source_N, index_N = self.shares.assign(position_N)
        ids_N = np.zeros_like(position_N)
        for k, part in enumerate(self.parts):
            from_source = source_N == k
            ids_N[from_source] = self._first_K[k] + feistel_rows_at(len(part), _seed_of(seed, k), index_N[from_source])
        return ids_N

    def usage(self, positions: int) -> list[dict]:
        """What the first `positions` rows of a run read of each source: rows, and how often all that it has."""
        return [{"source": name, "weight": weight, "rows": len(part), "tokens": part.meta["tokens"],
                 "rows_seen": count, "epochs": count / len(part), "path": str(part.path)}
                for name, weight, part, count in zip(self.names, self.weights, self.parts,
                                                     self.shares.counts(positions))]

    def tokens(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]; padding holds the end token."""
        return self._read("tokens", row_ids)

    def segments(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: tokens see only their own segment; 0 = padding."""
        return self._read("segments", row_ids)

    def positions(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: from 0 in each segment; 0 in padding."""
        return self._read("positions", row_ids)

    def documents(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n, L]: index of the document, those of the first source first; -1 = padding."""
        result = self._read("documents", row_ids)
        return result + (result >= 0) * self._first_document_K[self._source(row_ids)].astype(np.int32)[:, None]

    def scored(self, row_ids: np.ndarray) -> np.ndarray:
        """bool [n, L]: tokens that evaluation counts."""
        return self._read("scored", row_ids).astype(bool)

    def stream(self) -> np.ndarray:
        """int32 [meta["tokens"]]: all tokens without padding, source after source."""
        return np.concatenate([part.stream() for part in self.parts])

    def _source(self, row_ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_K, np.asarray(row_ids), side="right") - 1

    def _read(self, name: str, row_ids: np.ndarray) -> np.ndarray:
        row_ids, source = np.asarray(row_ids), self._source(row_ids)
        result = np.zeros((len(row_ids), self.length), np.int32)
        for k in np.unique(source):
            result[source == k] = getattr(self.parts[k], name)(row_ids[source == k] - self._first_K[k])
        return result


def _seed_of(seed: int, source: int) -> int:
    """Sources of the same size are read in different orders."""
    return int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()[:8])
