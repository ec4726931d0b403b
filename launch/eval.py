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

from typing import Any

from absl import flags

from bd3lm_jax.core import paths
from bd3lm_jax.core.errors import Preempted, UserError, lookup, nearest
from launch import processes
from launch.arguments import (
    define_path,
    define_seed,
    define_step,
    required,
    step_of,
)

TAKES_CONFIG = False
LIKELIHOOD = ("split", "data_dir", "context_mode", "stride", "first_token", "end_token", "estimator", "mc_samples",
              "seed", "weights", "batch_size", "max_mc_samples")  # data, baseline and target_ci as well
WATCH = ("split", "data", "data_dir", "context_mode", "stride", "first_token", "end_token", "estimator", "mc_samples",
         "seed", "weights", "batch_size", "block_size", "watch_timeout")
CURVE = ("split", "estimator", "mc_samples", "seed", "weights", "batch_size")
QUALITY = ("scorer", "weights", "split", "reference", "stride", "max_tokens", "mauve", "plot")
TASK = ("file", "baseline", "allow_code_execution", "unsafe_code_execution", "num_problems", "samples_per_problem",
        "num_fewshot", "seed", "weights")
PARAMETER_OF = {"context_mode": "chunks", "mc_samples": "draws", "max_mc_samples": "max_draws", "batch_size": "batch",
                "baseline": "against", "watch_timeout": "watch_for", "samples_per_problem": "draws_per_problem",
                "num_fewshot": "shots"}  # of the library, where a flag has another name
SAMPLER = ("sampler", "length", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "steps", "threshold",
           "block_size")  # of --task: what is given goes to LM.generate


def define(values: flags.FlagValues) -> None:
    _define_likelihood(values)
    _define_quality(values)
    _define_task(values)
    processes.define(values)


def _define_likelihood(values: flags.FlagValues) -> None:
    define_path(values, "workdir", "", "run directory, or one in Hugging Face layout or its name on the Hub (then give "
                "--data)", several=True)
    flags.DEFINE_string("split", "test", "train, valid or test", flag_values=values)
    define_path(values, "data", "", "a .txt or .jsonl file (all of it); a named text: austen, moby_dick, sotu, "
                "wikitext2, ptb, lm1b, lambada, ag_news, pubmed, arxiv; or all of these; empty: the run's own")
    define_path(values, "data_dir", "", "where NAME.txt or NAME.jsonl of named texts are")
    flags.DEFINE_string("context_mode", "independent", "independent rows, or sliding windows that score their last "
                        "tokens", flag_values=values)
    flags.DEFINE_integer("stride", 0, "of sliding windows, in tokens; 0: half a row", flag_values=values)
    flags.DEFINE_string("first_token", "", "predict or skip the first token of each row; empty: predict if possible",
                        flag_values=values)
    flags.DEFINE_string("end_token", "count", "count or skip the end of each document", flag_values=values)
    flags.DEFINE_string("estimator", "", "exact_count, importance, bernoulli, exact (block size up to 8), native, nll "
                        "(AR, block size 1); empty: the best", flag_values=values)
    flags.DEFINE_integer("mc_samples", 1, "noise draws a row, four noised copies each", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_string("target_ci", "", "more draws until the Monte-Carlo half width is this part of the nll, e.g. "
                        "0.5% or 0.005", flag_values=values)
    flags.DEFINE_integer("max_mc_samples", 64, "of --target_ci", lower_bound=1, flag_values=values)
    define_path(values, "baseline", "", "run directory of a model to compare with on the same documents")
    define_seed(values, "of the noise")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "averaged weights, or the last ones", flag_values=values)
    flags.DEFINE_integer("batch_size", 0, "rows a pass; 0: the run's own", lower_bound=0, flag_values=values)
    define_step(values)
    flags.DEFINE_boolean("watch", False, "follow a run that trains: evaluate each new checkpoint, until the last one",
                         flag_values=values)
    flags.DEFINE_float("watch_timeout", 3600.0, "of --watch: end after so many seconds without a new "
                       "checkpoint; 0: never", lower_bound=0.0, flag_values=values)
    flags.DEFINE_boolean("curve", False, "likelihood, calls and speed at every block size the model was trained with",
                         flag_values=values)
    flags.DEFINE_float("nll_tolerance", 0.01, "of --curve: the largest block size is recommended whose nll is at most "
                       "this part above the best", lower_bound=0.0, flag_values=values)


