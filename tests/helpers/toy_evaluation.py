"""The options of an evaluation by the names of their fields."""

import dataclasses
from typing import Any

from bd3lm_jax.evaluation.evaluate_run import evaluate_run
from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions, TextOptions

KINDS = {"text": TextOptions, "estimator": EstimatorOptions, "model": ModelOptions}


def options_of(split: str = "valid", **fields: Any) -> dict[str, Any]:
    """{"text", "estimator", "model"} for the functions that evaluate; what is not given has its default."""
    fields["split"] = split
    made = {keyword: kind(**{field.name: fields.pop(field.name) for field in dataclasses.fields(kind)
                             if field.name in fields}) for keyword, kind in KINDS.items()}
    assert not fields, f"no options: {', '.join(fields)}"
    return made


def evaluated(workdir, baseline: str = "", **fields: Any) -> dict[str, Any]:
    """The likelihood of the validation split of a run under these options."""
    return evaluate_run(str(workdir), baseline=baseline, **options_of(**fields))
