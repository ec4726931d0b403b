"""Values that travel together through an evaluation: which text and what of it counts, which model, how to estimate."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from bd3lm_jax.core.schema import DataConfig
from bd3lm_jax.data import domains
from bd3lm_jax.data.domains import Text
from bd3lm_jax.data.tokenizers import Tokenizer
from bd3lm_jax.data.windows import ScoringConvention


class Target(NamedTuple):
    """Draw until the 95 % half width of the Monte-Carlo part is `ci` of the nll, at most `max_draws` draws a row.

    Texts of few rows take draws until their spread is known with `evaluate.MIN_FREEDOM` degrees of freedom, or all of
    them."""

    ci: float
    max_draws: int


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Which text is scored, and what of it counts.

    data, split, data_dir: as for `domains.open_text`. context_mode, stride, end_token: as in `ScoringConvention`.
    first_token: "predict", "skip", or "" for "predict" where every model can.
    """

    data: str = domains.OWN
    split: str = "test"
    data_dir: str = ""
    context_mode: str = "independent"
    stride: int = 0
    first_token: str = ""
    end_token: str = "count"

    def convention_for(self, configs: Iterable[Any]) -> ScoringConvention:
        """What counts for models with these Configs. UserError where one cannot do what `first_token` says."""
        return domains.convention_for(configs, context_mode=self.context_mode, stride=self.stride,
                                      first_token=self.first_token, end_token=self.end_token)

    def open(self, own: DataConfig, block_size: int, tokenizer: Tokenizer, convention: ScoringConvention) -> Text:
        """The text as rows for a model (`domains.open_text`)."""
        return domains.open_text(own, block_size, tokenizer, data=self.data, split=self.split, data_dir=self.data_dir,
                                 convention=convention)


@dataclasses.dataclass(frozen=True)
class EstimatorOptions:
    """How a likelihood is estimated.

    estimator: a name in `estimators.ESTIMATORS`, "" for the best one of the model (`estimators.default_estimator`), or
    an estimator itself. draws: noise draws a row and round. target: draw on until it is met; None: no more rounds.
    """

    estimator: Any = ""
    draws: int = 1
    seed: int = 0
    target: Target | None = None


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which weights of a run, and how they are evaluated.

    weights: "ema" or "params". batch_size: rows a pass, 0 for the run's own. block_size: one that the model was trained
    with, 0 for its usual one. length: tokens a row of a published checkpoint, 0 for its context up to 1024. step: as
    for `restore.restore`.
    """

    weights: str = "ema"
    batch_size: int = 0
    block_size: int = 0
    length: int = 0
    step: int | str = "latest"
