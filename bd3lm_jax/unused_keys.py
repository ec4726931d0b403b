"""Config keys that another key switches off: which, by which, and the value that says so.

RULES is the whole list. A key that is set to something else where it has no effect is an error of new configs, never of
those that run directories of earlier versions hold (`Config.from_dict(stored=True)`).
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from bd3lm_jax.core.errors import UserError


class Rule(NamedTuple):
    """key: "section.name". unused: its value where it has no effect. by: the key that decides. off: whether it has no
    effect in a Config that has the key. preset: configs leave other values behind when a user changes the deciding
    key, so that it is an error only of the command line that names the key itself."""

    key: str
    unused: Any
    by: str
    is_unused: Callable[[Any], bool]
    preset: bool = False


def _rule(key: str, unused: Any, by: str, *used_with: Any, kinds: Collection[str] = (), preset: bool = False) -> Rule:
    """A key that has an effect only with these values of another one (kinds: a rule of these kinds of section)."""
    section = key.partition(".")[0]

    def is_unused(config: Any) -> bool:
        return (not kinds or getattr(config, section).kind in kinds) and value_of(config, by) not in used_with
    return Rule(key, unused, by, is_unused, preset)


def value_of(config: Any, key: str) -> Any:
    """The value of "section.name"; None where there is no such key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name, None)


LOCAL = ("text", "jsonl", "sft")
MASKED = ("masked", "cap", "mixed")
RULES = (
    _rule("diffusion.schedule", "loglinear", "diffusion.corruption", "bernoulli", kinds=MASKED),
    _rule("diffusion.eps", 1e-3, "diffusion.corruption", "bernoulli", kinds=MASKED),
    Rule("diffusion.eps", 1e-3, "diffusion.clip_low", lambda config: config.diffusion.kind in MASKED
         and config.noise.adaptive_noise == "none"
         and (value_of(config, "diffusion.clip_low") or 0) >= config.diffusion.eps),
    _rule("diffusion.weight", 2.0, "diffusion.hard", False, kinds=("priority",)),
    *(_rule(f"noise.clip_{name}", unused, "noise.adaptive_noise", "clip")
      for name, unused in (("widths", (0.5, 0.6, 0.7, 0.8, 0.9)), ("stride", 0.05), ("batches", 1))),
    _rule("noise.count_floor", 0.1, "noise.adaptive_noise", "counts"),
    _rule("noise.count_decay", 0.99, "noise.adaptive_noise", "counts", "running_loss"),
    Rule("train.lora_alpha", 16.0, "train.lora_rank", lambda config: config.train.lora_rank == 0),
    Rule("train.anneal_steps", 0, "diffusion.block_size",
         lambda config: config.diffusion.block_size == 1 and config.diffusion.draws_noise, preset=True),
    _rule("optim.decay_fraction", 0.2, "optim.schedule", "wsd", preset=True),
    _rule("optim.final_lr_fraction", 0.0, "optim.schedule", "cosine", "wsd", preset=True),
    _rule("model.cond_dim", 128, "model.adaln", True, kinds=("dit",), preset=True),
    *(Rule(key, unused, "model.local_layers", lambda config: config.model.local_layers == ())
      for key, unused in (("model.window", 64), ("model.local_rope_theta", 10_000.0))),
    Rule("model.rope_theta", 160_000.0, "model.local_layers", lambda config: config.model.kind == "modernbert"
         and len(set(config.model.local_layers)) == config.model.num_layers),
    _rule("data.path", "", "data.source", *LOCAL, "tfds", "mixture"),
    _rule("data.name", "", "data.source", "text", "sft", "tfds", "mixture"),
    _rule("data.field", "text", "data.source", "jsonl", "tfds", "mixture"),
    _rule("data.valid_fraction", 0.01, "data.source", *LOCAL, "tfds", "mixture", preset=True),
    Rule("eval.sample_length", 256, "eval.num_samples", lambda config: config.eval.num_samples == 0, preset=True),
    Rule("eval.mc_samples", 1, "diffusion.kind", lambda config: config.diffusion.exact_likelihood, preset=True),
    *(Rule(key, unused, "diffusion.kind", lambda config: not config.diffusion.has_bound, preset=True)
      for key, unused in (("eval.mc_samples", 1), ("eval.rows", 4096), ("eval.report_rows", 0),
                          ("checkpoint.keep_best", 1))),
)


def keys(config: Any) -> set[str]:
    """The keys of a config that have no effect there."""
    return {rule.key for rule in RULES if value_of(config, rule.key) is not None and rule.is_unused(config)}


def check(config: Any, named: Collection[str] = ()) -> None:
    """UserError for a key that is set and has no effect.

    named: keys that a command line sets, for which rules about what presets leave behind hold as well.
    """
    for rule in RULES:
        value = value_of(config, rule.key)
        if value in (None, rule.unused) or rule.preset and rule.key not in named or not rule.is_unused(config):
            continue
        raise UserError(f"{rule.key}={value!r} has no effect with {rule.by}={value_of(config, rule.by)!r}: use "
                        f"{rule.unused!r}, or another {rule.by}")