def _define_quality(values: flags.FlagValues) -> None:
    define_path(values, "samples", "", "generated texts: files that sample wrote, JSONL of {\"text\": ...}, or run "
                "directories, with commas between them", several=True)
    define_path(values, "scorer", "", "of --samples: directory of an autoregressive model (or of block size 1)")
    define_path(values, "reference", "", "of --samples: real text to compare with, a file like --samples, or none; "
                "empty: --split of the scorer's own corpus")
    flags.DEFINE_integer("max_tokens", 0, "of --samples: only the first so many tokens of each text; 0: all",
                         lower_bound=0, flag_values=values)
    flags.DEFINE_boolean("mauve", False, "of --samples: MAUVE as well (needs mauve-text and the weights of GPT-2 "
                         "large)", flag_values=values)
    define_path(values, "plot", "", "of several --samples: where to draw them; empty: quality.png beside the first")


def _define_task(values: flags.FlagValues) -> None:
    flags.DEFINE_string("task", "", "humaneval, mbpp, gsm8k or math500", flag_values=values)
    define_path(values, "file", "", "of --task: JSONL in the task's own format; empty: the packaged one (humaneval)")
    flags.DEFINE_boolean("allow_code_execution", False, "of --task: run generated code, in a sandbox (docs/tasks.md)",
                         flag_values=values)
    flags.DEFINE_boolean("unsafe_code_execution", False, "of --task: run generated code even where this machine offers "
                         "no sandbox: it can then do whatever you can do", flag_values=values)
    flags.DEFINE_integer("num_problems", 0, "of --task: only the first so many; 0: all", lower_bound=0,
                         flag_values=values)
    flags.DEFINE_integer("samples_per_problem", 1, "of --task: texts for each problem", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_integer("num_fewshot", 0, "of --task: solved problems before each prompt", lower_bound=0,
                         flag_values=values)
    flags.DEFINE_string("sampler", None, "of --task, as all flags below: see python -m launch sample --help",
                        flag_values=values)
    for name in ("length", "top_k", "steps", "block_size"):
        more = {"block_size": "; of a likelihood: one that the model was trained with",
                "length": "; of the likelihood of a published checkpoint: tokens a row; by default its context, up to "
                          "1024"}.get(name, "")
        flags.DEFINE_integer(name, None, f"of --task{more}", lower_bound=1, flag_values=values)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "threshold"):
        flags.DEFINE_float(name, None, "of --task", lower_bound=0.0, flag_values=values)


def main(args: flags.FlagValues) -> dict:
    check(args)
    if args.samples:
        return _quality(args)
    if args.task:
        return _task(args)
    if args.watch:
        return _watch(args)
    processes.join(args)
    from bd3lm_jax.core.log import spinner

    with spinner("measuring"):
        return _likelihood(args)


def check(args: flags.FlagValues) -> None:
    """UserError for what needs no run to be seen: flags that do not go together, and words that mean nothing."""
    from bd3lm_jax.data.corpus import ALL_SPLITS, SPLITS

    if args.samples and args.task:
        raise UserError("--samples and --task are two evaluations: give one of them")
    if args.split not in (*SPLITS, ALL_SPLITS):
        raise UserError(f"unknown split '{args.split}': {nearest(args.split, SPLITS)}")
    if args.samples:
        _check_only(args, "--samples", ("samples", *QUALITY))
        return
    if args.task:
        from bd3lm_jax.evaluation.tasks import TASKS

        _check_only(args, "--task", ("workdir", "task", *TASK, *SAMPLER))
        lookup(TASKS, args.task, "task")
    else:
        _check_likelihood(args)
    required(args, "workdir")


