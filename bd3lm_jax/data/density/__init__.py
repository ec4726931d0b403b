"""How much each token of a text tells, in [0, 1]: what priority masks and token-dependent schedules are drawn from.

A source is one file with `build(argument, context) -> Spans or Table` (see source.py), with `check(argument)` if it
takes one, and a line in SOURCES. It is named in `data.density`, with its argument after a colon: "python",
"unigram:0.5", "file:tags.jsonl".
"""

from typing import Any

from bd3lm_jax.core.errors import UserError, lookup
from bd3lm_jax.data.density import arithmetic, file, frequency, python, surprisal, unigram
from bd3lm_jax.data.density.source import Annotation, Context

SOURCES = {"unigram": unigram, "surprisal": surprisal, "frequency": frequency, "python": python,
           "arithmetic": arithmetic, "file": file}


def check(spec: str, fraction: float) -> None:
    """UserError unless `data.density` names a source as it should and `data.density_fraction` goes with it."""
    if not 0 < fraction <= 1:
        raise UserError(f"data.density_fraction is {fraction}, expected above 0 and up to 1")
    if not spec:
        if fraction != 1:
            raise UserError(f"data.density_fraction={fraction} has no effect without data.density: use 1")
        return
    name, _, argument = spec.partition(":")
    source = lookup(SOURCES, name, "data.density")
    if bool(argument) != bool(source.ARGUMENT):
        raise UserError(f"data.density={spec!r}: expected '{name}:{source.ARGUMENT}'" if source.ARGUMENT else
                        f"data.density={spec!r}: '{name}' takes nothing after a colon")
    if argument:
        source.check(argument)


def check_config(config: Any) -> None:
    """UserError unless the data of a Config bring what its objective needs of every token, and nothing else."""
    objective, source = config.diffusion, config.data.density
    needed = "density" in config.batch_arrays
    if needed and not source:
        raise UserError(f"diffusion.kind='{objective.kind}' needs the density of every token: set data.density, one of "
                        f"{', '.join(SOURCES)}, or noise.adaptive_noise='running_loss'")
    if source and not needed:
        raise UserError(f"data.density={source!r} has no effect with diffusion.kind='{objective.kind}' and "
                        f"noise.adaptive_noise='{config.noise.adaptive_noise}': use ''")
    if source and objective.needs_density_tags and is_continuous(source):
        raise UserError(f"diffusion.importance=True needs tags, and data.density={source!r} gives numbers between 0 "
                        "and 1: use another source, or diffusion.importance=False")


def is_continuous(spec: str) -> bool:
    """Whether a source gives numbers between 0 and 1, else tags: 0 or 1."""
    return SOURCES[spec.partition(":")[0]].CONTINUOUS


def open_density(spec: str, fraction: float, context: Context) -> Annotation:
    """The source of `data.density`, on a `fraction` of the documents. UserError if it cannot be read."""
    check(spec, fraction)
    name, _, argument = spec.partition(":")
    return Annotation(spec, fraction, SOURCES[name].build(argument, context))
