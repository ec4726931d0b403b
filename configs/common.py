"""What every config starts from: all keys with the recipe of BD3-LM (arXiv 2503.09573) as their values.

A config takes one string of comma-separated words after the colon, `--config=configs/lm1b.py:medium,block_size=8`;
`parse` reads it. What the keys mean is said in bd3lm_jax/config.py.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from bd3lm_jax import models
from bd3lm_jax.core.renamed_keys import RENAMED
from bd3lm_jax.models.shared import SIZES


class Operation(NamedTuple):
    """What a FieldReference does when it is read."""

    fn: Callable
    args: tuple[Any, ...]


BLOCK_SIZE = "block_size"  # stands for the block size of the run
MASKED = {  # masked diffusion in blocks with the exact-count estimator of its bound
    "block_size": BLOCK_SIZE, "schedule": "loglinear", "corruption": "exact_count", "count_probs": (),
    "complement": False, "clip_low": 0.0, "clip_high": 1.0, "eps": 1e-3,
}
OBJECTIVES = {  # beside masked diffusion: algo=NAME -> its `diffusion` section, and what changes elsewhere
    "ar": ({"kind": "ar", "bos": True}, {"model.adaln": False}),
    "sedd": ({"kind": "sedd", "block_size": BLOCK_SIZE, "corruption": "bernoulli", "eps": 1e-3},
             {"model.time_conditioning": True}),
    "sedd_uniform": ({"kind": "sedd_uniform", "block_size": BLOCK_SIZE, "vocab_size": -1, "eps": 1e-3},
                     {"model.time_conditioning": True}),
    "d3pm": ({"kind": "d3pm", "block_size": BLOCK_SIZE, "steps": 1000, "hybrid": 0.01}, {}),
    "md4": ({"kind": "md4", "block_size": BLOCK_SIZE, "schedule": "cosine", "clip": 1e-4}, {}),
    "genmd4": ({"kind": "genmd4", "block_size": BLOCK_SIZE, "power": 1.0, "eps": 1e-4}, {"train.noise_samples": 2}),
    "uniform": ({"kind": "uniform", "block_size": BLOCK_SIZE, "vocab_size": -1, "eps": 1e-3},
                {"model.time_conditioning": True}),
    "diffusionbert": ({"kind": "diffusionbert", "block_size": BLOCK_SIZE, "strength": 0.3},
                      {"data.density": "frequency"}),
    "llada": ({"kind": "llada", "block_size": BLOCK_SIZE, "complement": False, "random_length": 0.01, "sft": False,
               "normalise": "tokens"}, {}),
    "roberta_diffusion": ({"kind": "roberta_diffusion", "block_size": BLOCK_SIZE,
                           "rates": (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1), "protected": 16,
                           "special_ids": ()}, {}),
    "levels": ({"kind": "levels", "block_size": BLOCK_SIZE, "ramp": 0.5}, {}),
    "mixed": ({"kind": "mixed", "block_size": 16, "sizes": (1, 2, 4, 8, 16), "schedule": "loglinear",
               "corruption": "exact_count", "complement": False, "eps": 1e-3}, {}),
    "adversarial": ({"kind": "adversarial", "block_size": BLOCK_SIZE, "rate": 0.5, "complement": False,
                     "importance": False, "hidden_size": 32, "score_limit": 3.0}, {"train.noise_samples": 2}),
    "ssd_lm": ({"kind": "ssd_lm", "block_size": BLOCK_SIZE, "scale": 5.0}, {"model.time_conditioning": True}),
    "cap": ({"kind": "cap", **MASKED, "coefficient": 1.0}, {}),
    "priority": ({"kind": "priority", "block_size": BLOCK_SIZE, "form": "exact_count", "weight": 2.0, "hard": False,
                  "complement": False, "importance": False, "rate_low": 1e-3, "rate_high": 1.0},
                 {"data.density": "unigram:0.5"}),
}
# argument of adaptations -> model.target_shift
SHIFTED = {"source": "source", "block": "block", "row": "row", "none": ""}
CLIPS = {4: (0.45, 0.95), 16: (0.3, 0.8)}  # the paper's mask probabilities by block size; other sizes: unclipped


def base() -> ConfigDict:
    """Every key of every section: BD3-LM's recipe at its small size, on the embedded corpus."""
    return _sections({
        "seed": 0,
        "model": models.default_section("dit"),
        "diffusion": {
            "kind": "masked", "block_size": 4, "schedule": "loglinear", "corruption": "bernoulli", "count_probs": (),
            "complement": False, "clip_low": 0.0, "clip_high": 1.0, "eps": 1e-3,
        },
        "data": {
            "source": "austen", "path": "", "name": "", "field": "text", "tokenizer": "bpe:2048", "seq_len": 256,
            "packing": "wrap", "valid_fraction": 0.01, "cache_dir": "", "workers": 2, "density": "",
            "density_fraction": 1.0, "mixture": (),
        },
        "optim": {
            "lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0,
            "warmup_steps": 2500, "schedule": "constant", "final_lr_fraction": 0.0, "decay_fraction": 0.2,
            "ema_decay": 0.9999,
        },
        "train": {
            "steps": 1_000_000, "batch_size": 512, "noise_samples": 1, "init_from": "", "block_sizes": (),
            "anneal_steps": 0,
            "lora_rank": 0, "lora_alpha": 16.0,
        },
        "compute": {
            "dtype": "auto", "attention": "auto", "layers": "scan", "remat": "none", "microbatch": 0, "loss_chunk": 0,
        },
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "expert": 1, "slices": 1},
        "log": {"every": 100},
        "checkpoint": {"every": 10_000, "keep": 2, "keep_best": 1},
        "eval": {"every": 10_000, "rows": 4096, "batch_size": 32, "mc_samples": 1, "report_rows": 0, "num_samples": 4,
                 "sample_length": 256},
        "noise": {
            "adaptive_noise": "none", "clip_widths": (0.5, 0.6, 0.7, 0.8, 0.9), "clip_stride": 0.05, "clip_batches": 1,
            "count_floor": 0.1, "count_decay": 0.99,
        },
    })


