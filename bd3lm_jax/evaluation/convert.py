"""From a run directory, a published checkpoint or a GGUF file to a run directory or a directory in Hugging Face layout.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bd3lm_jax import lm
from bd3lm_jax.checkpoints import hf, rundir
from bd3lm_jax.checkpoints.published import ModelSpec, write
from bd3lm_jax.checkpoints.published.card import Origin, base_name, card
from bd3lm_jax.checkpoints.published.mapping import check_mask
from bd3lm_jax.checkpoints.published.tensors import is_gguf
from bd3lm_jax.config import Config
from bd3lm_jax.core import jax_settings, log, paths
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.untrusted_files import read_within
from bd3lm_jax.data.chat_template import CONFIG_FILE, SPECIAL_FILE, chat_files, chat_files_in
from bd3lm_jax.data.corpus import SPLITS
from bd3lm_jax.data.tokenizer_files import content_of
from bd3lm_jax.data.tokenizers import get_tokenizer
from bd3lm_jax.lm import LM
from bd3lm_jax.models import trunk
from bd3lm_jax.training import report

FORMATS = ("hf", "native")
CARD = "README.md"
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja",
                   GENERATION)
SIGMA = 0.5  # noise level at which a time-conditioned network is checked


@jax_settings.pinned()
def convert(source: str | os.PathLike, target: str | os.PathLike, *, form: str, dtype: str, check: int, max_shard: str,
            weights: str, tokenizer: str, length: int, allow_pickle: bool) -> dict[str, Any]:
    """The `convert` command: write the model in `source` to the new directory `target`.

    form: "hf", or "native" for a run directory. dtype: of the written parameters, a run directory has float32. check:
    compare the logits of so many random tokens before and after. max_shard: of a file, e.g. "5GB". weights: "ema" or
    "params". tokenizer: as `data.tokenizer`, for a source that brings none; "" for its own. length: tokens a row in the
    config of a run directory, 0 for the model's context; the keys that the model does not decide have their defaults.

    Returns tensors, bytes, path, dtype and format; with `check` also checked_tokens, max_difference (of the logits) and
    largest_logit. Raises UserError for wrong input; `target` is whole or not there.
    """
    if form not in FORMATS:
        raise UserError(f"format is {form!r}, expected one of {', '.join(FORMATS)}")
    target = paths.local(target, "--to")
    if is_gguf(Path(target)):
        raise UserError(f"{target}: GGUF files are read and not written: give a directory, and make a GGUF file of it "
                        "with convert_hf_to_gguf.py of llama.cpp (for a causal model)")
    if Path(target).exists():
        raise UserError(f"{target} exists and is never overwritten: choose another directory")
    source = hf.local(source)
    is_run = not hf.is_published(source)
    if is_run and form == "native":
        raise UserError(f"{source} is a run directory already: copy it, or use --format=hf")
    if form == "native" and dtype != "float32":
        raise UserError(f"dtype is {dtype!r}: a run directory keeps float32 parameters, use float32 or --format=hf")
    shard = write.parse_size(max_shard)
    with log.spinner(f"reading {source}"):
        model = lm.load(source, weights, allow_pickle=allow_pickle)
    if check > model.context:
        raise UserError(f"check is {check} tokens, expected at most {model.context}, the context of the model")
    if tokenizer:
        model = _with_tokenizer(model, source, tokenizer)
    with log.spinner(f"writing {target}"):
        if form == "hf":
            origin = (_origin(model, Path(source), weights) if is_run else
                      Origin(Path(source).name, None, None, {}, "", 0))
            written = _write_published(model, Path(source), Path(target), dtype, shard, origin)
        else:
            written = _write_run(model, Path(source), Path(target), length)
    log.note(f"{written['tensors']} tensors, {written['bytes']:,} bytes in {target}")
    result = {**written, "dtype": dtype, "format": form}
    if not check:
        return result
    with log.spinner(f"comparing the logits of {check} tokens"):
        return result | compare(model, lm.load(target, weights), check)


def _with_tokenizer(model: LM, source, spec: str) -> LM:
    if model.tokenizer is not None:
        raise UserError(f"--tokenizer={spec}: {source} brings its own tokenizer, leave it out")
    found = get_tokenizer(spec, lambda: ())
    described = _described(model)
    if found.size > described.model.vocab_size:
        raise UserError(f"--tokenizer={spec} has {found.size} ids, more than the {described.model.vocab_size} of the "
                        f"network in {source}")
    return LM(model.config, model.params, hf.with_network_mask(found, described), model.model, model.context)


def _described(model: LM) -> ModelSpec:
    return ModelSpec(model.config.model, model.config.diffusion, model.context, model.special.mask)


def _origin(model: LM, run: Path, weights: str) -> Origin:
    """What the card says of a run. The figures of its report are those of the last step and of the average if one was
    kept: of other weights none were measured."""
    config = model.run_config(str(run))
    assert model.trained is not None  # it is a run's
    found, step, train = report.read(run) or {}, model.trained.step, config.train
    measured = found.get("step") == step and (weights == "ema" or not config.optim.ema_decay)
    results = {split: figures for split, figures in found.items() if split in SPLITS} if measured else {}
    base = base_name(train.init_from) if train.init_from else ""
    return Origin(run.name, config.data, step, results, base, train.lora_rank)


def _write_published(model: LM, source: Path, target: Path, dtype: str, max_shard: int, origin: Origin) -> dict:
    described, model_type, files = _described(model), None, {}
    if origin.data is None:  # no run
        if source.is_dir():
            model_type = hf.layout_name(source)
            files = _copied(source)
    if model.tokenizer is not None and "tokenizer.json" not in files:
        names_mask = described.objective.uses_mask_token
        files |= _with_chat_template(write.tokenizer_files(model.tokenizer, names_mask), chat_files(source))
    ids = _token_ids(model) if origin.data is not None else hf.token_ids(source)
    if GENERATION not in files and ids:
        files[GENERATION] = (json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n").encode()
    size = sum(x.size for x in jax.tree.leaves(model.params))
    text = card(target.name, described, size, dtype, origin, model.tokenizer is not None)
    return hf.write_model(target, described, model.params, dtype=dtype, max_shard=max_shard, model_type=model_type,
                          files=files | {CARD: text.encode()}, token_ids=ids)


def _token_ids(model: LM) -> dict[str, int]:
    """Of a run: its end token ends texts, fills what is left of rows, and begins texts where it was trained so."""
    if model.special.end < 0:
        return {}
    begin = {"bos_token_id": model.special.end} if model.config.diffusion.begins_with_end_token else {}
    return begin | {"eos_token_id": model.special.end, "pad_token_id": model.special.end}


def _copied(source: Path) -> dict[str, bytes]:
    """Name -> content of what is copied as it is from a published checkpoint."""
    names = [name for name in TOKENIZER_FILES if (source / name).exists()]
    return {name: read_within(source, name) for name in dict.fromkeys([*names, *chat_files_in(source)])}


def _with_chat_template(files: dict[str, bytes], chat: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a tokenizer with the chat templates of its source, and with the special tokens that they write."""
    configs = [json.loads(chat.get(name, b"{}")) for name in (SPECIAL_FILE, CONFIG_FILE)]
    theirs = {key: value for config in configs if isinstance(config, dict) for key, value in config.items()}
    ours = json.loads(files.get(CONFIG_FILE, b"{}"))
    named = {key: content_of(value) for key, value in theirs.items() if key.endswith("_token") and content_of(value)}
    named |= {key: value for key, value in theirs.items() if key == "chat_template"}
    config = {CONFIG_FILE: json.dumps(named | ours, indent=2).encode()} if named or ours else {}
    return files | {name: x for name, x in chat.items() if name not in (CONFIG_FILE, SPECIAL_FILE)} | config


