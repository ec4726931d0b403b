"""The likelihood of one split under a run, and what another run makes of the same documents."""

from typing import Any

from bd3lm_jax.checkpoints.hf import is_published, local
from bd3lm_jax.core import jax_settings, log
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.stats import format_interval, format_number
from bd3lm_jax.data import domains
from bd3lm_jax.likelihood import compare, estimators
from bd3lm_jax.likelihood.estimators import default_estimator
from bd3lm_jax.likelihood.evaluate import Target, open_run


@jax_settings.pinned()
def evaluate_run(workdir: str, *, split: str, data: str, estimator: str, draws: int, seed: int, weights: str,
                 batch: int, target_ci: float, max_draws: int, against: str, data_dir: str, chunks: str, stride: int,
                 first_token: str, end_token: str, block_size: int = 0, length: int = 0,
                 step: int | str = "latest") -> dict[str, Any]:
    """The `eval` command: likelihood of a split under a checkpoint of a run, by default the newest.

    data, split, data_dir: which text (`domains.open_text`). chunks, stride, first_token, end_token: what of it counts
    (`domains.convention_for`). estimator: "" for the best one. target_ci: as `Target`, 0 for none; then `draws`
    is the size of a round. block_size, length, step: as for `open_run`. against: another run whose newest checkpoint to
    compare with on the same documents, or "" (see `compare.py`). Published checkpoints have no corpus of their own:
    they need `data`.
    """
    paths = {name: local(name) for name in (workdir, against) if name}
    published_paths = [name for name, path in paths.items() if is_published(path)]
    if workdir in published_paths and not data:
        raise UserError(f"{workdir} is a published checkpoint, which brings no corpus: give --data=austen or another "
                        "text")
    if length and not published_paths:
        raise UserError(f"--length={length} is for published checkpoints: {workdir} has the length it was trained with")
    run = open_run(paths[workdir], weights, batch, block_size, length, step)._replace(workdir=workdir)
    estimators.make(estimator or default_estimator(run.config), run.config)  # refuse before any text is read
    other = open_run(paths[against], weights, batch, length=length)._replace(workdir=against) if against else None
    convention = domains.convention_for([side.config for side in (run, other) if side is not None], chunks=chunks,
                                        stride=stride, first_token=first_token, end_token=end_token)
    text_arguments = {"data": data, "split": split, "data_dir": data_dir, "convention": convention}
    text = domains.open_text(run.config, run.tokenizer, **text_arguments)
    target = Target(target_ci, max_draws) if target_ci else None
    measured = run.evaluator.measure(run.params, text.rows, estimator=estimator or default_estimator(run.config),
                                     draws=draws, seed=seed, target=target)
    result = {**text.describe(measured), "step": run.step, "config_sha256": run.config_sha256}
    show(workdir, f"{text.name}, {text.split}", result, measured.nll_by_count)
    if other is not None:
        result["against"] = compare.against(run, text, measured, other, text_arguments, draws)
        result["wall_s"] += result["against"].pop("wall_s")
    return result


def show(workdir: str, text: str, result: dict, by_count: dict) -> None:
    """Tables for people: the likelihood with both parts of its error, and by masked tokens of a block."""
    figures = (("nats/token", "nll", ".4f"), ("perplexity", "ppl", ".2f"), ("bits/byte", "bits_per_byte", ".4f"))
    log.table(f"{workdir}, {text}: {log.pluralize(result['documents'], 'document')}, {result['tokens']} tokens, "
              f"{result['estimator']}, {log.pluralize(result['draws'], 'draw')}", ("", "value", "95 % interval"),
              [(name, format_number(result[key], form), format_interval(result[f"{key}_ci95"], form))
               for name, key, form in figures])
    log.note(f"standard error of nats/token: {format_number(result['nll_document_se'], '.5f')} by the choice of "
             f"documents, {result['nll_mc_se']:.5f} by the draws")
    if "ci95_missing" in result:
        log.note(result["ci95_missing"])
    if 1 < len(by_count) <= 32:
        log.table("nats per masked token, by masked tokens in the block", [str(k) for k in by_count],
                  [[f"{nll:.3f}" for nll in by_count.values()]])
