"""Which runs of a sweep are hopeless: those too far behind the best one, at the same step of equal training.

The rule is plain on purpose: one number that means something, no model of learning curves. What it can get wrong is a
run that starts slowly and would have caught up; `after` and the margin are the protection. A run that was given up
has saved its state and can go on.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.log import METRICS_FILE, read_metrics

MEASURE = "valid/bits_per_byte"  # comparable also where tokenizers differ, if they give the text back
BYTE_LEVEL = ("bytes", "gpt2", "bpe:")  # begins the names of those that certainly do


@dataclasses.dataclass(frozen=True)
class StoppingRule:
    """Give a run up that is more than `margin` bits per byte behind, once the part `after` of its steps is done."""

    margin: float
    after: float

    def __post_init__(self):
        if not 0 < self.margin < math.inf:
            raise UserError(f"early_stopping is {self.margin}, expected bits per byte above 0")
        if not 0 <= self.after < 1:
            raise UserError(f"early_stopping_after is {self.after}, expected a part of the steps, from 0 to below 1")

    def verdict(self, steps: int, own_curve: Mapping[int, float],
                other_curves: Mapping[str, Mapping[int, float]]) -> str | None:
        """Why a run of `steps` steps is hopeless, or None.

        ours, others: the validation bound in bits per byte, by step, of this run and of those that train alike, by
        name. What counts is the latest step at which this run and another one were both validated.
        """
        other_steps = set().union(*other_curves.values())
        shared = [step for step in own_curve if step >= self.after * steps and step in other_steps]
        if not shared:
            return None
        step = max(shared)
        best = min((name for name in other_curves if step in other_curves[name]),
                   key=lambda name: other_curves[name][step])
        gap = own_curve[step] - other_curves[best][step]
        if math.isnan(gap) or gap <= self.margin:
            return None
        return (f"{own_curve[step]:.4f} bits per byte at step {step}, {gap:.4f} behind {best}; allowed: "
                f"{self.margin:g}")


def comparable_key(config: Config) -> tuple[int, int, int, str]:
    """Equal for runs whose steps compare: steps (and with them the learning rate's decay), batch and length, and the
    tokenizer unless it is one whose bits per byte compare with those of others."""
    name = config.data.tokenizer
    return config.train.steps, config.train.batch_size, config.data.seq_len, "" if name.startswith(BYTE_LEVEL) else name


class ValidationCurve:
    """The validation bound of a run in bits per byte by step, inf where it was not finite; read again as it grows."""

    def __init__(self, workdir: Path):
        self._workdir, self._size, self._bound = workdir, -1, {}

    def read(self) -> dict[int, float]:
        path = self._workdir / METRICS_FILE
        size = path.stat().st_size if path.exists() else 0
        if size != self._size:
            lines = [line for line in read_metrics(self._workdir) if MEASURE in line]
            self._bound = {line["step"]: math.inf if line[MEASURE] is None else line[MEASURE] for line in lines}
            self._size = size
        return self._bound
