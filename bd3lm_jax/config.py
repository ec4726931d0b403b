"""The resolved configuration of a run: frozen dataclasses.

`Config.from_dict` turns a nested mapping (an ml_collections ConfigDict, a `config.json`) into dataclasses. A missing
key has the default of its dataclass. A key that nobody reads and a wrong type are errors that name the key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from bd3lm_jax import models, unused_keys
from bd3lm_jax.core import migrations, plugins
from bd3lm_jax.core.errors import lookup
from bd3lm_jax.core.jax_settings import check_seed
from bd3lm_jax.core.schema import (
    SECTIONS,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    NoiseConfig,
    OptimConfig,
    TrainConfig,
)
from bd3lm_jax.core.typed import (
    Nested,
    as_mapping,
    as_section,
    as_type,
    check,
    check_known_keys,
    default_values,
    flatten,
    one_of,
)
from bd3lm_jax.data import corpora, density
from bd3lm_jax.diffusion import OBJECTIVES
from bd3lm_jax.diffusion.adaptive_noise import FixedNoise
from bd3lm_jax.diffusion.clip import ClipSearch, CountSchedule
from bd3lm_jax.diffusion.running import RunningLoss
from bd3lm_jax.models import BACKBONES, layers, lora, trunk
from bd3lm_jax.models.trunk import is_time_conditioned
from bd3lm_jax.scoring import annealing, curriculum, response_mask, target_shift

NETWORK, OBJECTIVE = "dit", "masked"  # the kinds of `model` and `diffusion` that name none
SAME_AS_INIT = "init_from"  # as model.kind: the network whose weights start the run (adapt.resolve)
# Sections and keys that may differ when a run goes on. More steps change a decaying learning rate from there on.
RESUMABLE = ("mesh", "log", "checkpoint", "eval", "train.steps", "data.cache_dir", "data.workers", "compute.attention",
             "compute.layers", "compute.remat", "compute.microbatch", "compute.loss_chunk")


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """What a language model is, also one of a published checkpoint: its network and the objective it was trained with,
    the dataclasses of a registered backbone and objective."""

    model: Any
    diffusion: Any

    def __post_init__(self):
        check(not self.diffusion.needs_time_conditioning or is_time_conditioned(self.model),
              f"model.time_conditioning is False: diffusion.kind='{self.diffusion.kind}' needs the noise level "
              "(sigma), use True")
        self.diffusion.check_vocab_size(self.model.vocab_size)

    @property
    def block_size(self) -> int:
        return self.diffusion.block_size

    @property
    def trained_block_sizes(self) -> tuple[int, ...]:
        """Block sizes at which the model can be used."""
        return self.diffusion.block_sizes

    @property
    def autoregressive(self) -> Self | None:
        """The same weights as an autoregressive model; None where they were not trained as one."""
        objective = self.diffusion.autoregressive(bos_in_context=self.model.target_shift == "block")
        if objective is None:
            return None
        return dataclasses.replace(self, diffusion=objective, model=dataclasses.replace(self.model, target_shift=""))

    def with_vocab(self, size: int) -> Self:
        """The same over `size` ids; -1: those of its tokenizer, once it is known."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=size),
                                   diffusion=self.diffusion.with_vocab_size(size))

    def at_block_size(self, size: int) -> Self:
        """The same with blocks of another size; a mixed objective becomes the masked one of that size."""
        return dataclasses.replace(self, diffusion=self.diffusion.at(size))

    def at_trained_block_size(self, size: int) -> Self:
        """As `at_block_size`. UserError unless the model was trained with that block size."""
        allowed_sizes = self.trained_block_sizes
        check(size in allowed_sizes, f"block_size is {size}, expected {'one of ' if len(allowed_sizes) > 1 else ''}"
              f"{', '.join(map(str, allowed_sizes))}, what the model was trained with")
        return self if self.trained_block_sizes == (size,) else self.at_block_size(size)

    def to_dict(self) -> dict:
        """Nested plain dict, with `kind` for the model and the objective."""
        result = dataclasses.asdict(self)
        for name, section in (("model", self.model), ("diffusion", self.diffusion)):
            result[name] = {"kind": section.kind, **result[name]}
        return result

    def sha256(self) -> str:
        """Hash of everything that decides what is learned (see RESUMABLE for what is left out)."""
        return decisive_hash(self.to_dict())


