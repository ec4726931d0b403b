"""What runs are called in tables and pictures: the objective, and what tells them apart."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bd3lm_jax.config import Config

PHRASES = {
    "seed": "seed {}", "train.steps": "{} steps", "train.batch_size": "{} rows a step",
    "train.noise_samples": "{} noised copies",
    "model.decoder_layers": "decoder layers: {}", "model.num_layers": "{} layers", "model.hidden_size": "width {}",
    "optim.lr": "learning rate {}", "optim.ema_decay": "EMA {}", "data.seq_len": "{} tokens a row",
    "diffusion.block_size": "block size {}",
}


def run_titles(configs: Sequence[Config]) -> list[str]:
    """`BD3-LM, S = 4, seed 1`: a title for each run.

    Among runs of one objective and block size, a key that takes another value in most of them is named in all, any
    other one where its value is not the most common.
    """
    groups = [_objective(config) for config in configs]
    flat = [_flat(config.to_dict()) for config in configs]
    titles = []
    for group, values in zip(groups, flat):
        same_group = [other for name, other in zip(groups, flat) if name == group]
        parts = [phrase(key, value) for key, value in values.items() if _is_distinguishing(key, value, same_group)]
        titles.append(", ".join([group, *parts]))
    return titles


def _objective(config: Config) -> str:
    objective, size = config.diffusion, config.block_size
    if objective.kind == "masked" and size >= config.data.seq_len:
        return "MDLM"
    name = objective.title or objective.kind
    return f"{name}, S = {size}" if 1 < size < config.data.seq_len else name


def _is_distinguishing(key: str, value: Any, same_group: Sequence[dict]) -> bool:
    counts = Counter(repr(other.get(key)) for other in same_group)
    if len(counts) == 1:
        return False
    return 2 * len(counts) > len(same_group) or repr(value) != counts.most_common(1)[0][0]


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def phrase(key: str, value: Any) -> str:
    """A key of a config and its value, in words."""
    if key == "train.block_sizes":
        if not value:
            return "one block size"
        (_, first), *later = value
        return f"blocks of {first}" + "".join(f", of {size} from step {step}" for step, size in later)
    return PHRASES.get(key, f"{key_title(key)} {{}}").format(value)


def key_title(key: str) -> str:
    """A key of a config as the label of an axis."""
    return PHRASES.get(key, key.rpartition(".")[2].replace("_", " ")).replace("{}", "").strip(" :")
