"""The run directory: config.json (resolved), tokenizer.json (with the chat template that lay beside it), metrics.jsonl,
checkpoints/, samples/, plots/."""

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path

from bd3lm_jax.config import Config, decisive_hash
from bd3lm_jax.core import files, lock, migrations, plugins
from bd3lm_jax.core.checksummed import CHECKSUM_KEY, ChecksumError, add_checksum, verify_checksum
from bd3lm_jax.core.errors import RunError, UserError, command_line
from bd3lm_jax.core.log import METRICS_FILE, note_once
from bd3lm_jax.core.typed import as_mapping, from_json
from bd3lm_jax.core.untrusted_files import read_bytes
from bd3lm_jax.data.chat_template import chat_files, is_chat_file
from bd3lm_jax.data.corpora import SOURCES
from bd3lm_jax.data.tokenizers import Tokenizer, load_tokenizer
from bd3lm_jax.diffusion.schedule import SCHEDULES

CONFIG, TOKENIZER, LOCK = "config.json", "tokenizer.json", "train.lock"
IMPORTS = "imports"  # key of config.json: modules that register what the run uses (plugins.py)
# What training writes and may not replace: with one of them and no config.json a directory is another one's. Anything
# else, a log file or `lost+modules`, may be there.
RUN_OUTPUTS = ("checkpoints", "samples", "plots", "profile", METRICS_FILE, "report.json", "documents.npz",
               "watch.jsonl")
HASH, FILES = "config_sha256", "files_sha256"  # keys of config.json beside the config itself