@dataclasses.dataclass(frozen=True)
class Config(LMConfig):
    """A whole run."""

    seed: int = 0
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    noise: NoiseConfig = NoiseConfig()

    def block_size_at(self, step: int) -> int:
        """Of the update that follows `step` updates: by the curriculum, if there is one."""
        return curriculum.size_at(self.train.block_sizes, step) or self.block_size

    def phase_at(self, step: int) -> tuple[int, bool]:
        """Block size of the update that follows `step` updates, and whether its attention is still being opened."""
        return self.block_size_at(step), step < self.train.anneal_steps

    def in_phase(self, size: int, is_annealing: bool) -> "Config":
        """The config of updates in such a phase."""
        config = self if size == self.block_size else self.at_block_size(size)
        return config if is_annealing else dataclasses.replace(config, train=dataclasses.replace(config.train,
                                                                                                 anneal_steps=0))

    @property
    def adaptive_noise(self) -> FixedNoise:
        """What chooses the training noise from the data."""
        return make_adaptive_noise(self.noise, self.diffusion, self.model.vocab_size)

    @property
    def execution(self) -> trunk.Execution:
        """How the passes of a run are computed."""
        compute = self.compute
        return trunk.Execution(compute.attention, compute.layers, compute.remat,
                               one_document=self.data.packing != "pack")

    @property
    def batch_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that a batch brings beside tokens, segments and positions."""
        from_schedule = ("density",) if self.noise.adaptive_noise == "running_loss" else ()
        from_data = ("prompt",) if self.data.source == "sft" else ()
        return tuple(name for name in dict.fromkeys((*self.diffusion.extra_batch_keys, *from_data))
                     if name not in from_schedule)

    @classmethod
    def from_dict(cls, mapping: "Nested | Config", stored: bool = False) -> "Config":
        """Validate a nested mapping; a Config stays what it is. UserError for an unknown or ill-typed key, and unless
        it is that of a run which was `stored` for one that is set and has no effect. Reads no file: a mapping whose
        network is that of `train.init_from` goes through `adapt.resolve` first."""
        if isinstance(mapping, Config):
            return mapping
        mapping, sections = read_sections(mapping)
        section = dict(as_mapping("model", mapping["model"]).items())
        kind = section.pop("kind", NETWORK)
        check(kind != SAME_AS_INIT,
              f"model.kind='{SAME_AS_INIT}' takes the network of train.init_from, and Config.from_dict reads no "
              "checkpoint: give it adapt.resolve(config)")
        sections["model"] = as_section("model", section, lookup(BACKBONES, kind, "backbone model.kind").Config)
        seed = check_seed(as_type("seed", mapping["seed"], int))
        config = cls(seed=seed, **sections)
        length, block_size = config.data.seq_len, config.block_size
        check(length % block_size == 0,
              f"diffusion.block_size={block_size} does not divide data.seq_len={length}: choose a length that is a "
              f"multiple, e.g. {-(-length // block_size) * block_size}")
        positions = config.model.positions
        check(positions is None or length <= positions,
              f"data.seq_len={length} is more than model.positions={positions}, which the network "
              "has learned positions for: raise one or shorten the other")
        check(not config.model.first_noised_layer or config.diffusion.draws_noise and block_size < length,
              "model.decoder_layers splits the network by clean and noised blocks, and this objective has no clean "
              f"blocks before noised ones: use 0, or blocks shorter than data.seq_len={length}")
        check(not config.diffusion.needs_clean_stream or block_size < length,
              f"diffusion.block_size={block_size} with data.seq_len={length} is one block a row, which leaves "
              f"diffusion.kind='{config.diffusion.kind}' no clean stream: use smaller blocks, e.g. block_size=4")
        noise_samples = config.train.noise_samples
        check(noise_samples == 1 or config.diffusion.draws_noise,
              f"train.noise_samples={noise_samples}: an autoregressive model has nothing noised, use 1")
        group = config.diffusion.noise_sample_multiple
        check(noise_samples % group == 0,
              f"train.noise_samples={noise_samples} is no multiple of {group}: diffusion.kind="
              f"'{config.diffusion.kind}' draws so many copies together here, use {-(-noise_samples // group) * group}")
        make_adaptive_noise(config.noise, config.diffusion, config.model.vocab_size)  # or an error
        curriculum.check(config)
        annealing.check(config)
        target_shift.check(config)
        lora.check(config)
        density.check_config(config)
        response_mask.check(config)
        rows, batch = config.compute.microbatch, config.train.batch_size
        check(rows == 0 or batch % rows == 0, f"compute.microbatch={rows} does not divide train.batch_size={batch}")
        if not stored:
            unused_keys.check(config)
        return config

    def to_dict(self) -> dict:
        """Nested plain dict, with `kind` for the model and the objective; `from_dict` inverts it."""
        return {"seed": self.seed, **super().to_dict()}

    def differing_keys(self, other: "Config") -> list[str]:
        """`key: here != there` for every decisive key whose value differs and has an effect in one of them."""
        here, there = _decisive(self.to_dict()), _decisive(other.to_dict())
        without_effect = unused_keys.keys(self) & unused_keys.keys(other)
        return [f"{key}: {here.get(key)!r} != {there.get(key)!r}"
                for key in sorted((here.keys() | there.keys()) - without_effect) if here.get(key) != there.get(key)]


def default_dict(network: str = NETWORK, objective: str = OBJECTIVE) -> dict[str, Any]:
    """A whole config as a nested dict, every key at its default. What is no registered network or objective has no
    keys."""
    return {"seed": 0, "model": models.default_section(network) if network in BACKBONES else {},
            "diffusion": {"kind": objective} | default_values(OBJECTIVES[objective]) if objective in OBJECTIVES else {},
            **{name: default_values(kind) for name, kind in SECTIONS.items()}}


def read_sections(mapping: Nested) -> tuple[dict, dict[str, Any]]:
    """A config as a dict, and its sections by name, all but the network. UserError as for `Config.from_dict`."""
    plugins.load_installed()
    mapping = default_dict() | dict(as_mapping("", mapping).items())
    check_known_keys("", mapping, [field.name for field in dataclasses.fields(Config)])
    sections = {name: as_section(name, mapping[name], kind) for name, kind in SECTIONS.items()}
    corpora.check(sections["data"])
    one_of("compute.remat", sections["compute"].remat, tuple(layers.REMAT))
    section = dict(as_mapping("diffusion", mapping["diffusion"]).items())
    kind = lookup(OBJECTIVES, section.pop("kind", OBJECTIVE), "objective diffusion.kind")
    return mapping, sections | {"diffusion": as_section("diffusion", section, kind)}


def make_adaptive_noise(noise: NoiseConfig, objective: Any, vocab_size: int) -> FixedNoise:
    """What chooses the noise of an objective. UserError if they do not go together."""
    if noise.adaptive_noise == "none":
        return FixedNoise()
    if noise.adaptive_noise == "running_loss":
        check("density" in objective.extra_batch_keys,
              "noise.adaptive_noise='running_loss' chooses the density of tokens, which "
              f"diffusion.kind='{objective.kind}' does not read: use noise.adaptive_noise='none'")
        return RunningLoss(vocab_size, noise.count_decay)
    expected = {"clip": "bernoulli", "counts": "exact_count"}[noise.adaptive_noise]
    corruption = objective.corruption if objective.kind == "masked" else None
    actual = f"not {corruption!r}" if corruption else f"which diffusion.kind='{objective.kind}' does not have"
    check(corruption == expected,
          f"noise.adaptive_noise='{noise.adaptive_noise}' needs diffusion.corruption='{expected}', {actual}: use "
          "noise.adaptive_noise='none'")
    if noise.adaptive_noise == "clip":
        return ClipSearch(objective.block_size, objective.clip_low, objective.clip_high, noise.clip_widths,
                          noise.clip_stride)
    check(not objective.count_probs, "diffusion.count_probs has no effect with noise.adaptive_noise='counts': use ()")
    return CountSchedule(objective.block_size, noise.count_floor, noise.count_decay)


def decisive_hash(nested: Mapping) -> str:
    """`Config.sha256` of a config as `to_dict` gives it, also of one that an earlier version wrote."""
    by_first_name = {migrations.first_name(key): value for key, value in _decisive(nested).items()}
    return hashlib.sha256(json.dumps(by_first_name, sort_keys=True).encode()).hexdigest()


def _decisive(nested: Mapping) -> dict:
    return {key: value for key, value in flatten(nested).items() if not {key, key.split(".")[0]} & set(RESUMABLE)}
