"""What a run says when it ends: likelihood beside count models, samples, plots. People read it on stderr.

The likelihoods with their intervals stay in the run directory as report.json.
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bd3lm_jax.config import Config
from bd3lm_jax.core import checksummed, files, migrations, plots
from bd3lm_jax.core.errors import UserError, command_line
from bd3lm_jax.core.log import note, note_once, pluralize, save, spinner, table
from bd3lm_jax.core.stats import format_interval, format_number
from bd3lm_jax.data import textmetrics
from bd3lm_jax.data.corpora import join_documents, load_documents
from bd3lm_jax.data.token_bytes import RowsWithBytes, count_lossy_documents, warn_if_lossy
from bd3lm_jax.likelihood import paired
from bd3lm_jax.parallel import distributed

REPORT = "report.json"
SETTINGS = ("mc_samples", "report_rows", "num_samples", "sample_length")  # of the section eval
BYTE_ORDERS = (3, 4, 5)
COUNTED_TOKENS = 20_000_000  # of a split up to which count models sort it, and all documents are decoded again


def write_report(run: Any, weights: Any, valid: dict, evaluator: Any) -> None:
    """The report after `train`: valid (and, for the embedded corpus, test) beside count models, samples, plots.

    valid is {} for a model without a bound. Of many processes all call it, and the first one writes."""
    splits = {"valid": (run.valid_rows, valid)} if valid else {}
    config = run.config
    if not valid:
        note(f"an objective of kind '{config.diffusion.kind}' has no bound on the likelihood: none is reported")
    if valid and config.data.source == "austen":
        rows = distributed.process0_first(lambda: _test_rows(run))
        with spinner("measuring the test split"):
            estimate = evaluator.run(weights, rows, estimator=valid["estimator"], draws=config.eval.mc_samples,
                                     seed=config.seed, num_rows=config.eval.report_rows)
            estimate |= evaluator.autoregressive_summary(weights, rows, config.eval.report_rows)
        splits["test"] = (rows, estimate)
    if jax.process_index() > 0:
        return
    for split, (rows, estimate) in list(splits.items()):
        _likelihood_table(run, split, rows, estimate)
        if rows.meta["tokens"] <= COUNTED_TOKENS:
            changed = count_lossy_documents(load_documents(config.data, split), run.tokenizer)
            warn_if_lossy(changed, rows.meta["documents"], split)
            splits[split] = rows, estimate | {"bits_per_byte_comparable": not changed, "changed_documents": changed}
    if valid and len(valid["nll_by_count"]) > 1:
        points = zip(*sorted(valid["nll_by_count"].items()))
        plots.nll_by_count(Path(run.workdir) / "plots" / "nll_by_count.png", *points)
    plots.loss_curve(run.workdir)
    if config.adaptive_noise.changes_distribution:
        plots.noise_over_steps(run.workdir)
    if config.eval.num_samples and jax.process_count() > 1:
        note(f"no samples of a run of many processes: {command_line('sample')} --workdir={run.workdir}")
    elif config.eval.num_samples:
        _samples(run, weights)
    numbers = {split: {key: value for key, value in estimate.items() if key != "wall_s"}
               for split, (_, estimate) in splits.items()}
    settings = {"settings": _settings(config)}
    save(Path(run.workdir) / REPORT, {"step": config.train.steps, **numbers, **settings})  # last: the run is finished


def read_finished_report(run: Any) -> dict | None:
    """The stored report of a run at its last step, which people are told of, if it was made with the present settings;
    else None."""
    path, steps = Path(run.workdir), run.config.train.steps
    stored = read(path)
    if not stored or stored["step"] != steps or "valid" in stored and not (path / paired.DOCUMENTS).exists():
        return None
    if stored.get("settings") != _settings(run.config):
        note(f"{path} is finished, step {steps}; its report is made again: the stored one is of other settings")
        return None
    found = [f"{split} nll {stored[split]['nll']:.4f}, {stored[split]['bits_per_byte']:.3f} bits per byte"
             for split in ("valid", "test") if split in stored]
    note(f"{path} is finished, step {steps}: {'; '.join(found) or 'without a bound'} (of {REPORT}, with plots/ and "
         f"samples/ beside it). Delete {path / REPORT} to make the report again, or raise train.steps to train on")
    return stored


def _settings(config: Config) -> dict:
    """What decides the report of a run beside its weights."""
    by_first_name = {migrations.first_name(f"eval.{name}").partition(".")[2]: getattr(config.eval, name)
                     for name in SETTINGS}
    return {"config_sha256": config.sha256(), **by_first_name}


def read(workdir: str | os.PathLike) -> dict | None:
    """`{"step", "valid": {"nll", "nll_ci95", ...}, "test": ..., "settings"}` of a run trained to its end, else None.

    A damaged one is told of and counts as none: training, which has no step left to do, writes it anew.
    """
    path = Path(workdir) / REPORT
    if not path.exists():
        return None
    try:
        found = checksummed.verify_checksum(path.read_bytes())
        is_valid = type(found.get("step")) is int and all(type(found[name]) is dict for name in found if name != "step")
    except checksummed.ChecksumError:
        is_valid = False
    if not is_valid:
        note_once(f"warning: {path} is damaged and passed over: the command that trained the run writes it again")
    return found if is_valid else None


def _test_rows(run):
    from bd3lm_jax.data.prepare import prepare

    return RowsWithBytes(prepare(run.config.data, "test", run.config.block_size, run.tokenizer), run.tokenizer)


def _likelihood_table(run, split: str, rows, estimate: dict) -> None:
    per_token = rows.meta["bytes"] * np.log(2) / rows.meta["tokens"]
    modes = [("this model", "")] + [("its autoregressive mode", "ar_")] * ("ar_nll" in estimate)
    lines = [(name, format_number(estimate[f"{mode}bits_per_byte"], ".3f"),
              format_interval(estimate[f"{mode}bits_per_byte_ci95"], ".3f"),
              format_number(estimate[f"{mode}nll"], ".4f"), format_number(estimate[f"{mode}ppl"], ".1f"))
             for name, mode in modes]
    try:
        with spinner(f"counting models for comparison, {split}"):
            count_models = _count_models(run, split, rows)
    except UserError as error:
        note(f"no count models: {error}")
        count_models = {}
    lines += [(name, f"{bits:.3f}", "", f"{bits * per_token:.4f}", f"{np.exp(bits * per_token):.1f}")
              for name, bits in count_models.items()]
    kind = "NLL" if estimate["estimator"] == "nll" else "bound on the NLL"
    table(f"{split}: {kind}, {pluralize(estimate['documents'], 'document')}, {estimate['tokens']} tokens",
          ("model", "bits/byte", "95 % interval", "nats/token", "perplexity"), lines)
    if "ci95_missing" in estimate:
        note(estimate["ci95_missing"])


def _count_models(run, split: str, rows) -> dict[str, float]:
    """Bits per byte of models that only count, trained on the training split."""
    if run.config.data.source == "sft":
        raise UserError("the model is measured on answers alone")
    if run.config.eval.report_rows:
        raise UserError("the model is measured on the first rows alone, eval.report_rows="
                        f"{run.config.eval.report_rows}")
    if run.rows["train"].meta["tokens"] > COUNTED_TOKENS:
        raise UserError(f"the training split has more than {COUNTED_TOKENS // 10**6} million tokens")
    train, test, vocab, size = run.rows["train"].stream(), rows.stream(), run.tokenizer.size, rows.meta["bytes"]
    result = {"unigram of its tokens": textmetrics.unigram_bits_per_byte(train, test, vocab, size),
              "bigram of its tokens": textmetrics.bigram_bits_per_byte(train, test, vocab, size)}
    train_bytes, test_bytes = (join_documents(load_documents(run.config.data, name)) for name in ("train", split))
    for order in BYTE_ORDERS:
        result[f"byte {order}-gram"] = textmetrics.byte_ngram_bits_per_byte(train_bytes, test_bytes, order)
    return result


def _samples(run, weights) -> None:
    """A few generated texts, shown and kept in samples/."""
    from bd3lm_jax.lm import LM

    if jax.default_backend() == "cpu":  # simulated devices share few threads, which collectives in a loop can starve
        weights = jax.device_put(weights, jax.local_devices()[0])
    lm = LM(run.config, weights, run.tokenizer, run.program.model, run.config.data.seq_len)
    length = min(run.config.eval.sample_length, lm.context)
    with spinner("writing samples"):
        samples = lm.generate(num=run.config.eval.num_samples, length=length, seed=run.config.seed)
    texts = [sample.text or "" for sample in samples]
    note(f"{pluralize(len(texts), 'sample')}:")
    for text in texts:
        note("  " + text.replace("\n", "\n  "))
        note("  --")
    path = Path(run.workdir) / "samples"
    path.mkdir(exist_ok=True)
    files.write(path / f"step_{run.config.train.steps}.txt", ("\n--\n".join(texts) + "\n").encode(errors="replace"))
    note(f"samples: {path / f'step_{run.config.train.steps}.txt'}")
