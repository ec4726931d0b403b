"""Settings for `sample` by preference: measured ones from a file, else presets."""

from pathlib import Path
from typing import Any

from bd3lm_jax.core import log, remote
from bd3lm_jax.core.checksummed import CHECKSUM_KEY, ChecksumError, verify_checksum
from bd3lm_jax.core.errors import UserError, command_line
from bd3lm_jax.core.untrusted_files import read_bytes
from bd3lm_jax.generation.options import by_field
from bd3lm_jax.lm import LM

FILE = "sampling.json"  # in the run directory, written by `python -m launch bench sampling --workdir=DIR`
PREFERENCES = ("quality", "balanced", "speed")
PRESETS = {"quality": {"sampler": "first_hitting"},
           "balanced": {"sampler": "threshold", "threshold": 0.9},
           "speed": {"sampler": "threshold", "threshold": 0.6}}
OF_SAMPLER = ("steps", "threshold")  # mean something else to another sampler


def settings_for(lm: LM, workdir: str, file: str, prefer: str) -> tuple[dict[str, Any], str]:
    """Fields of `options.Options`, and where they come from, in words.

    file: JSON of such fields, or of an object of them by preference as in FILE; "" for FILE in `workdir` if it is there
    and there is a preference, then PRESETS. prefer: one of PREFERENCES, or "" for none ("balanced" of a file that asks
    for one). A file that was measured on another checkpoint is used with a warning. Raises UserError for a file that
    cannot be read or has no settings of that preference.
    """
    if not file and not prefer:
        return {}, "defaults"
    path = remote.fetch(file or Path(workdir) / FILE)
    if file or path.exists():
        return _from_file(lm, path, prefer)
    if lm.config.block_size == 1:
        return PRESETS["quality"], "the model writes one token a call whatever the preference"
    return PRESETS[prefer], f"preset, not measured: {command_line('bench sampling')} --workdir={workdir} measures"


def _from_file(lm: LM, path: Path, prefer: str) -> tuple[dict[str, Any], str]:
    content = read_object(path)
    if not prefer and not any(name in content for name in PREFERENCES):
        return content, str(path)
    prefer = prefer or "balanced"
    preset = content.get(prefer)
    if not isinstance(preset, dict):
        raise UserError(f"{path} has no settings for --prefer={prefer}: expected an object of that name, as bench "
                        "sampling writes it")
    mismatch = _measured_on_another(lm, content)
    if mismatch:
        log.note(f"warning: {path} was measured {mismatch}: {command_line('bench sampling')} measures again")
    return preset, f"{prefer} of {path}" + (f", measured {mismatch}" if mismatch else "")


def _measured_on_another(lm: LM, content: dict[str, Any]) -> str:
    """In words, whether settings belong to another checkpoint than the model's; "" if they do not or nobody knows."""
    if lm.trained is None or "step" not in content:
        return ""
    step, config = lm.trained
    if content.get("config_sha256") != config:
        return "on a model of another config"
    return "" if content["step"] == step else f"at step {content['step']}, and this is step {step}"


def merge_settings(preset: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """`preset` settings under `explicit` ones, which win; steps and threshold chosen for another sampler are left
    out."""
    if explicit.get("sampler", preset.get("sampler")) != preset.get("sampler"):
        preset = {name: value for name, value in preset.items() if name not in OF_SAMPLER}
    return by_field(preset) | by_field(explicit)


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file, without its checksum. UserError if there is none, or it is not what was written."""
    try:
        return verify_checksum(read_bytes(remote.fetch(path)))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ChecksumError as error:
        raise UserError(
            f"{path} {error}: expected one JSON object; if it was edited on purpose delete its '{CHECKSUM_KEY}'"
        ) from None
