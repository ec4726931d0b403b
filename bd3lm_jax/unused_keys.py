"""Config keys that another key switches off: which, and by which.

RULES is the whole list. A key that has another value than its default where it has no effect is an error of new
configs, never of those that run directories of earlier versions hold (`Config.from_dict(stored=True)`).
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.typed import default_values


class Rule(NamedTuple):
    """key: "section.name". by: the key that decides. is_unused: whether it has no effect in a Config that has the key.
    preset: configs leave other values behind when a user changes the deciding key, so that it is an error only of the
    command line that names the key itself."""

    key: str
    by: str
    is_unused: Callable[[Any], bool]
    preset: bool = False


def _rule(key: str, by: str, *used_with: Any, kinds: Collection[str] = (), preset: bool = False) -> Rule:
    """A key that has an effect only with these values of another one (kinds: a rule of these kinds of section)."""
    section = key.partition(".")[0]

    def is_unused(config: Any) -> bool:
        return (not kinds or getattr(config, section).kind in kinds) and value_of(config, by) not in used_with
    return Rule(key, by, is_unused, preset)


def value_of(config: Any, key: str) -> Any:
    """The value of "section.name"; None where there is no such key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name, None)


def default_of(config: Any, key: str) -> Any:
    """The default of "section.name" in such a config; None where there is none."""
    section, _, name = key.partition(".")
    return default_values(type(getattr(config, section))).get(name)


LOCAL = ("text", "jsonl", "sft")
MASKED = ("masked", "cap", "mixed", "joint")
RULES = (
    _rule("diffusion.schedule", "diffusion.corruption", "bernoulli", kinds=MASKED),
    _rule("diffusion.eps", "diffusion.corruption", "bernoulli", kinds=MASKED),
    Rule("diffusion.eps", "diffusion.clip_low", lambda config: config.diffusion.kind in MASKED
         and config.noise.adaptive_noise == "none"
         and (value_of(config, "diffusion.clip_low") or 0) >= config.diffusion.eps),
    _rule("diffusion.weight", "diffusion.hard", False, kinds=("priority",)),
    *(_rule(f"noise.clip_{name}", "noise.adaptive_noise", "clip") for name in ("widths", "stride", "batches")),
    _rule("noise.count_floor", "noise.adaptive_noise", "counts"),
    _rule("noise.count_decay", "noise.adaptive_noise", "counts", "running_loss"),
    Rule("train.lora_alpha", "train.lora_rank", lambda config: config.train.lora_rank == 0),
    Rule("train.anneal_steps", "diffusion.block_size",
         lambda config: config.diffusion.block_size == 1 and config.diffusion.draws_noise, preset=True),
    _rule("optim.decay_fraction", "optim.schedule", "wsd", preset=True),
    _rule("optim.final_lr_fraction", "optim.schedule", "cosine", "wsd", preset=True),
    _rule("model.cond_dim", "model.adaln", True, kinds=("dit",), preset=True),
    *(Rule(key, "model.local_layers", lambda config: config.model.local_layers == ())
      for key in ("model.window", "model.local_rope_theta")),
    Rule("model.rope_theta", "model.local_layers", lambda config: config.model.kind == "modernbert"
         and len(set(config.model.local_layers)) == config.model.num_layers),
    _rule("data.path", "data.source", *LOCAL, "tfds", "mixture"),
    _rule("data.name", "data.source", "text", "sft", "tfds", "mixture"),
    _rule("data.field", "data.source", "jsonl", "tfds", "mixture"),
    _rule("data.valid_fraction", "data.source", *LOCAL, "tfds", "mixture", preset=True),
    Rule("eval.sample_length", "eval.num_samples", lambda config: config.eval.num_samples == 0, preset=True),
    Rule("eval.mc_samples", "diffusion.kind", lambda config: config.diffusion.exact_likelihood, preset=True),
    *(Rule(key, "diffusion.kind", lambda config: not config.diffusion.has_bound, preset=True)
      for key in ("eval.mc_samples", "eval.rows", "eval.report_rows", "checkpoint.keep_best")),
)


def keys(config: Any) -> set[str]:
    """The keys of a config that have no effect there."""
    return {rule.key for rule in RULES if value_of(config, rule.key) is not None and rule.is_unused(config)}


def check(config: Any, named: Collection[str] = ()) -> None:
    """UserError for a key that is set and has no effect.

    named: keys that a command line sets, for which rules about what presets leave behind hold as well.
    """
    for rule in RULES:
        value, default = value_of(config, rule.key), default_of(config, rule.key)
        if value in (None, default) or rule.preset and rule.key not in named or not rule.is_unused(config):
            continue
        raise UserError(f"{rule.key}={value!r} has no effect with {rule.by}={value_of(config, rule.by)!r}: use "
                        f"{default!r}, or another {rule.by}")
