"""Likelihood of a text under a trained model, quality of generated texts, or accuracy on a task; all with intervals.

Likelihood, with a 95 % interval over documents and draws:
  python -m launch eval --workdir=runs/tiny
  python -m launch eval --workdir=runs/tiny --split=valid --mc_samples=8
  python -m launch eval --workdir=runs/tiny --data=my_text.txt
  python -m launch eval --workdir=runs/tiny --data=sotu --context_mode=sliding --stride=64
  python -m launch eval --workdir=runs/tiny-ar,runs/tiny --data=all      # every named text, each run against the first
  python -m launch eval --workdir=runs/tiny --estimator=exact             # every mask: no Monte-Carlo error (S <= 8)
  python -m launch eval --workdir=runs/tiny --target_ci=0.1%              # draws until that part is so tight
  python -m launch eval --workdir=runs/tiny --baseline=runs/tiny-ar       # paired difference, interval and p-value
  python -m launch eval --workdir=SmolLM2-135M --data=austen --length=512 # a published checkpoint
  python -m launch eval --workdir=runs/mixed --block_size=4               # of a model trained with several
  python -m launch eval --workdir=runs/mixed --curve                      # at each of them, with calls and tokens/s
  python -m launch eval --workdir=runs/tiny --step=best                   # or a number; docs/faults.md
  python -m launch eval --workdir=runs/tiny --watch --split=valid         # every new checkpoint of a run that trains

Result: nll (nats a token), nll_ci95, nll_mc_se (draws alone), nll_document_se (documents alone), ppl, ppl_ci95,
bits_per_byte (of the scored tokens), bits_per_byte_ci95, bits_per_byte_comparable (whether the tokenizer gives every
document back), tokens, documents, ..., against (unit, comparable, difference, difference_ci95, p_value, same_masks,
...). Intervals of fewer than 3 documents are null; then ci95_missing says why.
Of --curve: rows (block_size, nll, nll_ci95, ppl, bits_per_byte, nfe_per_token, tokens_per_s), recommended (a block
size), rule (why that one), and how the texts were written that calls and tokens were counted on.
Of --watch: that of the last evaluation, ended (why it ended) and watched (a row an evaluation, as in watch.jsonl of the
run directory); docs/faults.md.

Quality of texts that `sample` wrote (python -m launch sample ... > bd4.json), beside real text of the same lengths:
  python -m launch eval --samples=bd4.json --scorer=runs/tiny-ar
  python -m launch eval --samples=bd4.json,bd16.json --scorer=runs/tiny-ar           # one table, and a plot over NFE

Result: scorer, unit (tokens of the scorer; words without one), window and stride (how long texts are scored),
max_tokens, first_token, averaging, reference (what the real text is), plot, and rows, one for each path: name, path,
samples, empty (texts without a token to score), tokens, gen_ppl (weighted by tokens), gen_ppl_sample_mean (of the
texts' perplexities), entropy (of the unigrams of a text, nats; mean over texts), each with _ci95 over texts;
entropy_below_4, distinct_1, distinct_2, distinct_3, repeated_4grams, longest_repeat, length_median, length_max,
nfe_per_token, block_size, stops, by_position (of texts that fill two windows), mauve, and reference (the same figures
of real text). Without a scorer there is no perplexity.

Accuracy on a task, by texts that the model writes:
  python -m launch eval --workdir=runs/tiny --task=humaneval --allow_code_execution
  python -m launch eval --workdir=runs/tiny --task=gsm8k --file=test.jsonl --temperature=0 --num_problems=100

Result: see docs/tasks.md.
"""

from absl import flags

from bd3lm_jax.core.errors import UserError, nearest
from launch import eval_curve, eval_flags, eval_likelihood, eval_samples, eval_task, eval_watch, processes
from launch.arguments import required

TAKES_CONFIG = False
COMPANIONS = {"watch_timeout": "watch", "nll_tolerance": "curve"}  # flag: the one that it goes with


def define(values: flags.FlagValues) -> None:
    for part in (eval_flags, eval_watch, eval_curve, eval_samples, eval_task, processes):
        part.define(values)


def main(args: flags.FlagValues) -> dict:
    return check(args).run(args)


def check(args: flags.FlagValues) -> eval_flags.Job:
    """The job. UserError for what needs no run to be seen: flags that do not go together, words that mean nothing."""
    from bd3lm_jax.data.corpus import ALL_SPLITS, SPLITS

    job = _job_of(args)
    if args.split not in (*SPLITS, ALL_SPLITS):
        raise UserError(f"unknown split '{args.split}': {nearest(args.split, SPLITS)}")
    for name in args:
        if args[name].present and name not in job.takes:
            raise UserError(f"--{name} goes with --{COMPANIONS[name]}: add it"
                            if name in COMPANIONS and job.name == eval_likelihood.NAME else
                            f"--{name} does not go with {job.name}: see --help")
    job.check(args)
    if "workdir" in job.takes:
        required(args, "workdir")
    return job


def _job_of(args: flags.FlagValues) -> eval_flags.Job:
    if args.samples and args.task:
        raise UserError("--samples and --task are two evaluations: give one of them")
    for is_chosen, job in ((args.samples, eval_samples.JOB), (args.task, eval_task.JOB), (args.watch, eval_watch.JOB),
                           (args.curve, eval_curve.JOB), (args.data == "all", eval_likelihood.SUITE)):
        if is_chosen:
            return job
    return eval_likelihood.ONE
