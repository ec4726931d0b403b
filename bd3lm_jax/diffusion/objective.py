"""What every objective says of itself, and what it may leave out."""

import math
from collections.abc import Callable
from typing import ClassVar

import jax

from bd3lm_jax.core.errors import UserError


class Objective:
    """Base of the objectives, which are frozen dataclasses of their hyperparameters.

    An objective has a `kind` (its name in configs), a `block_size`, and
    `corrupt(key, x0_BxL, segment_BxL, noise_samples, mask_id, end_id, ...) -> Noised`. What it does not say is as for masked
    diffusion:

    title: its name in tables and pictures; "" for its kind.
    causal: the network reads one stream, the tokens before; else noised blocks and the clean text before them.
    masks: the network predicts the tokens under the mask token from those that are left. So the bound of
    `estimators.py` and the masked samplers apply, however it was trained. Else it has an estimator of its own
    ("native") or none.
    needs: names of further arrays `[B, L]` of a batch, which `corrupt` takes as keywords.
    token_loss: None for the cross-entropy of the clean token where the mask token has probability 0, else a method
    `(logits_NxV, target_N, xt_N, sigma_N, mask_id) -> float32 [N]` in nats, what the weights of `Noised` multiply.
    Logits are float32 as the network gives them, V without padding; sigma is that of `Noised`.
    mean_term: None, or a method that takes what `token_loss` takes -> float32 [N] in nats, bool [N]: the plain mean of
    the one where the other holds and the weight is positive, copy by copy, joins the loss a token. It needs a
    `token_loss`.
    mixtures: None where the noised stream is ids, else a method `(noised, x0_BxL, vocab_size) -> float32 [B, M, L, V]`:
    a distribution over the vocabulary at every place, computed for a microbatch at a time.
    sampler: what writes with such a model when no sampler is named.
    is_bound: whether the weighted loss estimates a bound on the NLL of every token without bias.
    bound: the objective whose weighted loss is that bound for a network trained by this one, or None.
    needs_level: the network must be told the noise level (model.time_conditioning).
    sigma_max: the network never sees a larger noise level.
    scores: the network gives log scores, whose total over the tokens is a number of its own (see SEDD).
    redraws: the network gives probabilities of x0 where every token may be a wrong letter, for samplers that redraw.
    noise_sample_multiple: copies come in multiples of this, 2 where a mask and its complement are a pair.
    learns: the objective has parameters, `init_learned_params(key, vocab_size, width)` -> dict of float32 arrays, which
    `corrupt` (with the network's table "embedding" `[V', width]` added) and `token_loss` take as `learnt`. They are
    trained, saved and averaged with those of the network, and not used after. As the noise depends on them, their
    gradient is that of the loss and `noise_gradient(learnt, noised, x0_BxL, segment_BxL, losses_BxMxL)`, a dict as of
    `init_learned_params`, summed over the rows given; learnt as for `corrupt`, losses as of `token_loss`, without a
    gradient.
    """

    kind: ClassVar[str]
    title: ClassVar[str] = ""
    causal: ClassVar[bool] = False
    uses_mask_token: ClassVar[bool] = True
    extra_batch_keys: ClassVar[tuple[str, ...]] = ()
    token_loss: ClassVar[Callable[..., jax.Array] | None] = None
    mean_term: ClassVar[Callable[..., tuple[jax.Array, jax.Array]] | None] = None
    soft_inputs: ClassVar[Callable[..., jax.Array] | None] = None
    sampler: ClassVar[str] = "first_hitting"
    is_bound: ClassVar[bool] = False
    needs_time_conditioning: ClassVar[bool] = False
    sigma_max: ClassVar[float] = math.inf
    predicts_scores: ClassVar[bool] = False
    can_resample_tokens: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    block_size: int

    def __post_init__(self):
        if self.block_size < 1:
            raise UserError(f"diffusion.block_size is {self.block_size}, expected at least 1")

    @property
    def bound(self) -> "Objective | None":
        return self if self.is_bound else None

    @property
    def noise_sample_multiple(self) -> int:
        return 2 if getattr(self, "complement", False) else 1

    def prepare_batch(self, key: jax.Array, batch: dict, end_id: int) -> dict:
        """The batch as training reads it, before noise: `tokens`, `segments`, `positions` and what it
        `extra_batch_keys`, `[B, L]` each. A function of the key, which is that of the step, and of the whole batch."""
        del key, end_id
        return batch


def check_rows(noise_samples: int, length: int, block_size: int) -> None:
    """UserError for rows that `corrupt` cannot noise."""
    if noise_samples < 1:
        raise UserError(f"noise_samples is {noise_samples}, expected at least 1 noised copy of each row")
    if length % block_size:
        raise UserError(f"length {length} is not a multiple of diffusion.block_size={block_size}: pad the rows to "
                        f"{-(-length // block_size) * block_size} tokens")