def _check_likelihood(args: flags.FlagValues) -> None:
    from bd3lm_jax.data.windows import ScoringConvention
    from bd3lm_jax.likelihood.estimators import ESTIMATORS

    _check_only(args, "a likelihood (neither --samples nor --task)",
           ("workdir", "data", "baseline", "target_ci", "block_size", "length", "curve", "nll_tolerance", "step",
            "watch", "watch_timeout", *LIKELIHOOD, *processes.FLAGS))
    if args.watch:
        _check_only(args, "--watch", ("workdir", "watch", *WATCH))
    elif args["watch_timeout"].present:
        raise UserError("--watch_timeout goes with --watch: add it")
    if args.curve:
        _check_only(args, "--curve", ("workdir", "curve", "nll_tolerance", *CURVE, *processes.FLAGS))
    if args.data == "all" and not args.watch:
        if args.baseline:
            raise UserError("--baseline does not go with --data=all: give --workdir=A,B instead")
        for name in ("block_size", "step"):
            if args[name].present:
                raise UserError(f"--{name} does not go with --data=all: give one --data at a time")
    if args.estimator:
        lookup(ESTIMATORS, args.estimator, "estimator")
    ScoringConvention(args.context_mode, args.stride, args.first_token or "skip", args.end_token)
    _fraction(args.target_ci)
    step_of(args)
    processes.check(args)


def _check_only(args: flags.FlagValues, what: str, names: tuple[str, ...]) -> None:
    """UserError for a flag that was given and means nothing here."""
    for name in args:
        if args[name].present and name not in names:
            raise UserError(f"--{name} does not go with {what}: see --help")


def _quality(args: flags.FlagValues) -> dict:
    from bd3lm_jax.evaluation.quality import evaluate_samples

    return evaluate_samples(paths.split(args.samples), **_values(args, QUALITY))


def _task(args: flags.FlagValues) -> dict:
    from bd3lm_jax.evaluation.tasks import evaluate_task
    sampler = {name: value for name, value in _values(args, SAMPLER).items() if value is not None}
    return evaluate_task(args.workdir, task=args.task, sampler=sampler, **_values(args, TASK))


def _likelihood(args: flags.FlagValues) -> dict:
    workdir, target_ci = args.workdir, _fraction(args.target_ci)
    common = _values(args, LIKELIHOOD)
    if args.curve:
        from bd3lm_jax.evaluation.block_sizes import curve

        return curve(workdir, within=args.nll_tolerance, **_values(args, CURVE))
    if args.data == "all":
        from bd3lm_jax.evaluation.suite import evaluate_suite

        return evaluate_suite(paths.split(workdir), target_ci=target_ci, length=args["length"].value or 0, **common)
    from bd3lm_jax.evaluation.evaluate_run import evaluate_run

    overrides = {name: args[name].value for name in ("block_size", "length") if args[name].value}
    if args["step"].present:
        overrides["step"] = step_of(args)
    return evaluate_run(workdir, data=args.data, against=args.baseline, target_ci=target_ci, **overrides, **common)


def _watch(args: flags.FlagValues) -> dict:
    """The result; where a signal ended it, it is said before the exit code tells of the signal."""
    from bd3lm_jax.core import log
    from bd3lm_jax.evaluation.watch import FILE, watch
    options: dict[str, Any] = {**_values(args, WATCH), "block_size": args["block_size"].value or 0}
    result = watch(args.workdir, **options)
    if result["ended"].startswith("SIG"):
        log.result(result)
        if result["ended"] == "SIGINT":
            raise KeyboardInterrupt
        raise Preempted(f"stopped by {result['ended']}; what was evaluated is in {args.workdir}/{FILE}: run the same "
                        "command again to go on")
    return result


def _values(args: flags.FlagValues, names: tuple[str, ...]) -> dict:
    return {PARAMETER_OF.get(name, name): args[name].value for name in names}


def _fraction(text: str) -> float:
    """"0.5%" or "0.005" -> 0.005; "" -> 0, no target."""
    if not text:
        return 0.0
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UserError(f"--target_ci={text}: expected a part of the nll, e.g. 0.5% or 0.005")
    return value
