"""Other spellings of flags: `-` for `_`, and the names of earlier versions."""

import itertools
import re
from collections.abc import Sequence

from absl import flags

from bd3lm_jax.core.errors import UserError

OLD_NAMES = {  # of earlier versions, where a command has no flag of that name itself
    "against": "baseline", "batch": "batch_size", "beside": "compare_traces", "chunks": "context_mode",
    "draws": "mc_samples", "draws_per_problem": "samples_per_problem", "for": "accelerator", "forced": "fixed_tokens",
    "give_up": "early_stopping", "give_up_after": "early_stopping_after", "guidance": "guidance_scale",
    "heartbeat": "heartbeat_timeout", "join_within": "init_timeout", "max_draws": "max_mc_samples",
    "max_shard": "max_shard_size", "num": "num_samples", "processes": "num_processes", "restarts": "max_restarts",
    "shared": "shared_dir", "shots": "num_fewshot", "stuck_after": "watchdog_timeout", "texts": "num_samples",
    "utilisation": "mfu", "watch_for": "watch_timeout", "window": "sliding_window", "within": "nll_tolerance",
    "workers": "num_workers",
}


def canonical(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """The words of a command line, every flag among `values` under its own name; unknown ones as they are.

    Raises:
        UserError: two spellings of one flag.
    """
    spellings: dict[str, str] = {}
    result, words = [], iter(argv)
    for word in words:
        if word == "--":
            return [*result, word, *words]
        match = re.fullmatch(r"--?([\w-]+)(=.*)?", word, re.DOTALL)
        name, spelling, is_negated = _find(match[1], values) if match else ("", "", False)
        if not match or not name:
            result.append(word)
            continue
        if spellings.setdefault(name, spelling) != spelling:
            raise UserError(f"--{spellings[name]} and --{spelling} are two spellings of one flag: give one of them")
        result.append(f"--{'no' * is_negated}{name}{match[2] or ''}")
        if match[2] is None and not values[name].boolean:  # the next word is the value, whatever it looks like
            result += itertools.islice(words, 1)
    return result


def _find(typed: str, values: flags.FlagValues) -> tuple[str, str, bool]:
    """(name of a flag, as it is typed, whether a `no` before it is left out); an empty name if there is none."""
    for spelling, is_negated in ((typed, False), (re.sub("^no[-_]?", "", typed), True)):
        name = spelling.replace("-", "_")
        name = name if name in values else OLD_NAMES.get(name, "")
        if name in values and (not is_negated or spelling != typed and values[name].boolean):
            return name, spelling, is_negated
    return "", "", False
