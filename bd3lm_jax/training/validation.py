"""The bound on the validation split while a run trains and when it ends."""

from typing import Any

import jax

from bd3lm_jax.core.log import spinner
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.likelihood import paired
from bd3lm_jax.likelihood.evaluate import Evaluator
from bd3lm_jax.likelihood.options import EstimatorOptions
from bd3lm_jax.models import lora


class Validator:
    """Validates the states of a run (`train.Run`)."""

    def __init__(self, run: Any, evaluator: Evaluator):
        self.run, self.evaluator = run, evaluator

    def weights(self, state: TrainState) -> dict:
        """What is evaluated: the average if there is one, with low-rank updates in their matrices."""
        return lora.merge_lora_jitted(state.ema or state.params, self.run.config.train)

    def __call__(self, state: TrainState, is_final: bool) -> dict:
        """The bound on the validation split; {} for a model that has none.

        is_final: as in the report, `eval.report_rows` rows with all draws, which then stay in the run directory by
        document; else `eval.rows` rows from one draw.
        """
        config, rows = self.run.config, self.run.valid_rows
        if not config.diffusion.has_bound:
            return {}
        with spinner("validating"):
            options = EstimatorOptions(draws=config.eval.mc_samples if is_final else 1, seed=config.seed)
            weights, num_rows = self.weights(state), config.eval.report_rows if is_final else config.eval.rows
            measured = self.evaluator.measure(weights, rows, options, num_rows=num_rows)
            of_other_mode = self.evaluator.autoregressive_summary(weights, rows, num_rows)
        if is_final and jax.process_index() == 0:
            paired.save(self.run.workdir, measured, rows)
        return measured.summary(rows) | of_other_mode

    def best_checkpoint_bound(self, state: TrainState, valid: dict, is_final: bool) -> float | None:
        """The bound that tells the best checkpoint: of the same rows with the same noise at every step.

        valid: the validation of this step, {} if there was none. is_final: it was the last one, that of the report.
        """
        config = self.run.config
        if not valid or not config.checkpoint.keep_best:
            return None
        rows = len(self.run.rows["valid"])
        measured, regular_rows = (min(count or rows, rows) for count in (config.eval.report_rows, config.eval.rows))
        if is_final and (config.eval.mc_samples > 1 or measured != regular_rows):
            valid = self(state, is_final=False)
        return valid["nll"]
