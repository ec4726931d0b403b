"""What the jobs of `eval` share: what a job is, the flags of several of them, and the values these make."""

from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from bd3lm_jax.core.errors import UserError
from launch import processes
from launch.arguments import define_path, define_seed, define_step, step_of

TEXT = ("data", "split", "data_dir", "context_mode", "stride", "first_token", "end_token")  # fields of TextOptions
ESTIMATOR = ("estimator", "mc_samples", "seed")
WEIGHTS = ("weights", "batch_size")
LIKELIHOOD = ("workdir", *TEXT, *ESTIMATOR, "target_ci", "max_mc_samples", *WEIGHTS, "block_size", "length", "step",
              "baseline", *processes.FLAGS)


class Job(NamedTuple):
    """One of the evaluations. name: of it in messages. takes: all its flags. check: UserError for values of them
    that mean nothing, before anything is loaded. run: the result of the command."""

    name: str
    takes: tuple[str, ...]
    check: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues], dict]


def values_of(args: flags.FlagValues, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: args[name].value for name in names}


def define(values: flags.FlagValues) -> None:
    define_path(values, "workdir", "", "run directory, or one in Hugging Face layout or its name on the Hub (then give "
                "--data)", several=True)
    _define_text(values)
    _define_estimator(values)
    define_path(values, "baseline", "", "run directory of a model to compare with on the same documents")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "averaged weights, or the last ones", flag_values=values)
    flags.DEFINE_integer("batch_size", 0, "rows a pass; 0: the run's own", lower_bound=0, flag_values=values)
    define_step(values)


def _define_text(values: flags.FlagValues) -> None:
    flags.DEFINE_string("split", "test", "train, valid or test", flag_values=values)
    define_path(values, "data", "", "a .txt or .jsonl file (all of it); a named text: austen, moby_dick, sotu, "
                "wikitext2, ptb, lm1b, lambada, ag_news, pubmed, arxiv; or all of these; empty: the run's own",
                may_be_remote=True)
    define_path(values, "data_dir", "", "where NAME.txt or NAME.jsonl of named texts are")
    flags.DEFINE_string("context_mode", "independent", "independent rows, or sliding windows that score their last "
                        "tokens", flag_values=values)
    flags.DEFINE_integer("stride", 0, "of sliding windows, in tokens; 0: half a row", flag_values=values)
    flags.DEFINE_string("first_token", "", "predict or skip the first token of each row; empty: predict if possible",
                        flag_values=values)
    flags.DEFINE_string("end_token", "count", "count or skip the end of each document", flag_values=values)


def _define_estimator(values: flags.FlagValues) -> None:
    flags.DEFINE_string("estimator", "", "exact_count, importance, bernoulli, exact (block size up to 8), native, nll "
                        "(AR, block size 1); empty: the best", flag_values=values)
    flags.DEFINE_integer("mc_samples", 1, "noise draws a row, four noised copies each", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_string("target_ci", "", "more draws until the Monte-Carlo half width is this part of the nll, e.g. "
                        "0.5% or 0.005", flag_values=values)
    flags.DEFINE_integer("max_mc_samples", 64, "of --target_ci", lower_bound=1, flag_values=values)
    define_seed(values, "of the noise")


def check(args: flags.FlagValues) -> None:
    """UserError for values of a likelihood that mean nothing."""
    from bd3lm_jax.core.errors import lookup
    from bd3lm_jax.data.windows import ScoringConvention
    from bd3lm_jax.likelihood.estimators import ESTIMATORS

    if args.estimator:
        lookup(ESTIMATORS, args.estimator, "estimator")
    ScoringConvention(args.context_mode, args.stride, args.first_token or "skip", args.end_token)
    _target_fraction(args.target_ci)
    step_of(args)
    processes.check(args)


def options_of(args: flags.FlagValues) -> dict[str, Any]:
    """The text, the estimator and the model of a likelihood, as keywords of the library."""
    from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions, Target, TextOptions

    ci = _target_fraction(args.target_ci)
    target = Target(ci, args.max_mc_samples) if ci else None
    return {"text": TextOptions(**values_of(args, TEXT)),
            "estimator": EstimatorOptions(args.estimator, args.mc_samples, args.seed, target),
            "model": ModelOptions(args.weights, args.batch_size, args.block_size or 0, args.length or 0, step_of(args))}


def _target_fraction(text: str) -> float:
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
