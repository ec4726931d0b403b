"""Noise chosen from the data, with the network at hand (the mathematics is in diffusion/clip.py)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bd3lm_jax.config import Config
from bd3lm_jax.core import jax_settings, log
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.diffusion import corrupt
from bd3lm_jax.diffusion.clip import relative_variance
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.models import Backbone
from bd3lm_jax.models.forward import Execution
from bd3lm_jax.parallel.sharding import block_until_ready_if_simulated
from bd3lm_jax.scoring.score import SpecialIds, row_losses, score
from bd3lm_jax.training.step import draw_noise, sum_over_rows

CLIP_SEARCH_FOLD = 0x636C6970  # tells the noise of a search from that of the steps


class NoiseSelector:
    """Chooses the noise of a run at its validations, where that needs passes of its own; tells what was chosen."""

    def __init__(self, config: Config, model: Backbone, special: SpecialIds, mesh: jax.sharding.Mesh):
        self.config, self.adaptive_noise, self.replicated = config, config.adaptive_noise, NamedSharding(mesh, P())
        self._moments = jax.jit(make_block_moments(config, model, special), out_shardings=self.replicated)

    def __call__(self, state: TrainState, batch: Callable[[int], dict], step: int) -> tuple[TrainState, dict]:
        """The state to go on with after `step` updates, and its noise for metrics (empty if it is fixed).

        A search takes the weights that are validated and the next batches of the training split, `batch(step)` and so
        on, which the network has not been trained on in this epoch. It is not repeated at a last step that is no
        multiple of `eval.every`: a run that stops there and goes on has the noise of one that never stopped.
        """
        if len(self.adaptive_noise.candidates) and step % self.config.eval.every == 0:
            batches = [batch(step + i) for i in range(self.config.noise.clip_batches)]
            key = jax.random.fold_in(jax.random.fold_in(jax_settings.key(self.config.seed), step), CLIP_SEARCH_FOLD)
            interval = self._search(state.ema or state.params, key, batches)
            noise = self.adaptive_noise.state_for_interval(interval)
            state = state.replace(noise=jax.device_put(noise, self.replicated))
        return state, self.as_metrics(state)

    def as_metrics(self, state: TrainState) -> dict[str, list[float]]:
        """The noise of a state: `clip` or `count_probs`."""
        return self.adaptive_noise.as_metrics(jax.device_get(state.noise))

    def _search(self, params, key, batches: list[dict]) -> np.ndarray:
        """The candidate interval `[2]` whose blocks' loss has the least relative variance; all see the same draws."""
        candidates = np.array([self.adaptive_noise.whole_range, *self.adaptive_noise.candidates])
        parts = [[block_until_ready_if_simulated(self._moments(params, jax.random.fold_in(key, i),
                                                               self.adaptive_noise.state_for_interval(interval), batch))
                  for i, batch in enumerate(batches)] for interval in candidates]
        moments_3xI = np.array(jax.device_get(parts), np.float64).sum(1).T
        variance = relative_variance(*moments_3xI)
        best = 1 + int(np.argmin(variance[1:]))
        log.note(f"noise clipped to {candidates[best].tolist()}: variance of a block's loss over its squared mean "
                 f"{variance[best]:.3f}, {variance[0]:.3f} on {candidates[0].tolist()}")
        return candidates[best]


def make_block_moments(config: Config, model: Backbone, special: SpecialIds):
    """`f(params, key, noise, batch)` -> float32 `[3]`: blocks, and the sums of their losses and of these squared.

    A loss is that of training with the state `noise` of the adaptive noise, in nats a token.
    """
    execution = config.execution

    def of_rows(params, rows):
        losses_BxMxK, real_BxMxK = block_losses(model, params, config.diffusion, special, rows["noised"], rows,
                                                execution)
        return jnp.stack([jnp.sum(real_BxMxK), jnp.sum(losses_BxMxK), jnp.sum(losses_BxMxK**2)])

    def moments(params, key, noise, batch):
        noised = draw_noise(config, special, key, batch, 1, noise, params)
        return sum_over_rows(lambda rows: of_rows(params, rows).astype(jnp.float32), {**batch, "noised": noised},
                             config.compute.microbatch or batch["tokens"].shape[0])

    return moments


def block_losses(model: Backbone, params: Any, objective: Any, special: SpecialIds, noised: Noised, rows: dict,
                 execution: Execution) -> tuple[jax.Array, jax.Array]:
    """Weighted loss of every block and copy in nats a token, float32 `[B, M, K]`, and where there are tokens.

    rows: `tokens`, `positions` and `segments`, int32 `[B, L]`.
    """
    scored = score(model, params, objective, noised, rows, execution, special.end)
    nats_BxMxC = row_losses(model, params, scored, special.mask, 0, objective.token_loss) * scored.weight_BxMxC
    n_BxK = corrupt.maskable_counts(rows["segments"] != 0, objective.block_size)
    add = jax.vmap(jax.vmap(lambda nats, block: jnp.zeros(n_BxK.shape[-1]).at[block].add(nats)))
    nats_BxMxK = add(nats_BxMxC, scored.index_BxMxC // objective.block_size)
    n_BxMxK = jnp.broadcast_to(n_BxK[:, None], nats_BxMxK.shape)
    return nats_BxMxK / jnp.maximum(n_BxMxK, 1), n_BxMxK > 0
