"""What a run logs of its steps and validations."""

import time

import numpy as np

from bd3lm_jax.config import Config
from bd3lm_jax.core.log import RunLog
from bd3lm_jax.core.stats import format_interval, format_number
from bd3lm_jax.training import optim
from bd3lm_jax.training.callbacks import Callback, Progress

SHOWN_COUNTS = 32  # larger blocks log their NLL at powers of two masked tokens only
RATE_STEPS = 20  # steps over which the shown rate is averaged


class Clock:
    """Seconds between steps; what happens in a pause does not count."""

    def __init__(self):
        self.seconds, self.last = [], None

    def tick(self) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now

    def pause(self) -> None:
        self.last = None

    def recent_s(self) -> float:
        return float(np.mean(self.seconds[-RATE_STEPS:])) if self.seconds else float("inf")

    def median_ms(self) -> float | None:
        return float(np.median(self.seconds)) * 1e3 if self.seconds else None


class Logging(Callback):
    """Shows every step, and logs averages over `log.every` steps and what was validated."""

    def __init__(self, config: Config, clock: Clock, log: RunLog):
        self.config, self.objective, self.clock, self.log = config, config.diffusion, clock, log
        self.tokens_a_step = config.train.batch_size * config.data.seq_len
        self.learning_rate = optim.make_schedule(config.optim, config.train.steps)

    def at_start(self, now: Progress) -> None:
        if now.valid:
            self.log.metrics(0, self._validation(0, now.valid))

    def after_launch(self, now: Progress) -> None:
        self._add(now, {}, {})

    def __call__(self, now: Progress) -> None:
        self._add(now, now.valid, now.noise)

    def _add(self, now: Progress, valid: dict, noise: dict) -> None:
        """Show the finished step, if there is one; log it if it ends a window or was validated."""
        if now.finished is None:
            return
        (step, values), every = now.finished, self.config.log.every
        now.losses = [*now.losses, values["loss"]][-max(every, RATE_STEPS):]
        rate, line = self.tokens_a_step / self.clock.recent_s(), {}
        self.log.progress(step, float(np.mean(now.losses[-RATE_STEPS:])), rate)
        if step % every == 0 or valid:
            line = self._training(step, values, float(np.mean(now.losses[-every:])), rate)
        if valid:
            line |= self._validation(step, valid)
            line |= {f"noise/{name}": value for name, value in noise.items()}
        if line:
            self.log.metrics(step, line)

    def _training(self, step: int, values: dict, loss: float, rate: float) -> dict:
        line = {"train/loss": loss, "train/grad_norm": values["grad_norm"],
                "train/lr": float(np.asarray(self.learning_rate(step - 1))), "train/masked_fraction": values["masked"],
                "train/tokens_per_s": rate}
        if self.config.train.block_sizes:
            line["train/block_size"] = self.config.block_size_at(step - 1)
        if self.objective.is_bound and not self.config.model.load_balancing:
            line["train/nll"] = loss
        return line

    def _validation(self, step: int, valid: dict) -> dict:
        by_count, size, (low, high) = valid["nll_by_count"], self.objective.block_size, valid["nll_ci95"]
        shown = [k for k in by_count if size <= SHOWN_COUNTS or k == size or k & (k - 1) == 0]
        nll = f"{format_number(valid['nll'], '.4f')} ({format_interval((low, high), '.4f')})"
        nll += f", {format_number(valid['ar_nll'], '.4f')} autoregressively" if "ar_nll" in valid else ""
        self.log.note(f"step {step}: valid nll {nll}, {format_number(valid['bits_per_byte'], '.3f')} bits per byte")
        names = ("nll", "ppl", "bits_per_byte", "ar_nll", "ar_ppl", "ar_bits_per_byte")
        return {**{f"valid/{name}": valid[name] for name in names if name in valid},
                "valid/nll_low": low, "valid/nll_high": high,
                **{f"valid/nll_at_{k}_masked": by_count[k] for k in shown}}
