"""Where a parameter of ours lies in a published checkpoint, and how its layout changes on the way in and out."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bd3lm_jax.core.errors import UserError, lookup
from bd3lm_jax.core.typed import as_section
from bd3lm_jax.diffusion import OBJECTIVES


class ParamMapping(NamedTuple):
    """One of our parameters. Layers and experts are tensors of their own as published, and stacked in ours.

    name: of its tensors, with "{layer}" and "{expert}" in it where there is one for each.
    shape: of one such tensor as published (PyTorch's linear weights are [out, in]).
    read: published array -> ours, for one tensor. write: its inverse, bit for bit.
    layers: numbers of the layers in the group, in order; () if it is no parameter of a layer. experts: 0 for none.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    layers: Sequence[int] = ()
    experts: int = 0

    def sources(self) -> list[str]:
        """Published names of the tensors behind the parameter, in the order in which they are stacked."""
        return [self.name.format(layer=layer, expert=expert) for layer in self.layers or (None,)
                for expert in (range(self.experts) if self.experts else (None,))]

    @property
    def stacked(self) -> tuple[int, ...]:
        """Leading axes of our parameter, beyond those of one tensor: layers, experts."""
        return (len(self.layers),) * bool(self.layers) + (self.experts,) * bool(self.experts)


def _sizes(axes: Sequence[int] | int) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def unchanged(x: np.ndarray) -> np.ndarray:
    return x


def vector(name: str, size: int, layers: Sequence[int] = ()) -> ParamMapping:
    """A bias or a scale, alike in both."""
    return ParamMapping(name, (size,), unchanged, unchanged, layers)


def norm(path: str, name: str, width: int, layers: Sequence[int] = ()) -> dict[str, ParamMapping]:
    """Scale and bias of a layer norm at `path`, published under `name`."""
    return {f"{path}.scale": vector(f"{name}.weight", width, layers),
            f"{path}.bias": vector(f"{name}.bias", width, layers)}


def linear(name: str, inputs: Sequence[int] | int, outputs: Sequence[int] | int, layers: Sequence[int] = (),
           experts: int = 0) -> ParamMapping:
    """A matrix: [out, in] as published, `[*inputs, *outputs]` in ours."""
    target_shape = (*_sizes(inputs), *_sizes(outputs))
    shape = (math.prod(_sizes(outputs)), math.prod(_sizes(inputs)))
    return ParamMapping(name, shape, lambda w: w.T.reshape(target_shape), lambda w: w.reshape(shape[::-1]).T, layers,
                        experts)


def bias(name: str, sizes: Sequence[int], layers: Sequence[int] = ()) -> ParamMapping:
    """The bias of a matrix whose outputs have several axes in ours."""
    size = math.prod(sizes)
    return ParamMapping(name, (size,), lambda w: w.reshape(tuple(sizes)), lambda w: w.reshape(size), layers)


def padded(leaf: ParamMapping, axis: int, size: int) -> ParamMapping:
    """The leaf with an axis of ours filled with zeros up to `size`, as a vocabulary is."""
    size_before = leaf.read(np.empty(leaf.shape, np.bool_)).shape[axis]

    def read(w):
        w = leaf.read(w)
        return np.pad(w, [(0, size - size_before if dimension == axis else 0) for dimension in range(w.ndim)])

    def write(w):
        return leaf.write(np.take(w, range(size_before), axis=axis))

    return leaf._replace(read=read, write=write)


class ModelSpec(NamedTuple):
    """What a published config.json says: our model config and objective, the context in tokens, the id of the mask
    token (-1: it names none)."""

    model: Any
    objective: Any
    length: int
    mask_id: int


def require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_mask(objective: Any, mask_id: int) -> None:
    """UserError for an objective that masks tokens without a mask token (id below 0)."""
    require(not objective.uses_mask_token or mask_id >= 0,
            "this model fills in masked tokens, and neither its config.json (mask_token_id) nor its tokenizer says "
            "which token is the mask: name it in config.json")


def check_bos(objective: Any, model: Any, end_id: int) -> None:
    """UserError for a network that reads an end token before the first one where none is known (id below 0)."""
    require(end_id >= 0 or not (objective.begins_with_end_token or model.target_shift == "block"),
            "this model reads its end token before the first one, and without a tokenizer nothing says which that is: "
            "give it one (a tokenizer.json beside the weights)")


def check_keys(path, published: dict, expected: dict[str, type]) -> None:
    """UserError unless every key is there with its type; a whole number may stand for a float."""
    for key, kind in expected.items():
        require(key in published, f"{path}: key '{key}' is missing, expected {kind.__name__}")
        value = published[key]
        has_type = type(value) is kind or (kind is float and type(value) is int)
        require(has_type, f"{path}: '{key}' is {value!r}, expected {kind.__name__}")


OBJECTIVE_KEY = "diffusion"  # of config.json: the objective, where it is not the usual one of the architecture


def objective_from_config(path, published: dict, default: Any) -> Any:
    """The objective that a config.json of ours names under "diffusion", else the usual one of its architecture."""
    content = published.get(OBJECTIVE_KEY)
    if content is None:
        return default
    require(isinstance(content, dict), f"{path}: '{OBJECTIVE_KEY}' is {content!r}, expected an object")
    kind = lookup(OBJECTIVES, content.get("kind", ""), f"objective {path}: {OBJECTIVE_KEY}.kind")
    values = {key: value for key, value in content.items() if key != "kind"}
    expected = {field.name for field in dataclasses.fields(kind)}
    require(values.keys() == expected, f"{path}: '{OBJECTIVE_KEY}' has the keys {', '.join(sorted(values))}, expected "
            f"kind, {', '.join(sorted(expected))}")
    return as_section(f"{path}: {OBJECTIVE_KEY}", values, kind)


def objective_to_config(objective: Any, default: Any) -> dict:
    """What a config.json says of an objective: nothing if it is the usual one of the architecture."""
    return {} if objective == default else {OBJECTIVE_KEY: {"kind": objective.kind, **dataclasses.asdict(objective)}}
