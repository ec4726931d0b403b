"""Parameters out of the tensors of a published checkpoint: strict, and one parameter at a time."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from bd3lm_jax.checkpoints.published.mapping import ParamMapping, require
from bd3lm_jax.checkpoints.published.tensors import LazyTensor, cast_or_raise

COMPILED = "_orig_mod."  # left in tensor names by torch.compile
WRAPPERS = (COMPILED, "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # ... by other wrappers, anywhere
LEADING = re.compile(r"(ema\.)?(module\.)+")  # ... by data parallelism, in front
# What a trainer's own module puts in front of all names.
PREFIXES = ("model.", "base_model.model.", "base_model.", "network.", "net.", "transformer.", "backbone.")
EMA = "ema."  # before the names of averaged weights, where a checkpoint holds both
MAX_NAMED = 6  # tensors named in an error, of each kind
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def normalized_names(path: Path, stored: dict[str, LazyTensor], weights: str, rename: Callable[[str], str]
                ) -> tuple[dict[str, LazyTensor], set[str]]:
    """The tensors under their published names of today (`rename` knows older ones), with weights="ema" averaged ones in
    place of the others if there are any; and the names of those that were put in place.

    Raises UserError if a name is there twice or an averaged tensor belongs to none of the others.
    """
    tensors = {}
    for name, tensor in stored.items():
        plain = functools.reduce(lambda name, wrapper: name.replace(wrapper, ""), WRAPPERS, name)
        plain = LEADING.sub(lambda messages: messages[1] or "", plain, count=1) if LEADING.match(plain) else plain
        plain = EMA + rename(plain.removeprefix(EMA)) if plain.startswith(EMA) else rename(plain)
        require(plain not in tensors, f"{path}: tensor {plain} is there twice, with and without '{COMPILED}'")
        tensors[plain] = tensor
    averaged = {name.removeprefix(EMA): tensors.pop(name) for name in list(tensors) if name.startswith(EMA)}
    unmatched = sorted(averaged.keys() - tensors.keys())
    require(not unmatched,
            f"{path}: averaged tensors without the plain ones: {_list_names([EMA + name for name in unmatched])}")
    return (tensors | averaged, set(averaged)) if weights == "ema" else (tensors, set())


def match_prefix(tensors: dict[str, LazyTensor], averaged: set[str], expected: set[str]
                   ) -> tuple[dict[str, LazyTensor], set[str]]:
    """What `normalized_names` returns, with a prefix of all names taken off or put in front if more are expected
    then."""
    def number(rename: Callable[[str], str]) -> int:
        names = set(map(rename, tensors))
        return len(names & expected) if len(names) == len(tensors) else 0

    changes = [change for prefix in PREFIXES
               for change in (functools.partial(_remove_prefix, prefix), functools.partial(str.__add__, prefix))]
    best = max((str, *changes), key=number)  # the first of those that are alike
    return {best(name): x for name, x in tensors.items()}, set(map(best, averaged))


def _remove_prefix(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def check_averages(path: Path, averaged: set[str], leaves: dict[str, ParamMapping]) -> None:
    """UserError if some parameters are averaged and others are not: together they are no network. Tensors beside
    parameters have no averages."""
    missing = sorted({name for leaf in leaves.values() for name in leaf.sources()} - averaged)
    require(not averaged or not missing, f"{path}: averaged tensors (\"{EMA}\") are there for some parameters and "
            f"missing for {_list_names(missing)}: take the others, weights='params', or a complete release")


def check_tensors(path: Path, tensors: dict[str, LazyTensor], expected: dict[str, tuple[int, ...]]) -> None:
    """UserError unless the tensors are exactly the expected ones, naming those that are not."""
    misshapen = [f"{name} (is {list(tensors[name].shape)}, expected {list(shape)})"
                 for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    problems = {"missing": sorted(expected.keys() - tensors.keys()),
                "unexpected": sorted(tensors.keys() - expected.keys()), "misshapen": misshapen}
    messages = [f"{kind}: {_list_names(names)}" for kind, names in problems.items() if names]
    require(not messages, f"{path} does not fit its config.json. Tensors {'; '.join(messages)}")


def read_params(path: Path, leaves: dict[str, ParamMapping], tensors: dict[str, LazyTensor], dtype: Any,
                shardings: dict[str, Any] | None) -> dict[str, jax.Array]:
    """Path of every parameter -> its array, read one after the other.

    shardings: of every path; each device then gets the part it holds, and no host has more of a parameter than that.
    None: on the first device. Raises UserError for tensors that hold no floating-point numbers, and for overflow.
    """
    wrong = [f"{name} ({tensors[name].dtype.name})" for leaf in leaves.values() for name in leaf.sources()
             if tensors[name].dtype not in FLOATS]
    require(
        not wrong,
        f"{path}: tensors that are no floating-point numbers: {_list_names(wrong)}: dequantise them, or take "
        "another release of the model")
    return {at: _place(leaf, tensors, np.dtype(dtype), shardings and shardings[at]) for at, leaf in leaves.items()}


def _place(leaf: ParamMapping, tensors: dict[str, LazyTensor], dtype: np.dtype, sharding: Any) -> jax.Array:
    names = np.array(leaf.sources(), object).reshape(leaf.stacked)

    def part(index: Any) -> np.ndarray:
        """What a device holds. index: along the stack, then along one tensor in our layout."""
        chosen = np.asarray(names[index[:names.ndim]], object)
        result: Any = None
        for at, name in np.ndenumerate(chosen):
            loaded = cast_or_raise(name, leaf.read(tensors[name].read())[index[names.ndim:]], dtype)
            result = np.empty(chosen.shape + loaded.shape, dtype) if result is None else result
            result[at] = loaded
        return result

    if sharding is None:
        return jax.device_put(part((slice(None),) * names.ndim))
    shape = leaf.stacked + leaf.read(np.broadcast_to(np.False_, leaf.shape)).shape
    return jax.make_array_from_callback(shape, sharding, part)


def _list_names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
