"""Noise that follows the data while training; that of a config with a fixed schedule, which does not, is the base."""

import dataclasses
from typing import Any, ClassVar

import jax


@dataclasses.dataclass(frozen=True)
class FixedNoise:
    """The objective's own noise at every step, and the base of what chooses it from the data.

    Such a choice has a state, a dict of arrays that a run carries from step to step; the noise of a step depends on
    earlier steps only.

    learns: the state changes with every step, by `batch_statistics` and `update_state`.
    candidates: intervals `[I, 2]` among which a search at validations chooses (training/noise.py), whole_range: the one
    `[2]` that training starts with.
    changes_distribution: what it chooses is the distribution of masked tokens, for pictures.
    """

    learns: ClassVar[bool] = False
    candidates: ClassVar[Any] = ()
    whole_range: ClassVar[Any] = ()
    changes_distribution: ClassVar[bool] = False

    def init_state(self) -> dict[str, Any]:
        return {}

    def state_for_interval(self, interval: Any) -> dict[str, Any]:
        """The state with the noise of a candidate."""
        del interval
        return {}

    def corrupt_arguments(self, state: dict, tokens_BxL: jax.Array) -> dict[str, Any]:
        """What `Objective.corrupt` takes instead of its own, by keyword."""
        del state, tokens_BxL
        return {}

    def batch_statistics(self, losses_BxMxL: jax.Array | None, masked_BxMxL: jax.Array,
                         tokens_BxL: jax.Array | None = None) -> dict[str, jax.Array]:
        """What the cross-entropies of some rows add to the state."""
        del losses_BxMxL, masked_BxMxL, tokens_BxL
        return {}

    def update_state(self, state: dict, batch_statistics: dict) -> dict[str, jax.Array]:
        """The state after a step."""
        del batch_statistics
        return state

    def as_metrics(self, state: dict) -> dict[str, list[float]]:
        """The noise of a state, for the log."""
        del state
        return {}
