"""The run directory: config.json (resolved), tokenizer.json (with the chat template that lay beside it), metrics.jsonl,
checkpoints/, samples/, plots/."""

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path

from bd3lm_jax import files, lock, plugins
from bd3lm_jax.config import Config
from bd3lm_jax.data.chat_template import CHAT_FILES
from bd3lm_jax.data.corpora import SOURCES
from bd3lm_jax.data.dialogues import chat_files
from bd3lm_jax.data.tokenizers import Tokenizer, load_tokenizer
from bd3lm_jax.diffusion.schedule import SCHEDULES
from bd3lm_jax.errors import RunError, UserError
from bd3lm_jax.foreign import read_bytes, read_text
from bd3lm_jax.typed import as_mapping, from_json

CONFIG, TOKENIZER, LOCK = "config.json", "tokenizer.json", "train.lock"
IMPORTS = "imports"  # key of config.json: modules that register what the run uses (plugins.py)
BEFORE_CONFIG = (TOKENIZER, LOCK, *CHAT_FILES)  # what a run that was killed while it began may have left
ADDED = {  # keys that the run directories of earlier versions lack, with values that mean what these runs did
    "noise": {"adapt": "none", "clip_widths": [0.5, 0.6, 0.7, 0.8, 0.9], "clip_stride": 0.05, "clip_batches": 1,
              "count_floor": 0.1, "count_decay": 0.99},
    "train": {"views": 1, "block_sizes": [], "anneal_steps": 0, "lora_rank": 0, "lora_alpha": 16.0},
    "data": {"density": "", "density_fraction": 1.0, "mixture": []},
    "compute": {"loss_chunk": 0},
    "checkpoint": {"keep_best": 0},
    "mesh": {"expert": 1, "slices": 1},
    "eval": {"report_rows": 0},
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


def claim(workdir: str | os.PathLike, config: Config, tokenizer: Tokenizer,
          held: contextlib.ExitStack | None = None) -> None:
    """Make `workdir` the directory of this run, or check that it is, and lock it until `held` (if there is one) is
    closed. UserError naming the keys that differ, or the process that trains there already.
    """
    path = Path(workdir)
    _check(path, config, tokenizer)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if held is not None:
            held.enter_context(lock.held(path / LOCK))
            _check(path, config, tokenizer)  # whoever had the lock may have made it another run
        for name, content in ({TOKENIZER: tokenizer.to_bytes()} | chat_files(config.data.tokenizer)).items():
            files.write(path / name, content)
        resolved = config.to_dict() | {"config_sha256": config.sha256()} | _imports(config)
        files.write(path / CONFIG, json.dumps(resolved, indent=2).encode() + b"\n")
    except OSError as error:
        kind = RunError if error.errno in files.FULL else UserError
        raise kind(f"cannot write in {path}: {error.strerror or error}; choose another --workdir, or free some disk "
                   "space") from None


def _check(path: Path, config: Config, tokenizer: Tokenizer) -> None:
    """UserError unless the directory holds this run, or nothing, or is not there yet."""
    if (path / CONFIG).exists():
        there, there_tokenizer = read(path)
        differing = config.differing_keys(there)
        if differing:
            raise UserError(f"{path} holds a run of another config ({'; '.join(differing)}; here != there): choose "
                            "another --workdir, or repeat the config it was started with")
        check_tokenizer(tokenizer, there_tokenizer.identity, f"the run in {path}")
    elif path.is_dir() and any(file.name not in BEFORE_CONFIG and file.suffix != files.PART and not is_bare(file)
                               for file in path.iterdir()):
        raise UserError(f"{path} is not empty and holds no {CONFIG}: choose another --workdir")


def is_bare(path: Path) -> bool:
    """Whether it is a directory that holds nothing but such ones: what a run makes anew whose directory was moved."""
    return path.is_dir() and not path.is_symlink() and all(map(is_bare, path.iterdir()))


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
    if not stored.keys() & {field.name for field in dataclasses.fields(Config)}:
        from bd3lm_jax.published import FORMATS

        raise UserError(f"{path / CONFIG} is that of no run, and has no model_type, which tells the architecture of a "
                        f"published checkpoint: add it, supported: {', '.join(FORMATS)}")
    stored.pop("config_sha256", None)
    absent = plugins.missing(stored.pop(IMPORTS, []))
    try:
        config = Config.from_dict(_brought_up_to_date(stored), stored=True)
    except UserError as error:
        if not absent:
            raise
        flags = " ".join(f"--import={name}" for name in absent)
        raise UserError(f"{path} was trained with plug-ins that are not imported here, {', '.join(absent)} ({error}): "
                        f"add {flags}, in Python import them, if you trust their code") from None
    return config, load_tokenizer(path / TOKENIZER)


def _imports(config: Config) -> dict[str, list[str]]:
    """The plug-ins of a run, as config.json names them; nothing for a run without."""
    schedule = SCHEDULES.get(getattr(config.diffusion, "schedule", ""))
    sources = {config.data.source, *(spec.partition(":")[0] for spec, _ in config.data.mixture)}
    found = plugins.needed([type(config.diffusion), type(config.model), *map(SOURCES.get, sorted(sources)),
                            *([type(schedule)] if schedule else [])])
    return {IMPORTS: found} if found else {}


def visible(workdir: str | os.PathLike) -> dict:
    """What the processes of one run must all see there: hash of its config, newest checkpoint (None: there is none)."""
    path = Path(workdir)
    config = hashlib.sha256(read_bytes(path / CONFIG)).hexdigest()[:12] if (path / CONFIG).exists() else None
    names = [file.name for file in (path / "checkpoints").iterdir()] if (path / "checkpoints").is_dir() else []
    return {CONFIG: config, "newest checkpoint": max((int(name) for name in names if name.isdecimal()), default=None)}


def planned_steps(workdir: str | os.PathLike) -> int:
    """`train.steps` of a run directory as it is now: a run that goes on may be told to do more."""
    return _stored(Path(workdir))["train"]["steps"]


def _stored(path: Path) -> dict:
    try:
        stored = from_json(read_text(path / CONFIG))
    except ValueError as error:
        raise UserError(f"{path / CONFIG} is not valid JSON ({error}): restore it or train again") from error
    except OSError as error:
        raise UserError(f"cannot read {path / CONFIG}: {error.strerror or error}") from None
    return as_mapping(str(path / CONFIG), stored)


def _brought_up_to_date(stored: dict) -> dict:
    sections = {name: as_mapping(name, stored.get(name, {})) for name in (*ADDED, "model", "diffusion")}
    missing = ADDED | {name: ADDED_BY_KIND.get(str(sections[name].get("kind")), {}) for name in ("model", "diffusion")}
    return stored | {name: keys | sections[name] for name, keys in missing.items()}


def check_tokenizer(tokenizer: Tokenizer, identity: str, owner: str) -> None:
    """UserError unless `tokenizer` is the one that `owner` was made with."""
    if tokenizer.identity != identity:
        raise UserError(f"tokenizer {tokenizer.identity} does not match {owner}, made with tokenizer {identity}: ids "
                        "would mean other text; use the tokenizer.json saved with it")