def resolve(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with what the tokenizer decides filled in; UserError if the vocabulary cannot hold its ids."""
    tokenizer_size, config_size = tokenizer.vocab_size, config.model.vocab_size
    if config_size == -1:
        return config.with_vocab(tokenizer_size)
    if config.train.init_from and tokenizer.size <= config_size < tokenizer_size:
        return config.with_vocab(tokenizer_size)  # the source knows no mask token: adapt.py adds it
    if config_size < tokenizer_size:
        raise UserError(f"model.vocab_size={config_size} is smaller than the {tokenizer_size} ids of tokenizer "
                        f"'{config.data.tokenizer}' with its mask token: use -1 to take the tokenizer's")
    return config.with_vocab(config_size)


def create_or_validate(workdir: str | os.PathLike, config: Config, tokenizer: Tokenizer,
                       hold: contextlib.ExitStack | None = None) -> None:
    """Make `workdir` the directory of this run, or check that it is, and lock it until `hold` (if there is one) is
    closed. UserError naming the keys that differ, or the process that trains there already.
    """
    path = Path(workdir)
    _check(path, config, tokenizer)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if hold is not None:
            hold.enter_context(lock.hold(path / LOCK))
            _check(path, config, tokenizer)  # whoever had the lock may have made it another run
        files.sync(path.parent)
        contents = {TOKENIZER: tokenizer.to_bytes()} | chat_files(config.data.tokenizer)
        for name, content in contents.items():
            (path / name).parent.mkdir(exist_ok=True)
            files.write(path / name, content)
        stored = config.to_dict() | {HASH: config.sha256(), FILES: {name: _digest(x) for name, x in contents.items()}}
        stored |= _imports(config)
        files.write(path / CONFIG, json.dumps(add_checksum(stored), indent=2).encode() + b"\n")
    except OSError as error:
        kind = RunError if error.errno in files.DISK_FULL_ERRNOS else UserError
        raise kind(f"cannot write in {path}: {error.strerror or error}; choose another --workdir, or free some disk "
                   "space") from None


def _check(path: Path, config: Config, tokenizer: Tokenizer) -> None:
    """UserError unless the directory holds this run, or nothing, or is not there yet."""
    if (path / CONFIG).exists():
        stored_config, stored_tokenizer = _read(path, _stored(path))  # other files beside it are written anew
        differing = config.differing_keys(stored_config)
        if differing:
            raise UserError(f"{path} holds a run of another config ({'; '.join(differing)}; here != there): choose "
                            "another --workdir, or repeat the config it was started with")
        check_tokenizer(tokenizer, stored_tokenizer.identity, f"the run in {path}")
    else:
        tokenizer_path = path / TOKENIZER  # a run that was killed while it began may have left it, the same
        is_other_tokenizer = tokenizer_path.exists() and tokenizer_path.read_bytes() != tokenizer.to_bytes()
        conflicts = [name for name in RUN_OUTPUTS if (path / name).exists() and not is_empty_tree(path / name)]
        conflicts += [f"another {TOKENIZER}"] * is_other_tokenizer
        if conflicts:
            raise UserError(f"{path} holds {', '.join(conflicts)} and no {CONFIG}: choose another --workdir, or "
                            f"restore the {CONFIG} of the run that wrote them")


def is_empty_tree(path: Path) -> bool:
    """Whether it is a directory that holds nothing but such ones: what a run makes anew whose directory was moved."""
    return path.is_dir() and not path.is_symlink() and all(map(is_empty_tree, path.iterdir()))


def read(workdir: str | os.PathLike) -> tuple[Config, Tokenizer]:
    """Config and tokenizer of a run directory; UserError if it is none, or if its files are not what was written."""
    path = Path(workdir)
    if not path.is_dir():
        raise UserError(f"no run directory {path}: train first ({command_line('train')} --workdir={path}), or give "
                        "a published checkpoint (config.json and safetensors)")
    if not (path / CONFIG).exists():
        raise UserError(f"{path} holds no {CONFIG}: expected a directory written by '{command_line('train')}'")
    stored = _stored(path)
    for name, digest in as_mapping(FILES, stored.get(FILES, {})).items():
        file = path / name
        if (name == TOKENIZER or is_chat_file(name)) and file.exists() and _digest(file.read_bytes()) != digest:
            raise UserError(f"{file} is not the file that the run was started with ({CONFIG} has its hash): "
                            "restore it from a copy, or repeat the training command, which writes it again")
    return _read(path, stored)


def _read(path: Path, stored: dict) -> tuple[Config, Tokenizer]:
    missing_plugins = plugins.missing(stored.get(IMPORTS, []))
    try:
        config = _config(stored)
    except UserError as error:
        if not missing_plugins:
            raise
        flags = " ".join(f"--import={name}" for name in missing_plugins)
        raise UserError(
            f"{path} was trained with plug-ins that are not imported here, {', '.join(missing_plugins)} ({error}): "
            f"add {flags}, in Python import them, if you trust their code") from None
    return config, load_tokenizer(path / TOKENIZER)


def _config(stored: dict) -> Config:
    return Config.from_dict(migrations.migrate(_own(stored)), stored=True)


def _own(stored: dict) -> dict:
    """The config itself."""
    return {key: value for key, value in stored.items() if key not in (HASH, FILES, IMPORTS)}


def _imports(config: Config) -> dict[str, list[str]]:
    """The plug-ins of a run, as config.json names them; nothing for a run without."""
    schedule = SCHEDULES.get(dataclasses.asdict(config.diffusion).get("schedule", ""))
    sources = {config.data.source, *(spec.partition(":")[0] for spec, _ in config.data.mixture)}
    modules = plugins.required_modules([type(config.diffusion), type(config.model), *map(SOURCES.get, sorted(sources)),
                                        *([type(schedule)] if schedule else [])])
    return {IMPORTS: modules} if modules else {}


def shared_state(workdir: str | os.PathLike) -> dict:
    """What the processes of one run must all see there: hash of its config, newest checkpoint (None: there is none)."""
    path = Path(workdir)
    config = hashlib.sha256(read_bytes(path / CONFIG)).hexdigest()[:12] if (path / CONFIG).exists() else None
    names = [file.name for file in (path / "checkpoints").iterdir()] if (path / "checkpoints").is_dir() else []
    return {CONFIG: config, "newest checkpoint": max((int(name) for name in names if name.isdecimal()), default=None)}


def planned_steps(workdir: str | os.PathLike) -> int:
    """`train.steps` of a run directory as it is now: a run that goes on may be told to do more."""
    return _config(_stored(Path(workdir))).train.steps


def _stored(path: Path) -> dict:
    """What config.json of a run holds, as the version that wrote it did. UserError if it was changed since."""
    try:
        text = read_bytes(path / CONFIG)
    except OSError as error:
        raise UserError(f"cannot read {path / CONFIG}: {error.strerror or error}") from None
    try:
        stored, checksum_ok = verify_checksum(text), True
    except ChecksumError as error:
        try:
            stored, checksum_ok = dict(as_mapping(str(path / CONFIG), from_json(text))), False
        except ValueError:
            raise UserError(f"{path / CONFIG} {error}: restore it or train again") from None
        stored.pop(CHECKSUM_KEY, None)
    if "model_type" in stored:
        raise UserError(f"{path} is a published checkpoint, expected a run directory: "
                        f"{command_line('convert')} --from={path} --to=DIR --format=native makes one")
    if not stored.keys() & {field.name for field in dataclasses.fields(Config)}:
        from bd3lm_jax.checkpoints.published import FORMATS

        raise UserError(f"{path / CONFIG} is that of no run, and has no model_type, which tells the architecture of a "
                        f"published checkpoint: add it, supported: {', '.join(FORMATS)}")
    if decisive_hash(_own(stored)) != stored.get(HASH):
        raise UserError(f"{path / CONFIG} was changed since training wrote it (its {HASH} is that of another config), "
                        "and would give other figures: restore it; for another config start a run in another --workdir")
    if not checksum_ok:
        note_once(f"warning: {path / CONFIG} was changed since training wrote it, in keys that do not decide what is "
                  "learned; give them to train as --config.KEY=value instead")
    return stored


def check_tokenizer(tokenizer: Tokenizer, identity: str, owner: str) -> None:
    """UserError unless `tokenizer` is the one that `owner` was made with."""
    if tokenizer.identity != identity:
        raise UserError(f"tokenizer {tokenizer.identity} does not match {owner}, made with tokenizer {identity}: ids "
                        "would mean other text; use the tokenizer.json saved with it")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
