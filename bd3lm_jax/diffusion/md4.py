"""Masked diffusion in continuous time with any schedule (MD4, arXiv 2406.04329)."""

import dataclasses
from typing import ClassVar

import jax

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import independent
from bd3lm_jax.diffusion.noised import Noised
from bd3lm_jax.diffusion.objective import Objective
from bd3lm_jax.diffusion.schedule import get_schedule

MD4_NAMES = {"linear": "loglinear", "cosine": "sine"}  # names of MD4 -> of schedule.py; and "polynomial:p"


@dataclasses.dataclass(frozen=True)
class MD4(Objective):
    """E_t[ alpha' / (1 - alpha) * sum over masked of log p ], t ~ U(0, 1).

    Schedules: "linear", alpha = 1 - t; "cosine", 1 - cos(pi/2 (1-t)); "polynomial:p", 1 - t^p. With c = `clip` they are
    squeezed to [c, 1-c]: 1 - alpha = c + (1-2c) (1 - alpha as named). The bound does not depend on the schedule, which
    only says how often each mask probability is drawn: this is `Masked` with independent tokens, other schedules and
    another clip. The clip leaves out mask probabilities below c and above 1-c, about c times the cross-entropy of a
    token masked almost alone and c times that of one masked with all others, in nats a token; it is a bound for c = 0.
    """

    kind: ClassVar[str] = "md4"
    title: ClassVar[str] = "MD4"
    block_size: int = 4  # tokens a block
    schedule: str = "cosine"  # "linear", "cosine", "polynomial:p"
    clip: float = 1e-4  # 1e-4 as published

    def __post_init__(self):
        super().__post_init__()
        if self.schedule not in MD4_NAMES and not self.schedule.startswith("polynomial:"):
            raise UserError(f"diffusion.schedule is '{self.schedule}', expected linear, cosine or polynomial:p for "
                            "diffusion.kind='md4'")
        get_schedule(self._name)
        if not 0 <= self.clip < 0.5:
            raise UserError(f"diffusion.clip is {self.clip}, expected from 0 to below 0.5, e.g. 1e-4")

    @property
    def is_bound(self) -> bool:
        return self.clip == 0

    @property
    def bound(self) -> "MD4":
        return dataclasses.replace(self, clip=0.0)

    @property
    def _name(self) -> str:
        return MD4_NAMES.get(self.schedule, self.schedule)

    def corrupt(self, key: jax.Array, x0_BxL: jax.Array, segment_BxL: jax.Array, noise_samples: int, mask_id: int,
                end_id: int) -> Noised:
        """`noise_samples` noised copies of a batch, stratified over rows, copies and blocks; arguments as for
        `Masked.corrupt`.
        """
        schedule = get_schedule(self._name)
        noise_draw = independent.sample_noise(key, x0_BxL.shape, noise_samples, self.block_size)
        t_BxMxK, clip_scale = noise_draw.time_BxMxK, 1 - 2 * self.clip
        prob_BxMxK = self.clip + clip_scale * schedule.mask_prob(t_BxMxK)
        weight_BxMxK = clip_scale * schedule.weight(t_BxMxK) * schedule.mask_prob(t_BxMxK) / prob_BxMxK
        return independent.apply_masks(noise_draw.order_BxMxL, prob_BxMxK, weight_BxMxK,
                                       independent.sigma_of_mask_prob(prob_BxMxK),
                                       x0_BxL, segment_BxL, mask_id)
