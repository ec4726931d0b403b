"""How a config of an earlier version becomes one of today: keys with another name, keys that were added since.

Both names of a key mean the same wherever a config is read. Hashes of configs are made of the first names, so that
those in checkpoints and config.json stay what they are. A key that the config of a run directory lacks means what its
version did, which need not be today's default.
"""

from collections.abc import Collection, Mapping
from typing import Any

from bd3lm_jax.core.errors import UserError

RENAMED = {  # section: {first name: name of today}
    "model": {
        "layers": "num_layers", "width": "hidden_size", "heads": "num_heads", "kv_heads": "num_kv_heads",
        "hidden": "intermediate_size", "tied": "tie_embeddings", "shifted": "target_shift", "rope_base": "rope_theta",
        "local_rope_base": "local_rope_theta", "experts": "num_experts", "expert_hidden": "expert_intermediate_size",
        "shared_hidden": "shared_intermediate_size", "balance": "load_balancing",
    },
    "diffusion": {"hidden": "hidden_size"},
    "data": {"length": "seq_len", "layout": "packing"},
    "optim": {"ema": "ema_decay"},
    "train": {"batch": "batch_size", "views": "noise_samples"},
    "eval": {"batch": "batch_size", "draws": "mc_samples", "samples": "num_samples"},
    "noise": {"adapt": "adaptive_noise"},
}
MIGRATIONS = {  # section: keys that were added since, with what runs without them did, whatever their default becomes
    "noise": {"adaptive_noise": "none", "clip_widths": [0.5, 0.6, 0.7, 0.8, 0.9], "clip_stride": 0.05,
              "clip_batches": 1, "count_floor": 0.1, "count_decay": 0.99},
    "train": {"noise_samples": 1, "block_sizes": [], "anneal_steps": 0, "lora_rank": 0, "lora_alpha": 16.0},
    "data": {"density": "", "density_fraction": 1.0, "mixture": []},
    "compute": {"loss_chunk": 0},
    "checkpoint": {"keep_best": 0},
    "mesh": {"expert": 1, "slices": 1},
    "eval": {"report_rows": 0},
}
MIGRATIONS_BY_KIND = {  # the same for objectives and networks
    "masked": {"complement": False}, "dit": {"decoder_layers": 0, "target_shift": ""},
}
_CURRENT = {f"{section}.{old}": f"{section}.{new}" for section, names in RENAMED.items() for old, new in names.items()}
_FIRST = {new: old for old, new in _CURRENT.items()}


def migrate(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run directory, with the keys that were added since it was written."""
    result = dict(stored)
    for name in (*MIGRATIONS, "model", "diffusion"):
        section = stored.get(name, {})
        if isinstance(section, Mapping):
            added = MIGRATIONS.get(name) or MIGRATIONS_BY_KIND.get(str(section.get("kind")), {})
            result[name] = added | with_known_names(name, section, added)
    return result


def current_name(key: str) -> str:
    """`train.batch` -> `train.batch_size`; any other key stays."""
    return _CURRENT.get(key, key)


def first_name(key: str) -> str:
    """`train.batch_size` -> `train.batch`; any other key stays."""
    return _FIRST.get(key, key)


def with_known_names(section: str, values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """A section whose keys have those of their two names that are `known`. UserError if it holds both names of one."""
    result, spelled = {}, {}
    for name, value in values.items():
        names = (name, *(other(f"{section}.{name}").partition(".")[2] for other in (current_name, first_name)))
        key = next((candidate for candidate in names if candidate in known), name)
        if key in result:
            check_one_name(f"{section}.{spelled[key]}", f"{section}.{name}")
        result[key], spelled[key] = value, name
    return result


def check_one_name(first: str, second: str) -> None:
    """UserError for a key that is given by two names."""
    if first != second:
        raise UserError(f"'{first}' and '{second}' are two names of one config key: leave '"
                        f"{second if second in _CURRENT else first}' out")
