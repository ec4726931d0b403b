"""What presets share: the arguments that they take, and what differs by algorithm, network and size.

A config takes one string of comma-separated words after the colon, `--config=configs/lm1b.py:medium,block_size=8`;
`parse` reads it. The keys, their meaning and their defaults, the recipe of BD3-LM (arXiv 2503.09573), are in
bd3lm_jax/core/schema.py, those of `model` and `diffusion` in the files of the networks and objectives.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from bd3lm_jax import diffusion, models
from bd3lm_jax.config import default_dict
from bd3lm_jax.core.migrations import RENAMED
from bd3lm_jax.models.shared import SIZES


class Operation(NamedTuple):
    """What a FieldReference does when it is read."""

    fn: Callable
    args: tuple[Any, ...]


BLOCK_SIZE = "block_size"  # stands for the block size of the run
OBJECTIVES = {  # algo=NAME: what differs from the defaults of diffusion.kind=NAME, and what changes in other sections
    "ar": ({}, {"model.adaln": False}),
    "sedd": ({}, {"model.time_conditioning": True}),
    "sedd_uniform": ({}, {"model.time_conditioning": True}),
    "genmd4": ({}, {"train.noise_samples": 2}),
    "uniform": ({}, {"model.time_conditioning": True}),
    "diffusionbert": ({}, {"data.density": "frequency"}),
    "mixed": ({"block_size": diffusion.Mixed.block_size}, {}),
    "adversarial": ({}, {"train.noise_samples": 2}),
    "ssd_lm": ({}, {"model.time_conditioning": True}),
    "priority": ({}, {"data.density": "unigram:0.5"}),
}
# argument of adaptations -> model.target_shift
SHIFTED = {"source": "source", "block": "block", "row": "row", "none": ""}
CLIPS = {4: (0.45, 0.95), 16: (0.3, 0.8)}  # the paper's mask probabilities by block size; other sizes: unclipped


def base() -> ConfigDict:
    """Every key of every section at its default."""
    return ConfigDict({name: section(name, values) if isinstance(values, dict) else values
                       for name, values in default_dict().items()})


class _Fields(dict):
    """The values of a section, by their first names as well (bd3lm_jax/core/migrations.py)."""

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
    if "block_size" in defaults and "block_size" not in given and options.algo not in ("bd3lm", "joint"):
        options.block_size = 0  # one block a row
    return options


def algorithms() -> tuple[str, ...]:
    """What `algo` may be: objectives by their kinds, and names that a plug-in adds to OBJECTIVES."""
    kinds = (kind for kind in diffusion.OBJECTIVES if kind != "masked")
    return tuple(dict.fromkeys(("bd3lm", "mdlm", *kinds, *OBJECTIVES)))


def algorithm(algo: str) -> tuple[dict, dict]:
    """The section `diffusion` of an objective, and the keys that it changes elsewhere."""
    given, changes = OBJECTIVES.get(algo, ({}, {}))
    defaults = default_dict(objective=given.get("kind", algo))["diffusion"]
    in_blocks = {"block_size": BLOCK_SIZE} if "block_size" in defaults else {}
    return defaults | in_blocks | given, changes


def set_algo(config: ConfigDict, algo: str, block_size: int) -> None:
    """Masked diffusion with `block_size` (0: one block a row, MDLM), or another objective."""
    size = block_size or config.data.get_oneway_ref("seq_len")
    if algo in ("bd3lm", "mdlm"):
        config.diffusion.block_size = size
        return
    objective, changes = algorithm(algo)
    config.diffusion = section("diffusion", {key: size if value == BLOCK_SIZE else value
                                             for key, value in objective.items()})
    for key, value in changes.items():
        changed, _, name = key.partition(".")
        if name in config[changed]:  # other backbones have no such input
            config[changed][name] = value


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
    return algo == "bd3lm" or algo != "mdlm" and BLOCK_SIZE in algorithm(algo)[0].values()


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"config argument {key}={value}: expected a positive whole number")
    return int(value)


def _known(defaults: dict) -> str:
    allowed = {"algo": "|".join(algorithms()), "size": "|".join(SIZES)}
    words = [f"{key}={allowed.get(key, 'N')}" for key in defaults]
    return f"known are {', '.join(words)}" + (" (or the size by itself)" if "size" in defaults else "")
