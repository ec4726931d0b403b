"""The sections of a configuration that no registry decides: frozen dataclasses with the defaults of all keys, BD3-LM's
recipe (arXiv 2503.09573) on the embedded corpus, and the checks of their values.

`config.py` puts them together with a network and an objective, and checks what registries know of them.
"""

import dataclasses

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.paths import expand_fields
from bd3lm_jax.core.typed import check, one_of


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes rows of `seq_len` tokens."""

    # "austen" (embedded), "text", "jsonl", "sft" (prompts and answers), "tfds", ...: corpora.SOURCES
    source: str = "austen"
    path: str = ""  # file or directory, here or of another file system (gs://); "" for embedded ones
    # TFDS name, e.g. "lm1b"; of "text" how it was tokenised, of "sft" how a dialogue is written; else ""
    name: str = ""
    field: str = "text"  # JSONL or TFDS key that holds the text
    # "bytes", "gpt2", "bert-base-uncased", "bpe:2048" (trained on the corpus), or a tokenizer.json
    tokenizer: str = "bpe:2048"
    seq_len: int = 256  # tokens a row
    packing: str = "wrap"  # "wrap", "pack", "pad"
    valid_fraction: float = 0.01  # held out from the end of a local source that names no valid split
    cache_dir: str = ""  # prepared rows; "" = ~/.cache/bd3lm_jax (or $BD3LM_CACHE)
    workers: int = 2  # threads that read batches ahead of the step
    density: str = ""  # how much each token tells (density.SOURCES), for objectives that need it; "" = none
    density_fraction: float = 1.0  # part of the documents that are annotated; the density of others is 0
    # of source "mixture": sources and their rates (data/mixture.py); else ()
    mixture: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        expand_fields(self, "data.", ("cache_dir", "tokenizer"))
        if self.source != "tfds":
            expand_fields(self, "data.", ("path",), may_be_remote=True)
        one_of("data.packing", self.packing, ("wrap", "pack", "pad"))
        check(self.seq_len > 0, f"data.seq_len is {self.seq_len}, expected a positive number of tokens")
        check(0 < self.valid_fraction < 1, f"data.valid_fraction is {self.valid_fraction}, expected between 0 and 1")
        check(self.source not in ("text", "jsonl", "sft") or self.path, f"data.source={self.source!r} needs data.path")
        check(self.source != "tfds" or self.name, "data.source='tfds' needs data.name, e.g. 'lm1b'")
        check(self.workers >= 1, f"data.workers is {self.workers}, expected at least 1")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, clipping and an exponential moving average."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    # of matrices (with train.lora_rank: of their factors), never norms, biases and embeddings
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # 0 = off
    warmup_steps: int = 2500  # a tenth of train.steps where these leave no room for them (optim.warmup_steps)
    schedule: str = "constant"  # "constant", "cosine", "wsd" (warm-up, stable, decay)
    final_lr_fraction: float = 0.0  # learning rate of the last update of cosine and wsd, as a fraction of lr
    decay_fraction: float = 0.2  # wsd: the part of the steps spent decaying, at least one step
    ema_decay: float = 0.9999  # 0 = off; warmed up as min(ema_decay, (1 + n) / (10 + n))

    def __post_init__(self):
        one_of("optim.schedule", self.schedule, ("constant", "cosine", "wsd"))
        check(self.lr > 0, f"optim.lr is {self.lr}, expected a positive number")
        for name in ("beta1", "beta2", "ema_decay"):
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
    steps: int = 1_000_000
    batch_size: int = 512  # rows a step, over all devices
    noise_samples: int = 1  # noised copies of each row; they share one pass of the clean stream
    init_from: str = ""  # run or published checkpoint whose (EMA) weights start this run (docs/adapt.md); "" = random
    # Curriculum: from step s on blocks of n tokens, ((s, n), ...), e.g. ((0, 1), (1000, 4)); () = diffusion.block_size
    block_sizes: tuple[tuple[int, int], ...] = ()
    # steps over which causal attention opens to what the objective wants (annealing.py); 0 = at once
    anneal_steps: int = 0
    lora_rank: int = 0  # rank of the updates of frozen matrices (lora.py); 0 = all weights are trained
    lora_alpha: float = 16.0  # an update counts lora_alpha / lora_rank

    def __post_init__(self):
        expand_fields(self, "train.", ("init_from",))
        check_pairs(self.block_sizes)
        check(self.steps >= 1, f"train.steps is {self.steps}, expected at least 1")
        check(self.batch_size >= 1, f"train.batch_size is {self.batch_size}, expected at least 1")
        check(self.noise_samples >= 1, f"train.noise_samples is {self.noise_samples}, expected at least 1")
        check(self.anneal_steps >= 0, f"train.anneal_steps is {self.anneal_steps}, expected at least 0")
        check(self.lora_rank >= 0, f"train.lora_rank is {self.lora_rank}, expected at least 0")
        check(self.lora_alpha > 0, f"train.lora_alpha is {self.lora_alpha}, expected a positive number")


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """Training noise that is chosen from the data (diffusion/clip.py), in place of what `diffusion` says."""

    # "none", "clip" (search for the best interval, every eval.every steps), "counts" (law of the count),
    # "running_loss" (the density of every token id)
    adaptive_noise: str = "none"
    # of the intervals, inside diffusion.clip_low .. diffusion.clip_high
    clip_widths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    clip_stride: float = 0.05  # between the intervals of a width
    clip_batches: int = 1  # batches a search
    count_floor: float = 0.1  # part of its uniform probability that every count keeps
    count_decay: float = 0.99  # of the running averages by count or by token id, a step

    def __post_init__(self):
        one_of("noise.adaptive_noise", self.adaptive_noise, ("none", "clip", "counts", "running_loss"))
        widths = self.clip_widths
        check(bool(widths) and all(0 < width <= 1 for width in widths),
              f"noise.clip_widths is {widths}, expected numbers above 0 and up to 1")
        check(0.001 <= self.clip_stride <= 1, f"noise.clip_stride is {self.clip_stride}, expected 0.001 to 1")
        check(self.clip_batches >= 1, f"noise.clip_batches is {self.clip_batches}, expected at least 1")
        check(0 < self.count_floor <= 1, f"noise.count_floor is {self.count_floor}, expected above 0 and up to 1")
        check(0 <= self.count_decay < 1, f"noise.count_decay is {self.count_decay}, expected in [0, 1)")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the same numbers are computed; only dtype changes them beyond rounding."""

    dtype: str = "auto"  # "auto" (bfloat16 on accelerators, float32 on CPU), "float32", "bfloat16"
    attention: str = "auto"  # backend name, "auto"
    layers: str = "scan"  # "scan", "unroll"
    # what is computed again to save memory: "none", "dots", "attention", "full" (models.layers.REMAT)
    remat: str = "none"
    microbatch: int = 0  # rows a forward pass, over all devices; 0 = the whole batch
    loss_chunk: int = 0  # positions that go through the output layer at a time, a device; 0 = automatic

    def __post_init__(self):
        one_of("compute.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        one_of("compute.layers", self.layers, ("scan", "unroll"))
        for name in ("microbatch", "loss_chunk"):
            value = getattr(self, name)
            check(value >= 0, f"compute.{name} is {value}, expected at least 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices an axis of one slice; one may be -1 (what is left)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1  # most networks have no experts
    slices: int = 1  # that the run spans, each with such axes; -1: as many as there are

    def __post_init__(self):
        *sizes, slices = dataclasses.astuple(self)
        check(all(n == -1 or n >= 1 for n in (*sizes, slices)) and sizes.count(-1) <= 1,
              f"mesh is {dataclasses.asdict(self)}, expected positive sizes with at most one -1 (slices may be -1 too)")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 100  # steps between logged lines
    trackers: tuple[str, ...] = ()  # where metrics go beside metrics.jsonl: names of training.trackers.TRACKERS

    def __post_init__(self):
        check(self.every >= 1, f"log.every is {self.every}, expected at least 1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 10_000  # steps between saves; the last step is always saved
    keep: int = 2  # latest checkpoints kept
    keep_best: int = 1  # checkpoints kept beside them: those of the lowest bound, of the steps that were validated

    def __post_init__(self):
        check(self.every >= 1, f"checkpoint.every is {self.every}, expected at least 1")
        check(self.keep_best >= 0, f"checkpoint.keep_best is {self.keep_best}, expected at least 0")
        check(self.keep >= 1, f"checkpoint.keep is {self.keep}, expected at least 1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = 10_000  # steps between validations; the last step is always validated
    rows: int = 4096  # rows of the validation split used while training; 0 = all
    batch_size: int = 32  # rows a forward pass, over all devices
    mc_samples: int = 1
    report_rows: int = 0  # rows of each split in the closing report; 0 = all
    num_samples: int = 4  # texts in the closing report
    sample_length: int = 256  # tokens of each; never more than data.seq_len

    def __post_init__(self):
        for name in ("every", "batch_size", "mc_samples"):
            value = getattr(self, name)
            check(value >= 1, f"eval.{name} is {value}, expected at least 1")
        for name in ("rows", "report_rows", "num_samples", "sample_length"):
            value = getattr(self, name)
            check(value >= 0, f"eval.{name} is {value}, expected at least 0")


SECTIONS = {
    "data": DataConfig, "optim": OptimConfig, "train": TrainConfig, "compute": ComputeConfig, "mesh": MeshConfig,
    "log": LogConfig, "checkpoint": CheckpointConfig, "eval": EvalConfig, "noise": NoiseConfig,
}


def check_pairs(pairs: tuple[tuple[int, int], ...]) -> None:
    """UserError unless they are (first step, block size), from step 0 on with rising steps."""
    starts = [pair[0] for pair in pairs if len(pair) == 2 and pair[1] >= 1]
    rising = all(a < b for a, b in zip(starts, starts[1:]))
    if pairs and not (len(starts) == len(pairs) and starts[0] == 0 and rising):
        raise UserError(f"train.block_sizes is {pairs}, expected pairs (first step, block size) that begin at step 0, "
                        "the steps rising, e.g. ((0, 1), (1000, 4))")