class _Fields(dict):
    """The values of a section, by their first names as well (bd3lm_jax/core/renamed_keys.py)."""

    def __init__(self, values: dict, names: dict[str, str]):
        super().__init__(values)
        self._names = names

    def _current(self, key):
        current = self._names.get(key, key)
        return current if super().__contains__(current) else key

    def __getitem__(self, key):
        return super().__getitem__(self._current(key))

    def __setitem__(self, key, value):
        super().__setitem__(self._current(key), value)

    def __delitem__(self, key):
        super().__delitem__(self._current(key))

    def __contains__(self, key):
        return super().__contains__(self._current(key))


def section(name: str, values: dict) -> ConfigDict:
    """A section of a config, whose keys config files may also set and read by the names of earlier versions."""
    result = ConfigDict(values)
    object.__setattr__(result, "_fields", _Fields(dict(result.items(preserve_field_references=True)),
                                                  RENAMED.get(name, {})))
    return result


def parse(arg: str, **defaults: str | int) -> SimpleNamespace:
    """`"medium,block_size=8"` -> the defaults with these changes. A bare word names a size.

    Raises ValueError, listing what is known, for a word that is not among the defaults or has a wrong value.
    """
    given = {}
    for word in filter(None, arg.split(",")):
        key, equals, value = word.partition("=")
        if not equals and "size" in defaults and word in SIZES:
            key, value = "size", word
        if key not in defaults or not value:
            raise ValueError(f"unknown config argument '{word}': {_known(defaults)}")
        given[key] = _whole(key, value) if isinstance(defaults[key], int) else value
    options = SimpleNamespace(**defaults | given)
    for key, allowed in (("algo", algorithms()), ("size", SIZES)):
        if getattr(options, key, None) not in (None, *allowed):
            raise ValueError(f"config argument {key}={given[key]}: expected one of {', '.join(allowed)}")
    if "block_size" in given and not _in_blocks(options.algo):
        raise ValueError(f"config argument block_size={given['block_size']} has no effect with algo={options.algo}: "
                         "leave it out")
    if "block_size" in defaults and "block_size" not in given and options.algo != "bd3lm":
        options.block_size = 0  # one block a row
    return options


