"""The run directory: config.json (resolved), tokenizer.json, metrics.jsonl, checkpoints/, samples/, plots/."""

import json
import os
from pathlib import Path

from bd3lm_jax.config import Config
from bd3lm_jax.data.tokenizers import Tokenizer, load_tokenizer
from bd3lm_jax.errors import UserError

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
PART = ".tmp"  # a file being written
ADDED = {  # keys that the run directories of earlier versions lack, with values that mean what these runs did
    "noise": {"adapt": "none", "clip_widths": [0.5, 0.6, 0.7, 0.8, 0.9], "clip_stride": 0.05, "clip_batches": 1,
              "count_floor": 0.1, "count_decay": 0.99},
    "train": {"views": 1, "block_sizes": [], "anneal_steps": 0, "lora_rank": 0, "lora_alpha": 16.0},
    "data": {"density": "", "density_fraction": 1.0},
    "compute": {"loss_chunk": 0},
    "mesh": {"expert": 1, "slices": 1},
}
ADDED_BY_KIND = {  # the same for objectives and networks
    "masked": {"complement": False}, "dit": {"decoder_layers": 0, "shifted": ""},
}


def resolve(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with what the tokenizer decides filled in; UserError if the vocabulary cannot hold its ids."""
    wanted, given = tokenizer.vocab_size, config.model.vocab_size
    if given == -1:
        return config.with_vocab(wanted)
    if config.train.init_from and tokenizer.size <= given < wanted:
        return config.with_vocab(wanted)  # the source knows no mask token: adapt.py adds it
    if given < wanted:
        raise UserError(f"model.vocab_size={given} is smaller than the {wanted} ids of tokenizer "
                        f"'{config.data.tokenizer}' with its mask token: use -1 to take the tokenizer's")
    return config.with_vocab(given)


def claim(workdir: str | os.PathLike, config: Config, tokenizer: Tokenizer) -> None:
    """Make `workdir` the directory of this run, or check that it is; UserError naming the keys that differ."""
    path = Path(workdir)
    if (path / CONFIG).exists():
        there, there_tokenizer = read(workdir)
        differing = config.differing_keys(there)
        if differing:
            raise UserError(f"{path} holds a run of another config ({'; '.join(differing)}; here != there): choose "
                            "another --workdir, or repeat the config it was started with")
        check_tokenizer(tokenizer, there_tokenizer.identity, f"the run in {path}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = [file for file in path.iterdir() if file.name != TOKENIZER and file.suffix != PART]
        if others and not (path / CONFIG).exists():
            raise UserError(f"{path} is not empty and holds no {CONFIG}: choose another --workdir")
        _write(path / TOKENIZER, tokenizer.to_bytes())
        resolved = config.to_dict() | {"config_sha256": config.sha256()}
        _write(path / CONFIG, json.dumps(resolved, indent=2).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror or error}; choose another --workdir, or free some "
                        "disk space") from None


def read(workdir: str | os.PathLike) -> tuple[Config, Tokenizer]:
    """Config and tokenizer of a run directory; UserError if it is none."""
    path = Path(workdir)
    if not path.is_dir():
        raise UserError(f"no run directory {path}: train first (python -m launch train --workdir={path}), or give a "
                        "published checkpoint (config.json and safetensors)")
    if not (path / CONFIG).exists():
        raise UserError(f"{path} holds no {CONFIG}: expected a directory written by 'python -m launch train'")
    stored = _stored(path)
    if "model_type" in stored:
        raise UserError(f"{path} is a published checkpoint, expected a run directory: python -m launch convert "
                        f"--from={path} --to=DIR --format=native makes one")
    stored.pop("config_sha256", None)
    return Config.from_dict(_brought_up_to_date(stored)), load_tokenizer(path / TOKENIZER)


def _stored(path: Path) -> dict:
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path / CONFIG} is not valid JSON ({error}): restore it or train again") from error


def _brought_up_to_date(stored: dict) -> dict:
    missing = ADDED | {name: ADDED_BY_KIND.get(stored.get(name, {}).get("kind"), {}) for name in ("model", "diffusion")}
    return stored | {name: keys | stored.get(name, {}) for name, keys in missing.items()}


def check_tokenizer(tokenizer: Tokenizer, identity: str, owner: str) -> None:
    """UserError unless `tokenizer` is the one that `owner` was made with."""
    if tokenizer.identity != identity:
        raise UserError(f"tokenizer {tokenizer.identity} does not match {owner}, made with tokenizer {identity}: ids "
                        "would mean other text; use the tokenizer.json saved with it")


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing: a kill or a full disk leaves the old file."""
    temporary = path.with_suffix(PART)
    temporary.write_bytes(content)
    os.replace(temporary, path)