def _write_run(model: LM, source: Path, target: Path, length: int) -> dict:
    """A run directory of step 0, whose config has the defaults but for what the model says."""
    from bd3lm_jax.checkpoints.checkpoint import Checkpoints
    from bd3lm_jax.core.state import TrainState

    if model.tokenizer is None:
        raise UserError(f"{source} brings no tokenizer, and a run directory needs one: give --tokenizer=gpt2 or the "
                        "path of a tokenizer.json")
    check_mask(model.config.diffusion, model.special.mask)
    length = length or model.context
    objective = model.config.diffusion
    if length > model.context:
        raise UserError(f"length is {length}, expected at most {model.context}, what the model was trained on")
    if model.is_bidirectional:
        objective = model.config.at_block_size(length).diffusion
    sections = {name: {"kind": section.kind, **dataclasses.asdict(section)}
                for name, section in (("model", model.config.model), ("diffusion", objective))}
    data = {"tokenizer": str(target / rundir.TOKENIZER), "seq_len": length}
    config = Config.from_dict(sections | {"data": data}, stored=True)
    state = TrainState(step=jnp.zeros((), jnp.int32), params=model.params, ema={}, opt_state={})
    meta = {"tokenizer": model.tokenizer.identity, "config_sha256": config.sha256(), "losses": []}
    with write.atomic_directory(target) as work:
        rundir.create_or_validate(work, config, model.tokenizer)
        for name, content in chat_files(source).items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(content)
        with Checkpoints(work, 1) as checkpoints:
            checkpoints.save(0, state, meta, wait=True)
    leaves = jax.tree.leaves(model.params)
    return {"tensors": len(leaves), "bytes": sum(x.nbytes for x in leaves), "path": str(target)}


def compare(before: LM, after: LM, tokens: int) -> dict[str, float | int]:
    """Logits of one row of `tokens` random tokens under both."""
    rows = np.random.default_rng(0).integers(0, before.config.model.vocab_size, size=(2, 1, tokens))
    x0 = rows[1] if before.config.model.first_noised_layer else None
    sigma = [SIGMA] if trunk.is_time_conditioned(before.config.model) else None
    ours, theirs = (np.asarray(model.logits(rows[0], x0, sigma=sigma), np.float64) for model in (before, after))
    difference = float(np.abs(ours - theirs).max())
    log.note(f"logits of {tokens} random tokens differ by at most {difference:.3g}; the largest is "
             f"{np.abs(ours).max():.4g}")
    return {"checked_tokens": tokens, "max_difference": difference, "largest_logit": float(np.abs(ours).max())}
