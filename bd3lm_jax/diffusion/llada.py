"""LLaDA (arXiv 2502.09992): one noise level for a whole row; pre-training and supervised fine-tuning."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import corrupt
from bd3lm_jax.diffusion.masked import MASK_PROB_MAX
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective, check_rows
from bd3lm_jax.diffusion.schedule import stratified_uniform

NORMALISATIONS = ("tokens", "answer")


@dataclasses.dataclass(frozen=True)
class LLaDA(Objective):
    """Every token of a row is masked with probability t ~ U(0, 1), one t a row whatever the block size; the loss is

        sum over masked tokens of (1 / t) cross-entropy, over all tokens of the batch.

    `complement`: copies come in pairs, a mask and what it left, which is a mask of level 1 - t with weight 1 / (1 - t):
    each of the two is unbiased by itself.
    `random_length`: in this part of the batches all rows are cut to one length ~ U{1, ..., L}, behind which is padding.
    `sft`: the tokens of `prompt` (an array of the batch, true on prompts) are never masked and padding becomes end
    tokens that belong to the answer. `normalise` says what an answer's loss is divided by: "tokens", all tokens of the
    batch's answers, or "answer", its own length, before the mean over rows (the paper's).

    Without `sft` the loss is a bound: t is drawn from (0, 1) without a floor but that of float32 (2**-23), below which
    lie 2**-23 of the cross-entropy of a token masked almost alone. In a cut batch it is the bound of the text that is
    left. With `sft` it says nothing of the prompts, so it is no bound on the text.

    Raises:
        UserError: a hyperparameter is out of range or does not go with another.
    """

    kind: ClassVar[str] = "llada"
    title: ClassVar[str] = "LLaDA"
    block_size: int = 4
    complement: bool = False
    random_length: float = 0.01
    sft: bool = False
    normalise: str = "tokens"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.random_length <= 1:
            raise UserError(f"diffusion.random_length is {self.random_length}, expected 0 to 1, e.g. 0.01")
        if self.normalise not in NORMALISATIONS:
            raise UserError(f"diffusion.normalise is {self.normalise!r}, expected 'tokens' or 'answer'")
        if self.normalise == "answer" and not self.sft:
            raise UserError("diffusion.normalise='answer' needs answers: use 'tokens', or diffusion.sft=True with "
                            "prompts in the data")
        if self.sft and self.random_length:
            raise UserError(f"diffusion.random_length={self.random_length} would cut answers: use 0 with "
                            "diffusion.sft=True")

    @property
    def extra_batch_keys(self) -> tuple[str, ...]:
        return ("prompt",) if self.sft else ()

    @property
    def noise_sample_multiple(self) -> int:
        return 2 if self.complement else 1

    @property
    def is_bound(self) -> bool:
        return not self.sft

    def prepare_batch(self, key: jax.Array, batch: dict, end_id: int) -> dict:
        """Cut to a random length; with `sft` padding becomes end tokens of the row's last document."""
        segment_BxL = batch["segments"]
        place_L = jnp.arange(segment_BxL.shape[1])
        if self.random_length:
            whether_key, length_key = jax.random.split(key)
            cut_length = jax.random.randint(length_key, (), 1, len(place_L) + 1)
            cut_length = jnp.where(jax.random.uniform(whether_key) < self.random_length, cut_length, len(place_L))
            return {**batch, "segments": jnp.where(place_L < cut_length, segment_BxL, 0)}
        if not self.sft:
            return batch
        real_BxL = segment_BxL != 0
        last_BxL = jax.lax.cummax(jnp.where(real_BxL, place_L, 0), axis=1)  # of the real tokens so far
        def gather_last_real(x_BxL):
            return jnp.take_along_axis(x_BxL, last_BxL, axis=1)
        return {**batch, "tokens": jnp.where(real_BxL, batch["tokens"], end_id),
                "segments": gather_last_real(segment_BxL),
                "positions": gather_last_real(batch["positions"]) + place_L - last_BxL,
                "prompt": (batch["prompt"] != 0) & real_BxL}

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int, prompt: jax.Array | None = None) -> Noised:
        """`noise_samples` noised copies of a batch, their levels stratified over rows and copies (or pairs of copies).

        prompt: with `sft`, what is never masked, bool or int `[B, L]`. The rest as for `Masked.corrupt`.
        """
        batch, length = x0_BxL.shape
        check_rows(noise_samples, length, self.block_size)
        if self.complement and noise_samples % 2:
            raise UserError(f"noise_samples is {noise_samples}, diffusion.complement needs an even number")
        parts = noise_samples // 2 if self.complement else noise_samples
        maskable_BxL = segment_BxL != 0
        if self.sft:
            maskable_BxL &= prompt == 0
        level_key, token_key = jax.random.split(key)
        level_BxMx1 = stratified_uniform(level_key, (batch, parts, 1))
        masked_BxMxL = (jax.random.uniform(token_key, (batch, parts, length)) < level_BxMx1) & maskable_BxL[:, None]
        if self.complement:
            level_BxMx1 = corrupt.interleave(level_BxMx1, 1 - level_BxMx1)
            masked_BxMxL = corrupt.interleave(masked_BxMxL, ~masked_BxMxL & maskable_BxL[:, None])
        weight_BxMxL = jnp.where(masked_BxMxL, 1 / level_BxMx1, 0) * self._scale(segment_BxL, maskable_BxL)[:, None]
        return Noised(
            xt_BxMxL=jnp.where(masked_BxMxL, mask_id, x0_BxL[:, None]).astype(jnp.int32),
            weight_BxMxL=weight_BxMxL,
            sigma_BxMxK=-jnp.log1p(-jnp.minimum(level_BxMx1, MASK_PROB_MAX)),
            capacity=length,
        )

    def _scale(self, segment_BxL, maskable_BxL):
        """What turns division by the tokens of the batch, which is the step's, into that of `normalise`: `[B, 1]`."""
        answer_Bx1 = maskable_BxL.sum(-1, keepdims=True)
        if not self.sft:
            return jnp.ones(answer_Bx1.shape)
        tokens = (segment_BxL != 0).sum().astype(jnp.float32)
        if self.normalise == "tokens":
            return jnp.broadcast_to(tokens / jnp.maximum(answer_Bx1.sum(), 1), answer_Bx1.shape)
        return tokens / (jnp.maximum((answer_Bx1 > 0).sum(), 1) * jnp.maximum(answer_Bx1, 1))
