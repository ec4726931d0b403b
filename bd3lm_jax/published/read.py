"""Parameters out of the tensors of a published checkpoint: strict, and one parameter at a time."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from bd3lm_jax.published.leaf import Leaf, require
from bd3lm_jax.published.tensors import Stored, converted

COMPILED = "_orig_mod."  # left in tensor names by torch.compile
WRAPPERS = (COMPILED, "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # ... by other wrappers, anywhere
LEADING = re.compile(r"(ema\.)?(module\.)+")  # ... by data parallelism, in front
# What a trainer's own module puts in front of all names.
PREFIXES = ("model.", "base_model.model.", "base_model.", "network.", "net.", "transformer.", "backbone.")
EMA = "ema."  # before the names of averaged weights, where a checkpoint holds both
NAMED = 6  # tensors named in an error, of each kind
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def plain_names(path: Path, stored: dict[str, Stored], weights: str, rename: Callable[[str], str]
                ) -> tuple[dict[str, Stored], set[str]]:
    """The tensors under their published names of today (`rename` knows older ones), with weights="ema" averaged ones in
    place of the others if there are any; and the names of those that were put in place.

    Raises UserError if a name is there twice or an averaged tensor belongs to none of the others.
    """
    tensors = {}
    for name, tensor in stored.items():
        plain = functools.reduce(lambda name, wrapper: name.replace(wrapper, ""), WRAPPERS, name)
        plain = LEADING.sub(lambda found: found[1] or "", plain, count=1) if LEADING.match(plain) else plain
        plain = EMA + rename(plain.removeprefix(EMA)) if plain.startswith(EMA) else rename(plain)
        require(plain not in tensors, f"{path}: tensor {plain} is there twice, with and without '{COMPILED}'")
        tensors[plain] = tensor
    averaged = {name.removeprefix(EMA): tensors.pop(name) for name in list(tensors) if name.startswith(EMA)}
    alone = sorted(averaged.keys() - tensors.keys())
    require(not alone, f"{path}: averaged tensors without the plain ones: {_named([EMA + name for name in alone])}")
    return (tensors | averaged, set(averaged)) if weights == "ema" else (tensors, set())


def without_prefix(tensors: dict[str, Stored], averaged: set[str], expected: set[str]
                   ) -> tuple[dict[str, Stored], set[str]]:
    """What `plain_names` returns, with a prefix of all names taken off or put in front if more are expected then."""
    def number(rename: Callable[[str], str]) -> int:
        names = set(map(rename, tensors))
        return len(names & expected) if len(names) == len(tensors) else 0

    changes = [change for prefix in PREFIXES
               for change in (functools.partial(_removed, prefix), functools.partial(str.__add__, prefix))]
    best = max((str, *changes), key=number)  # the first of those that are alike
    return {best(name): x for name, x in tensors.items()}, set(map(best, averaged))


def _removed(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def check_averages(path: Path, averaged: set[str], leaves: dict[str, Leaf]) -> None:
    """UserError if some parameters are averaged and others are not: together they are no network. Tensors beside
    parameters have no averages."""
    missing = sorted({name for leaf in leaves.values() for name in leaf.sources()} - averaged)
    require(not averaged or not missing, f"{path}: averaged tensors (\"{EMA}\") are there for some parameters and "
            f"missing for {_named(missing)}: take the others, weights='params', or a complete release")


def check_tensors(path: Path, tensors: dict[str, Stored], expected: dict[str, tuple[int, ...]]) -> None:
    """UserError unless the tensors are exactly the expected ones, naming those that are not."""
    misshapen = [f"{name} (is {list(tensors[name].shape)}, expected {list(shape)})"
                 for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    problems = {"missing": sorted(expected.keys() - tensors.keys()),
                "unexpected": sorted(tensors.keys() - expected.keys()), "misshapen": misshapen}
    found = [f"{kind}: {_named(names)}" for kind, names in problems.items() if names]
    require(not found, f"{path} does not fit its config.json. Tensors {'; '.join(found)}")


def read_params(path: Path, leaves: dict[str, Leaf], tensors: dict[str, Stored], dtype: Any,
                shardings: dict[str, Any] | None) -> dict[str, jax.Array]:
    """Path of every parameter -> its array, read one after the other.

    shardings: of every path; each device then gets the part it holds, and no host has more of a parameter than that.
    None: on the first device. Raises UserError for tensors that hold no floating-point numbers, and for overflow.
    """
    wrong = [f"{name} ({tensors[name].dtype.name})" for leaf in leaves.values() for name in leaf.sources()
             if tensors[name].dtype not in FLOATS]
    require(not wrong, f"{path}: tensors that are no floating-point numbers: {_named(wrong)}: dequantise them, or take "
            "another release of the model")
    return {at: _placed(leaf, tensors, np.dtype(dtype), shardings and shardings[at]) for at, leaf in leaves.items()}


def _placed(leaf: Leaf, tensors: dict[str, Stored], dtype: np.dtype, sharding: Any) -> jax.Array:
    names = np.array(leaf.sources(), object).reshape(leaf.stacked)

    def part(index: tuple) -> np.ndarray:
        """What a device holds. index: along the stack, then along one tensor in our layout."""
        chosen = np.asarray(names[index[:names.ndim]], object)
        result = None
        for at, name in np.ndenumerate(chosen):
            ours = converted(name, leaf.read(tensors[name].read())[index[names.ndim:]], dtype)
            result = np.empty(chosen.shape + ours.shape, dtype) if result is None else result
            result[at] = ours
        return result

    if sharding is None:
        return jax.device_put(part((slice(None),) * names.ndim))
    shape = leaf.stacked + leaf.read(np.broadcast_to(np.False_, leaf.shape)).shape
    return jax.make_array_from_callback(shape, sharding, part)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
