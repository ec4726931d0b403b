"""What every objective says of itself, and what it may leave out."""

from collections.abc import Callable
from typing import ClassVar

import jax


class Objective:
    """Base of the objectives, which are frozen dataclasses of their hyperparameters.

    An objective has a `kind` (its name in configs), a `block_size`, and
    `corrupt(key, x0_BxL, segment_BxL, views, mask_id, end_id, ...) -> Noised`. What it does not say is as for masked
    diffusion:

    causal: the network reads one stream, the tokens before; else noised blocks and the clean text before them.
    masks: the network predicts the tokens under the mask token from those that are left. So the bound of
    `estimators.py` and the masked samplers apply, however it was trained. Else it has an estimator of its own
    ("native") or none.
    needs: names of further arrays `[B, L]` of a batch, which `corrupt` takes as keywords.
    token_loss: None for the cross-entropy of the clean token where the mask token has probability 0, else a method
    `(logits_NxV, target_N, xt_N, sigma_N, mask_id) -> float32 [N]` in nats, what the weights of `Noised` multiply.
    Logits are float32 as the network gives them, V without padding; sigma is that of `Noised`.
    mean_term: None, or a method that takes what `token_loss` takes -> float32 [N] in nats, bool [N]: the plain mean of
    the one where the other holds and the weight is positive, view by view, joins the loss a token. It needs a
    `token_loss`.
    inputs: None where the noised stream is ids, else a method `(noised, x0_BxL, vocab_size) -> float32 [B, M, L, V]`: a
    distribution over the vocabulary at every place, computed for a microbatch at a time.
    view_group: views come in multiples of this.
    init_learnt: parameters that the objective itself learns, {} for none. They are trained with the network's, stand in
    params["learnt"], and come back as the keyword `learnt` of `corrupt` with the network's embedding table added.
    learnt_gradient: None, or a method `(learnt, noised, x0_BxL, segment_BxL, losses_BxMxL) -> tree` of what is added to
    their gradient, summed over the rows given; losses as `token_loss`, without a gradient.
    sampler: what writes with such a model when no sampler is named.
    is_bound: whether the weighted loss estimates a bound on the NLL of every token without bias.
    """

    kind: ClassVar[str]
    causal: ClassVar[bool] = False
    masks: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()
    token_loss: ClassVar[Callable[..., jax.Array] | None] = None
    mean_term: ClassVar[Callable[..., tuple[jax.Array, jax.Array]] | None] = None
    inputs: ClassVar[Callable[..., jax.Array] | None] = None
    learnt_gradient: ClassVar[Callable[..., dict] | None] = None
    sampler: ClassVar[str] = "first_hitting"
    is_bound: ClassVar[bool] = False
    view_group: ClassVar[int] = 1
    block_size: int

    def init_learnt(self, key: jax.Array, vocab_size: int, width: int) -> dict:
        del key, vocab_size, width
        return {}
