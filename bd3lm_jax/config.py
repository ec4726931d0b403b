"""The resolved configuration of a run: frozen dataclasses, no defaults (defaults live in `configs/`).

`Config.from_dict` turns a nested mapping (an ml_collections ConfigDict, a `config.json`) into dataclasses. A key that
nobody reads, a missing key and a wrong type are errors that name the key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from bd3lm_jax import curriculum, density, ineffective, plugins
from bd3lm_jax.adaptation import annealing, answers, lora, shifted
from bd3lm_jax.data import mixture
from bd3lm_jax.diffusion import OBJECTIVES
from bd3lm_jax.diffusion.clip import ClipSearch, CountSchedule
from bd3lm_jax.diffusion.running import RunningLoss
from bd3lm_jax.errors import lookup
from bd3lm_jax.jax_settings import check_seed
from bd3lm_jax.models import BACKBONES, trunk
from bd3lm_jax.models.trunk import REMAT, takes_level
from bd3lm_jax.paths import expand_fields
from bd3lm_jax.typed import Nested, as_mapping, as_section, as_type, check, flatten, one_of, same_keys

SAME = "init_from"  # as model.kind: the network whose weights start the run


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes rows of `length` tokens."""

    source: str  # "austen" (embedded), "text", "jsonl", "sft" (prompts and answers), "tfds", ...: corpora.SOURCES
    path: str  # file or directory of local sources; "" for embedded ones
    name: str  # TFDS name, e.g. "lm1b"; of "text" how it was tokenised, of "sft" how a dialogue is written; else ""
    field: str  # JSONL or TFDS key that holds the text
    tokenizer: str  # "bytes", "gpt2", "bert-base-uncased", "bpe:2048" (trained on the corpus), or a tokenizer.json
    length: int  # tokens a row
    layout: str  # "wrap", "pack", "pad"
    valid_fraction: float  # held out from the end of a local source that names no valid split
    cache_dir: str  # prepared rows; "" = ~/.cache/bd3lm_jax (or $BD3LM_CACHE)
    workers: int  # threads that read batches ahead of the step
    density: str  # how much each token tells (density.SOURCES), for objectives that need it; "" = none
    density_fraction: float  # part of the documents that are annotated; the density of others is 0
    mixture: tuple[tuple[str, float], ...]  # of source "mixture": sources and their rates (data/mixture.py); else ()

    def __post_init__(self):
        from bd3lm_jax.data.corpora import SOURCES  # which needs DataConfig

        expand_fields(self, "data.", ("cache_dir", "tokenizer", *(("path",) if self.source != "tfds" else ())))
        one_of("data.source", self.source, tuple(SOURCES))
        one_of("data.layout", self.layout, ("wrap", "pack", "pad"))
        check(self.length > 0, f"data.length is {self.length}, expected a positive number of tokens")
        check(0 < self.valid_fraction < 1, f"data.valid_fraction is {self.valid_fraction}, expected between 0 and 1")
        check(self.source not in ("text", "jsonl", "sft") or self.path, f"data.source={self.source!r} needs data.path")
        check(self.source != "tfds" or self.name, "data.source='tfds' needs data.name, e.g. 'lm1b'")
        check(self.workers >= 1, f"data.workers is {self.workers}, expected at least 1")
        density.check(self.density, self.density_fraction)
        mixture.check(self.source, self.mixture, {"path": self.path, "name": self.name, "density": self.density},
                      tuple(SOURCES))


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, clipping and an exponential moving average (BD3-LM's recipe in `configs/common.py`)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # of matrices (with train.lora_rank: of their factors), never norms, biases and embeddings
    clip_norm: float  # 0 = off
    warmup_steps: int  # a tenth of train.steps where these leave no room for them (optim.warmup_steps)
    schedule: str  # "constant", "cosine", "wsd" (warm-up, stable, decay)
    final_lr_fraction: float  # learning rate of the last update of cosine and wsd, as a fraction of lr
    decay_fraction: float  # wsd: the part of the steps spent decaying, at least one step
    ema: float  # 0 = off; warmed up as min(ema, (1 + n) / (10 + n))

    def __post_init__(self):
        one_of("optim.schedule", self.schedule, ("constant", "cosine", "wsd"))
        check(self.lr > 0, f"optim.lr is {self.lr}, expected a positive number")
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optim.{name} is {value}, expected in [0, 1)")
        for name in ("eps", "weight_decay", "clip_norm", "warmup_steps"):
            value = getattr(self, name)
            check(value >= 0, f"optim.{name} is {value}, expected at least 0")
        for name in ("final_lr_fraction", "decay_fraction"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"optim.{name} is {value}, expected in [0, 1]")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    batch: int  # rows a step, over all devices
    views: int  # noised views of each row; they share one pass of the clean stream
    init_from: str  # run or published checkpoint whose (EMA) weights start this run (docs/adapt.md); "" = random
    # Curriculum: from step s on blocks of n tokens, ((s, n), ...), e.g. ((0, 1), (1000, 4)); () = diffusion.block_size
    block_sizes: tuple[tuple[int, int], ...]
    anneal_steps: int  # steps over which causal attention opens to what the objective wants (annealing.py); 0 = at once
    lora_rank: int  # rank of the updates of frozen matrices (lora.py); 0 = all weights are trained
    lora_alpha: float  # an update counts lora_alpha / lora_rank

    def __post_init__(self):
        expand_fields(self, "train.", ("init_from",))
        curriculum.check_pairs(self.block_sizes)
        check(self.steps >= 1, f"train.steps is {self.steps}, expected at least 1")
        check(self.batch >= 1, f"train.batch is {self.batch}, expected at least 1")
        check(self.views >= 1, f"train.views is {self.views}, expected at least 1")
        check(self.anneal_steps >= 0, f"train.anneal_steps is {self.anneal_steps}, expected at least 0")
        check(self.lora_rank >= 0, f"train.lora_rank is {self.lora_rank}, expected at least 0")
        check(self.lora_alpha > 0, f"train.lora_alpha is {self.lora_alpha}, expected a positive number")


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Training noise that is chosen from the data (diffusion/clip.py), in place of what `diffusion` says."""

    adapt: str  # "none", "clip" (search for the best interval, every eval.every steps), "counts" (law of the count),
    # "running_loss" (the density of every token id)
    clip_widths: tuple[float, ...]  # of the intervals, inside diffusion.clip_low .. diffusion.clip_high
    clip_stride: float  # between the intervals of a width
    clip_batches: int  # batches a search
    count_floor: float  # part of its uniform probability that every count keeps
    count_decay: float  # of the running averages by count or by token id, a step

    def __post_init__(self):
        one_of("noise.adapt", self.adapt, ("none", "clip", "counts", "running_loss"))
        widths = self.clip_widths
        check(bool(widths) and all(0 < width <= 1 for width in widths),
              f"noise.clip_widths is {widths}, expected numbers above 0 and up to 1")
        check(0.001 <= self.clip_stride <= 1, f"noise.clip_stride is {self.clip_stride}, expected 0.001 to 1")
        check(self.clip_batches >= 1, f"noise.clip_batches is {self.clip_batches}, expected at least 1")
        check(0 < self.count_floor <= 1, f"noise.count_floor is {self.count_floor}, expected above 0 and up to 1")
        check(0 <= self.count_decay < 1, f"noise.count_decay is {self.count_decay}, expected in [0, 1)")

    def schedule(self, objective: Any, vocab_size: int) -> ClipSearch | CountSchedule | RunningLoss | None:
        """What chooses the noise of an objective; None if its noise is fixed. UserError if they do not go together."""
        if self.adapt == "none":
            return None
        if self.adapt == "running_loss":
            check("density" in objective.needs, "noise.adapt='running_loss' chooses the density of tokens, which "
                  f"diffusion.kind='{objective.kind}' does not read: use noise.adapt='none'")
            return RunningLoss(vocab_size, self.count_decay)
        wanted = {"clip": "bernoulli", "counts": "exact_count"}[self.adapt]
        given = getattr(objective, "corruption", None) if objective.kind == "masked" else None
        instead = f"not {given!r}" if given else f"which diffusion.kind='{objective.kind}' does not have"
        check(given == wanted, f"noise.adapt='{self.adapt}' needs diffusion.corruption='{wanted}', {instead}: use "
              "noise.adapt='none'")
        if self.adapt == "clip":
            return ClipSearch(objective.block_size, objective.clip_low, objective.clip_high, self.clip_widths,
                              self.clip_stride)
        check(not objective.count_probs, "diffusion.count_probs has no effect with noise.adapt='counts': use ()")
        return CountSchedule(objective.block_size, self.count_floor, self.count_decay)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the same numbers are computed; only dtype changes them beyond rounding."""

    dtype: str  # "auto" (bfloat16 on accelerators, float32 on CPU), "float32", "bfloat16"
    attention: str  # backend name, "auto"
    layers: str  # "scan", "unroll"
    remat: str  # what is computed again to save memory: "none", "dots", "attention", "full" (trunk.REMAT)
    microbatch: int  # rows a forward pass, over all devices; 0 = the whole batch
    loss_chunk: int  # positions that go through the output layer at a time, a device; 0 = automatic

    def __post_init__(self):
        one_of("compute.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        one_of("compute.layers", self.layers, ("scan", "unroll"))
        one_of("compute.remat", self.remat, tuple(REMAT))
        for name in ("microbatch", "loss_chunk"):
            value = getattr(self, name)
            check(value >= 0, f"compute.{name} is {value}, expected at least 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices an axis of one slice; one may be -1 (what is left)."""

    data: int
    fsdp: int
    tensor: int
    expert: int = 1  # most networks have no experts
    slices: int = 1  # that the run spans, each with such axes; -1: as many as there are

    def __post_init__(self):
        *sizes, slices = dataclasses.astuple(self)
        check(all(n == -1 or n >= 1 for n in (*sizes, slices)) and sizes.count(-1) <= 1,
              f"mesh is {dataclasses.asdict(self)}, expected positive sizes with at most one -1 (slices may be -1 too)")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int  # steps between logged lines

    def __post_init__(self):
        check(self.every >= 1, f"log.every is {self.every}, expected at least 1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int  # steps between saves; the last step is always saved
    keep: int  # latest checkpoints kept
    keep_best: int  # checkpoints kept beside them: those of the lowest bound, of the steps that were validated

    def __post_init__(self):
        check(self.every >= 1, f"checkpoint.every is {self.every}, expected at least 1")
        check(self.keep_best >= 0, f"checkpoint.keep_best is {self.keep_best}, expected at least 0")
        check(self.keep >= 1, f"checkpoint.keep is {self.keep}, expected at least 1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int  # steps between validations; the last step is always validated
    rows: int  # rows of the validation split used while training; 0 = all
    batch: int  # rows a forward pass, over all devices
    draws: int
    report_rows: int  # rows of each split in the closing report; 0 = all
    samples: int  # texts in the closing report
    sample_length: int  # tokens of each; never more than data.length

    def __post_init__(self):
        for name in ("every", "batch", "draws"):
            value = getattr(self, name)
            check(value >= 1, f"eval.{name} is {value}, expected at least 1")
        for name in ("rows", "report_rows", "samples", "sample_length"):
            value = getattr(self, name)
            check(value >= 0, f"eval.{name} is {value}, expected at least 0")


SECTIONS = {
    "data": DataConfig, "optim": OptimConfig, "train": TrainConfig, "compute": ComputeConfig, "mesh": MeshConfig,
    "log": LogConfig, "checkpoint": CheckpointConfig, "eval": EvalConfig, "noise": NoiseConfig,
}
# Sections and keys that may differ when a run goes on. More steps change a decaying learning rate from there on.
RESUMABLE = ("mesh", "log", "checkpoint", "eval", "train.steps", "data.cache_dir", "data.workers", "compute.attention",
             "compute.layers", "compute.remat", "compute.microbatch", "compute.loss_chunk")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. `model` and `diffusion` are the dataclasses of the registered backbone and objective.

    A published checkpoint knows only `model` and `diffusion`: its other sections are None.
    """

    seed: int
    model: Any
    diffusion: Any
    data: DataConfig | None
    optim: OptimConfig | None
    train: TrainConfig | None
    compute: ComputeConfig | None
    mesh: MeshConfig | None
    log: LogConfig | None
    checkpoint: CheckpointConfig | None
    eval: EvalConfig | None
    noise: NoiseConfig | None = None

    def __post_init__(self):
        check(not self.diffusion.needs_level or takes_level(self.model),
              f"model.time_conditioning is False: diffusion.kind='{self.diffusion.kind}' needs the noise level "
              "(sigma), use True")
        letters = getattr(self.diffusion, "vocab_size", -1)
        check(letters in (-1, self.model.vocab_size), f"diffusion.vocab_size={letters} is not "
              f"model.vocab_size={self.model.vocab_size}: use -1 for the model's")

    @property
    def block_size(self) -> int:
        return self.diffusion.block_size

    def with_vocab(self, size: int) -> "Config":
        """The same run over `size` ids; -1: those of its tokenizer, once it is known."""
        changed = {name: dataclasses.replace(section, vocab_size=size)
                   for name, section in (("model", self.model), ("diffusion", self.diffusion))
                   if hasattr(section, "vocab_size")}
        return dataclasses.replace(self, **changed)

    def block_size_at(self, step: int) -> int:
        """Of the update that follows `step` updates: by the curriculum, if there is one."""
        return curriculum.size_at(self.train.block_sizes, step) or self.block_size

    def phase_at(self, step: int) -> tuple[int, bool]:
        """Block size of the update that follows `step` updates, and whether its attention is still being opened."""
        return self.block_size_at(step), step < self.train.anneal_steps

    def in_phase(self, size: int, opening: bool) -> "Config":
        """The config of updates in such a phase."""
        config = self if size == self.block_size else self.at_block_size(size)
        return config if opening else dataclasses.replace(config, train=dataclasses.replace(config.train,
                                                                                            anneal_steps=0))

    @property
    def trained_sizes(self) -> tuple[int, ...]:
        """Block sizes at which the model can be used."""
        return getattr(self.diffusion, "sizes", (self.block_size,))

    def at_block_size(self, size: int) -> "Config":
        """The same with blocks of another size; a mixed objective becomes the masked one of that size."""
        objective = self.diffusion
        at = objective.at(size) if objective.kind == "mixed" else dataclasses.replace(objective, block_size=size)
        return dataclasses.replace(self, diffusion=at)

    def at_trained_size(self, size: int) -> "Config":
        """As `at_block_size`. UserError unless the model was trained with that block size."""
        known = self.trained_sizes
        check(size in known, f"block_size is {size}, expected {'one of ' if len(known) > 1 else ''}"
              f"{', '.join(map(str, known))}, what the model was trained with")
        return self if self.trained_sizes == (size,) else self.at_block_size(size)

    @property
    def schedule(self) -> ClipSearch | CountSchedule | RunningLoss | None:
        """What chooses the training noise from the data; None if it is fixed."""
        return self.noise and self.noise.schedule(self.diffusion, self.model.vocab_size)

    @property
    def execution(self) -> trunk.Execution:
        """How the passes of a run are computed."""
        compute = self.compute
        return trunk.Execution(compute.attention, compute.layers, compute.remat,
                               one_document=self.data.layout != "pack")

    @property
    def batch_needs(self) -> tuple[str, ...]:
        """Names of the arrays that a batch brings beside tokens, segments and positions."""
        learnt = ("density",) if self.noise and self.noise.adapt == "running_loss" else ()
        brought = ("prompt",) if self.data and self.data.source == "sft" else ()
        return tuple(name for name in dict.fromkeys((*self.diffusion.needs, *brought)) if name not in learnt)

    @classmethod
    def from_dict(cls, mapping: "Nested | Config", stored: bool = False) -> "Config":
        """Validate a nested mapping; a Config stays what it is. UserError for an unknown, missing or ill-typed key, and
        unless it is that of a run which was `stored` for one that is set and has no effect."""
        if isinstance(mapping, cls):
            return mapping
        plugins.load_installed()
        mapping = dict(as_mapping("", mapping).items())
        same_keys("", mapping, [field.name for field in dataclasses.fields(cls)])
        sections = {name: as_section(name, mapping[name], kind) for name, kind in SECTIONS.items()}
        for name, registry, what in (("diffusion", OBJECTIVES, "objective"), ("model", BACKBONES, "backbone")):
            section = dict(as_mapping(name, mapping[name]))
            if section.get("kind") == SAME and what == "backbone":
                from bd3lm_jax.adaptation import adapt  # which needs Config

                section = adapt.network_of(section, sections["train"].init_from, sections["diffusion"],
                                           sections["data"].length)
            kind = lookup(registry, section.pop("kind", ""), f"{what} {name}.kind")
            sections[name] = as_section(name, section, kind.Config if what == "backbone" else kind)
        seed = check_seed(as_type("seed", mapping["seed"], int))
        config = cls(seed=seed, **sections)
        length, block_size = config.data.length, config.block_size
        check(length % block_size == 0,
              f"diffusion.block_size={block_size} does not divide data.length={length}: choose a length that is a "
              f"multiple, e.g. {-(-length // block_size) * block_size}")
        positions = getattr(config.model, "positions", length)
        check(length <= positions, f"data.length={length} is more than model.positions={positions}, which the network "
              "has learned positions for: raise one or shorten the other")
        check(not trunk.encoder_layers(config.model) or not config.diffusion.causal and block_size < length,
              "model.decoder_layers splits the network by clean and noised blocks, and this objective has no clean "
              f"blocks before noised ones: use 0, or blocks shorter than data.length={length}")
        views = config.train.views
        check(views == 1 or not config.diffusion.causal,
              f"train.views={views}: an autoregressive model has nothing noised, use 1")
        group = config.diffusion.view_group
        check(views % group == 0, f"train.views={views} is no multiple of {group}: diffusion.kind="
              f"'{config.diffusion.kind}' draws so many views together here, use {-(-views // group) * group}")
        config.noise.schedule(config.diffusion, config.model.vocab_size)  # raises if they do not go together
        curriculum.check(config)
        annealing.check(config)
        shifted.check(config)
        lora.check(config)
        density.check_config(config)
        answers.check(config)
        rows, batch = config.compute.microbatch, config.train.batch
        check(rows == 0 or batch % rows == 0, f"compute.microbatch={rows} does not divide train.batch={batch}")
        if not stored:
            ineffective.check(config)
        return config

    def to_dict(self) -> dict:
        """Nested plain dict, with `kind` for the model and the objective; `from_dict` inverts it."""
        result = dataclasses.asdict(self)
        result["model"] = {"kind": self.model.kind, **result["model"]}
        result["diffusion"] = {"kind": self.diffusion.kind, **result["diffusion"]}
        return result

    def sha256(self) -> str:
        """Hash of everything that decides what is learned (see RESUMABLE for what is left out)."""
        return decisive_hash(self.to_dict())

    def differing_keys(self, other: "Config") -> list[str]:
        """`key: here != there` for every decisive key whose value differs and has an effect in one of them."""
        here, there = _decisive(self.to_dict()), _decisive(other.to_dict())
        without_effect = ineffective.keys(self) & ineffective.keys(other)
        return [f"{key}: {here.get(key)!r} != {there.get(key)!r}"
                for key in sorted((here.keys() | there.keys()) - without_effect) if here.get(key) != there.get(key)]


def decisive_hash(nested: Mapping) -> str:
    """`Config.sha256` of a config as `to_dict` gives it, also of one that an earlier version wrote."""
    return hashlib.sha256(json.dumps(_decisive(nested), sort_keys=True).encode()).hexdigest()


def _decisive(nested: Mapping) -> dict:
    return {key: value for key, value in flatten(nested).items() if not {key, key.split(".")[0]} & set(RESUMABLE)}
