"""Block diffusion with blocks of several sizes in one batch, so that one network can be used at any of them."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion.masked import Masked
from bd3lm_jax.diffusion.network_inputs import NetworkInputs
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective


@dataclasses.dataclass(frozen=True)
class Mixed(Objective):
    """Each row of a step draws its block size from `sizes`, all equally likely; its noise is that of `Masked` with this
    size and the same hyperparameters. The network is told nothing of the size but through what each token sees.

    The loss is the mean of the bounds at all sizes and a bound of no one model: the likelihood is measured at one size,
    `block_size` unless another is asked for.

    Raises:
        UserError: a hyperparameter is out of range or does not go with another.
    """

    kind: ClassVar[str] = "mixed"
    title: ClassVar[str] = "mixed block sizes"
    supports_target_shift: ClassVar[bool] = False
    block_size: int = 16  # one of `sizes`: what evaluation and sampling use unless they are told another
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16)  # tokens a block, rising: multiples of the first, divisors of the last
    schedule: str = "loglinear"  # these four as for `Masked`
    corruption: str = "exact_count"
    complement: bool = False
    eps: float = 1e-3

    def __post_init__(self):
        sizes = self.sizes
        if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
            raise UserError(f"diffusion.sizes is {sizes}, expected different block sizes of at least 1, the smallest "
                            "first, e.g. (1, 4, 16)")
        if any(size % sizes[0] or sizes[-1] % size for size in sizes):
            raise UserError(f"diffusion.sizes is {sizes}, expected multiples of the smallest that divide the largest, "
                            "e.g. (1, 4, 16)")
        if self.block_size not in sizes:
            raise UserError(f"diffusion.block_size is {self.block_size}, expected one of diffusion.sizes={sizes}")
        self.at(self.block_size)  # raises for the rest

    @property
    def noise_sample_multiple(self) -> int:
        return 2 if self.complement else 1

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return self.sizes

    def at(self, size: int) -> Masked:
        """The objective of rows with blocks of `size`."""
        return Masked(block_size=size, schedule=self.schedule, corruption=self.corruption, count_probs=(),
                      complement=self.complement, clip_low=0.0, clip_high=1.0, eps=self.eps)

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int) -> Noised:
        """`noise_samples` noised copies of a batch, all of a row with blocks of one size; its level is given for each
        smallest block. A row's size is a function of the key and its index, its noise that of a batch of its size
        alone.

        Arguments and errors as for `Masked.corrupt`.
        """
        size_key, noise_key = jax.random.split(key)
        which_B = self.sample_size_index(size_key, x0_BxL.shape[0])
        each = [self._of_size(size, noise_key, x0_BxL, segment_BxL, noise_samples, mask_id, end_id)
                for size in self.sizes]

        def select(*arrays_B):
            return jax.vmap(lambda which, *rows: jnp.stack(rows)[which])(which_B, *arrays_B)

        capacity = max(noised.capacity for noised in each)
        noised = jax.tree.map(select, *(noised.replace(capacity=capacity) for noised in each))
        return noised.replace(size_B=jnp.asarray(self.sizes)[which_B])

    def inputs(self, noised: Noised, rows: Mapping[str, jax.Array], vocab_size: int) -> NetworkInputs:
        """Two streams in blocks of each row's own size; of `block_size` where the noise has one size."""
        inputs = super().inputs(noised, rows, vocab_size)
        if noised.size_B is None:
            return inputs
        return inputs.replace(block_size=self.sizes[-1], size_B=noised.size_B, min_block_size=self.sizes[0])

    def sample_size_index(self, key: jax.Array, rows: int) -> jax.Array:
        """The index of each row's size, int32 `[rows]`."""
        def of_row(row):
            return jax.random.randint(jax.random.fold_in(key, row), (), 0, len(self.sizes))
        return jax.vmap(of_row)(jnp.arange(rows))

    def _of_size(self, size, *arguments):
        noised = self.at(size).corrupt(*arguments)
        levels = jnp.repeat(noised.sigma_BxMxK, size // self.sizes[0], axis=-1)
        return noised.replace(sigma_BxMxK=levels)