def algorithms() -> tuple[str, ...]:
    """What `algo` may be; a plug-in adds to OBJECTIVES."""
    return "bd3lm", "mdlm", *OBJECTIVES


def set_algo(config: ConfigDict, algo: str, block_size: int) -> None:
    """Masked diffusion with `block_size` (0: one block a row, MDLM), or another objective."""
    size = block_size or config.data.get_oneway_ref("seq_len")
    if algo not in OBJECTIVES:
        config.diffusion.block_size = size
        return
    diffusion, changes = OBJECTIVES[algo]
    config.diffusion = section("diffusion", {key: size if value == BLOCK_SIZE else value
                                              for key, value in diffusion.items()})
    for key, value in changes.items():
        changed, _, name = key.partition(".")
        if name in config[changed]:  # other backbones have no such input
            config[changed][name] = value


def _sections(config: dict) -> ConfigDict:
    return ConfigDict({name: section(name, values) if isinstance(values, dict) else values
                       for name, values in config.items()})


def computed(function: Callable, *references: FieldReference) -> FieldReference:
    """`function` of the values that other keys have in the end, the command line's changes among them, until this key
    is set itself."""
    kind = type(function(*(reference.get() for reference in references)))
    return FieldReference(kind(), field_type=kind, op=Operation(lambda _, *values: function(*values), references))


def grow_blocks(config: ConfigDict) -> None:
    """From a causal model: attention opens and blocks grow from one token to their size within a third of the steps."""
    steps = config.train.get_ref("steps")
    config.train.block_sizes = computed(_growing, config.diffusion.get_ref("block_size"), steps)
    config.train.anneal_steps = computed(lambda steps: steps // 3, steps)


def _growing(size: int, steps: int) -> tuple:
    third, sizes = steps // 3, [2**n for n in range(size.bit_length()) if size % 2**n == 0 and 2**n < size]
    starts = [index * third // max(len(sizes), 1) for index in range(len(sizes))]
    return tuple({**dict(zip(starts, sizes)), third if sizes else 0: size}.items())  # few steps: the last of a start


def whole_rows_first(config: ConfigDict) -> None:
    """From a model of whole rows: these for a third of the steps, then blocks."""
    references = (config.diffusion.get_ref("block_size"), config.data.get_ref("seq_len"), config.train.get_ref("steps"))
    config.train.block_sizes = computed(lambda size, length, steps: tuple({0: length, steps // 3: size}.items())
                                        if size < length else (), *references)


def set_paper_recipe(config: ConfigDict, algo: str, block_size: int) -> None:
    """`set_algo`; for block diffusion the last 150K of the 1M steps, with the paper's clipped noise."""
    set_algo(config, algo, block_size)
    if algo == "bd3lm":
        config.train.steps = 150_000
        config.diffusion.clip_low, config.diffusion.clip_high = CLIPS.get(block_size, (0.0, 1.0))


def set_model(config: ConfigDict, name: str) -> None:
    """Another backbone, one of `models.BACKBONES`, with as many learned positions as a row has tokens."""
    config.model = section("model", models.default_section(name))
    if "positions" in config.model:
        config.model.positions = config.data.get_oneway_ref("seq_len")


def set_size(config: ConfigDict, size: str) -> None:
    config.model.update(models.BACKBONES[config.model.kind].sizes[size])


def _in_blocks(algo: str) -> bool:
    return algo == "bd3lm" or algo in OBJECTIVES and BLOCK_SIZE in OBJECTIVES[algo][0].values()


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"config argument {key}={value}: expected a positive whole number")
    return int(value)


def _known(defaults: dict) -> str:
    allowed = {"algo": "|".join(algorithms()), "size": "|".join(SIZES)}
    words = [f"{key}={allowed.get(key, 'N')}" for key in defaults]
    return f"known are {', '.join(words)}" + (" (or the size by itself)" if "size" in defaults else "")
