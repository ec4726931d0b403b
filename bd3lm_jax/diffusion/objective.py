"""What every objective says of itself, and what it may leave out."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import jax

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.network_inputs import NetworkInputs
from bd3lm_jax.diffusion.noised import Noised


class Loss(NamedTuple):
    """The losses of single positions; each takes `(logits_NxV, target_N, xt_N, sigma_N, mask_id)`.

    Logits are float32 as the network gives them, V without padding; sigma is that of `Noised`.

    token_loss: -> float32 `[N]` in nats, what the weights of `Noised` multiply; None: the cross-entropy of the clean
    token where the mask token has probability 0.
    mean_term: -> float32 `[N]` in nats, bool `[N]`: the plain mean of the one where the other holds and the weight is
    positive, copy by copy, joins the loss a token. It needs a `token_loss`. None: no such term.
    """

    token_loss: Callable[..., jax.Array] | None = None
    mean_term: Callable[..., tuple[jax.Array, jax.Array]] | None = None


class Objective:
    """Base of the objectives, which are frozen dataclasses of their hyperparameters.

    An objective has a `kind` (its name in configs), a `block_size`, and
    `corrupt(key, x0_BxL, segment_BxL, noise_samples, mask_id, end_id, ...) -> Noised`. It answers four more questions
    with methods that are here for masked diffusion in blocks: `prepare_batch`, `inputs`, `outputs` and `loss`. What
    else it may say:

    title: its name in tables and pictures; "" for its kind.
    causal: the network reads one stream, the tokens before; else noised blocks and the clean text before them.
    attention_rule: which clean tokens a clean token attends to ("causal", "block_causal"), in a plain pass as well.
    needs_clean_stream: there must be blocks before others, fewer tokens a block than a row has.
    exact_likelihood: one pass gives the likelihood itself, and not only where blocks have one token.
    draws_noise: `corrupt` noises tokens of the segments it is given. Else these say where documents begin.
    weights_decide_inputs: the network does not read tokens of weight 0, so weights may not be changed after `corrupt`.
    uses_mask_token: the network predicts the tokens under the mask token from those that are left. So the bound of
    `estimators.py` and the masked samplers apply, however it was trained. Else it has an estimator of its own
    ("native") or none.
    extra_batch_keys: names of further arrays `[B, L]` of a batch, which `corrupt` takes as keywords.
    token_loss, mean_term: None, or methods as in `Loss`.
    reads_soft_inputs: the noised stream is distributions over the vocabulary, not ids.
    supports_target_shift: it may train networks whose outputs predict the next token (scoring/target_shift.py).
    sampler: what samples from such a model when no sampler is named.
    is_bound: whether the weighted loss estimates a bound on the NLL of every token without bias.
    bound: the objective whose weighted loss is that bound for a network trained by this one, or None.
    needs_time_conditioning: the network must take the noise level (model.time_conditioning).
    sigma_max: the network never takes a larger noise level.
    predicts_scores: the network gives log scores, whose total over the tokens is a number of its own (see SEDD).
    can_resample_tokens: the network gives probabilities of x0 where every token may be wrong, for samplers that draw
    tokens again.
    noise_sample_multiple: noised copies come in multiples of this, 2 where a mask and its complement are a pair.
    learns: it has parameters of its own (learned_noise.py).
    """

    kind: ClassVar[str]
    title: ClassVar[str] = ""
    causal: ClassVar[bool] = False
    attention_rule: ClassVar[str] = "block_causal"
    needs_clean_stream: ClassVar[bool] = False
    exact_likelihood: ClassVar[bool] = False
    draws_noise: ClassVar[bool] = True
    weights_decide_inputs: ClassVar[bool] = False
    uses_mask_token: ClassVar[bool] = True
    extra_batch_keys: ClassVar[tuple[str, ...]] = ()
    token_loss: ClassVar[Callable[..., jax.Array] | None] = None
    mean_term: ClassVar[Callable[..., tuple[jax.Array, jax.Array]] | None] = None
    reads_soft_inputs: ClassVar[bool] = False
    supports_target_shift: ClassVar[bool] = True
    sampler: ClassVar[str] = "first_hitting"
    is_bound: ClassVar[bool] = False
    needs_time_conditioning: ClassVar[bool] = False
    sigma_max: ClassVar[float] = math.inf
    predicts_scores: ClassVar[bool] = False
    can_resample_tokens: ClassVar[bool] = False
    noise_sample_multiple: ClassVar[int] = 1
    learns: ClassVar[bool] = False
    block_size: int

    def __post_init__(self):
        if self.block_size < 1:
            raise UserError(f"diffusion.block_size is {self.block_size}, expected at least 1")

    @property
    def bound(self) -> "Objective | None":
        return self if self.is_bound else None

    def autoregressive(self, bos_in_context: bool) -> "Objective | None":
        """The objective by which the same weights are an autoregressive model; None where they are none.

        bos_in_context: the network reads every token one place later, behind an end token that all attend to.
        """
        del bos_in_context
        return None

    @property
    def predicts_unseen_tokens(self) -> bool:
        """Whether the network gives tokens that it does not see a probability, so that part of a text can be scored."""
        return self.exact_likelihood or self.uses_mask_token

    @property
    def has_bound(self) -> bool:
        """Whether the likelihood of such a model can be bounded at all."""
        return self.predicts_unseen_tokens or self.bound is not None

    @property
    def predicts_first_token(self) -> bool:
        """Whether the first token of a text is predicted too, so that a text may be written from nothing."""
        return True

    @property
    def begins_with_end_token(self) -> bool:
        """Whether the network reads the end token before the first token of a text."""
        return False

    @property
    def bos_in_context(self) -> bool:
        """Whether that end token takes a place of its own, to which all tokens attend."""
        return self.begins_with_end_token

    @property
    def needs_density_tags(self) -> bool:
        """Whether densities must be tags, 0 or 1, not numbers between."""
        return False

    @property
    def mask_prob_range(self) -> tuple[float, float]:
        """Between which mask probabilities a block is noised."""
        return 0.0, 1.0

    @property
    def block_size_is_fixed(self) -> bool:
        """Whether blocks of another size would need other hyperparameters as well."""
        return len(self.block_sizes) > 1

    def at(self, size: int) -> "Objective":
        """The same with blocks of `size` tokens."""
        return dataclasses.replace(cast(Any, self), block_size=size)

    def with_vocab_size(self, size: int) -> "Objective":
        """The same over `size` ids, where it is one over a vocabulary."""
        del size
        return self

    def check_vocab_size(self, size: int) -> None:
        """UserError for one that is over another vocabulary than one of `size` ids."""

    def predicted_tokens(self, segment_BxL: jax.Array) -> jax.Array:
        """Bool `[B, L]`: the tokens that the bound is a sum over; padding (segment 0) is not."""
        return segment_BxL != 0

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens a block, of all that it trains side by side, rising."""
        return (self.block_size,)

    def stream_lengths(self, length: int, noise_samples: int) -> tuple[int, int]:
        """Of a row: noised copies, and clean tokens that the network reads (the last block is read by nobody)."""
        return noise_samples, length - self.block_sizes[0]

    def prepare_batch(self, key: jax.Array, batch: dict, end_id: int) -> dict:
        """The batch as training reads it, before noise: `tokens`, `segments`, `positions` and its `extra_batch_keys`,
        `[B, L]` each. A function of the key, which is that of the step, and of the whole batch."""
        del key, end_id
        return batch

    def counted_tokens(self, noised: Noised, maskable_BxL: jax.Array) -> jax.Array:
        """Bool array whose true entries are the tokens of a batch that the loss is a mean over.

        maskable_BxL: the segments that noise was drawn for, 0 elsewhere.
        """
        del noised
        return maskable_BxL != 0

    def inputs(self, noised: Noised, rows: Mapping[str, jax.Array], vocab_size: int) -> NetworkInputs:
        """What the network reads. rows: `tokens`, `positions` and `segments`, int32 `[B, L]` each."""
        del vocab_size
        return NetworkInputs(rows["tokens"], rows["positions"], rows["segments"], self.block_size,
                             noised=noised.xt_BxMxL, rule=self.attention_rule, sigma=noised.sigma_BxMxK,
                             clean_outputs=noised.clean is not None)

    def outputs(self, noised_BxMxLxD: Any, clean_BxLxD: Any) -> jax.Array:
        """What predicts the tokens of every copy, `[B, M, L, D]`, of a pass's hidden states; one of them is None."""
        del clean_BxLxD
        return noised_BxMxLxD

    def loss(self, learned_params: dict | None = None) -> Loss:
        """What training sums. learned_params: those of an objective that `learns`, else None."""
        del learned_params
        return Loss(self.token_loss, self.mean_term)

    def add_noise_gradient(self, grads: dict, params: dict, noised: Noised, rows: Mapping[str, jax.Array],
                           losses_BxMxL: jax.Array | None) -> dict:
        """The gradient of the summed loss with what comes from the choice of the noise; only one that `learns` has it.

        grads, params: trees of the trained and of all parameters. losses: as of `token_loss`; None where nothing
        `learns`.
        """
        del params, noised, rows, losses_BxMxL
        return grads


def check_rows(noise_samples: int, length: int, block_size: int) -> None:
    """UserError for rows that `corrupt` cannot noise."""
    if noise_samples < 1:
        raise UserError(f"noise_samples is {noise_samples}, expected at least 1 noised copy of each row")
    if length % block_size:
        raise UserError(f"length {length} is not a multiple of diffusion.block_size={block_size}: pad the rows to "
                        f"{-(-length // block_size) * block_size} tokens")
