"""What the layouts of published language models have in common: their objective, tied output layers, fixed choices."""

from typing import Any

import numpy as np

from bd3lm_jax.checkpoints.published.mapping import OBJECTIVE_KEY, objective_from_config, objective_to_config, require
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR, Masked

BLOCK_SIZE = "block_size"  # our own key in config.json, for a network that became a block diffusion model
SHIFTED = "shifted"  # ... whose outputs are one token ahead
MASK_ID = "mask_token_id"


def read_objective(path, published: dict, length: int, causal: bool) -> Any:
    """The next token for `causal` networks, masked tokens of a whole row for others; with BLOCK_SIZE in the config
    masked tokens of a block; with OBJECTIVE_KEY what that says."""
    if OBJECTIVE_KEY in published:
        return objective_from_config(path, published, None)
    if causal and BLOCK_SIZE not in published:
        return AR(bos=False)
    size = published.get(BLOCK_SIZE, length)
    require(type(size) is int and 0 < size <= length and length % size == 0,
            f"{path}: {BLOCK_SIZE} is {size!r}, expected a number of tokens that divides the context of {length}")
    return Masked.uniform_counts(size)


def read_shifted(path, published: dict, default: str) -> str:
    """Our `model.target_shift` of a network that became a diffusion model; usual: what it is where nobody says."""
    value_read = published.get(SHIFTED, default)
    require(value_read in ("", "row", "block"), f"{path}: '{SHIFTED}' is {value_read!r}, expected '', 'row' or 'block'")
    return value_read


def write_objective(kind: str, objective: Any, length: int, causal: bool) -> dict[str, Any]:
    """What config.json says of the objective beside what the network is; inverse of `read_objective`.

    Raises UserError for an autoregressive network of an architecture that sees the whole row.
    """
    if objective.causal and not causal:
        raise UserError(f"a config.json of model_type {kind!r} cannot say that the network is autoregressive")
    if objective == AR(bos=False):
        return {}
    if objective != Masked.uniform_counts(objective.block_size):
        return objective_to_config(objective, None)
    return {BLOCK_SIZE: objective.block_size} if causal or objective.block_size != length else {}


def mask_id(path, published: dict) -> int:
    """The mask token that config.json names, else -1."""
    value_read = published.get(MASK_ID)
    value_read = -1 if value_read is None else value_read
    require(type(value_read) is int and -1 <= value_read, f"{path}: '{MASK_ID}' is {value_read!r}, expected a token id")
    return value_read


def check_choices(path, published: dict, choices: dict[str, tuple]) -> None:
    """UserError if a key that is there has none of the values that the network here computes."""
    for key, supported in choices.items():
        if key in published and published[key] not in supported:
            expected = " or ".join(repr(value) for value in supported)
            raise UserError(f"{path}: '{key}' is {published[key]!r}, supported: {expected}")


def tied_table(config: Any, names: set[str], tables: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    """Shapes of an output layer that repeats a tied embedding, where it is among `names`, and of the embedding.

    tables: their names in this order.
    """
    shape = config.vocab_size, config.hidden_size
    return dict.fromkeys(tables, shape) if config.tie_embeddings and tables[0] in names else {}


def check_tied(path, tensors: dict[str, np.ndarray], name: str, source: str) -> None:
    """UserError unless the tensor `name`, if there, is that of `source`, which the network uses in its place."""
    if name in tensors and not np.array_equal(tensors[name], tensors[source]):
        raise UserError(f"{path}: {name} differs from {source}, and this architecture has one table for both")
