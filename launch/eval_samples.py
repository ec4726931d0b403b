"""Job of `eval`: quality of generated texts, beside real text of the same lengths."""

from absl import flags

from bd3lm_jax.core import paths
from launch import eval_flags
from launch.arguments import define_path

OPTIONS = ("scorer", "weights", "split", "reference", "stride", "max_tokens", "mauve", "plot")  # of QualityOptions


def define(values: flags.FlagValues) -> None:
    define_path(values, "samples", "", "generated texts: files that sample wrote, JSONL of {\"text\": ...}, or run "
                "directories, with commas between them", several=True, may_be_remote=True)
    define_path(values, "scorer", "", "of --samples: directory of an autoregressive model (or of block size 1)")
    define_path(values, "reference", "", "of --samples: real text to compare with, a file like --samples, or none; "
                "empty: --split of the scorer's own corpus", may_be_remote=True)
    flags.DEFINE_integer("max_tokens", 0, "of --samples: only the first so many tokens of each text; 0: all",
                         lower_bound=0, flag_values=values)
    flags.DEFINE_boolean("mauve", False, "of --samples: MAUVE as well (needs mauve-text and the weights of GPT-2 "
                         "large)", flag_values=values)
    define_path(values, "plot", "", "of several --samples: where to draw them; empty: quality.png beside the first")


def _run(args: flags.FlagValues) -> dict:
    from bd3lm_jax.evaluation.quality import QualityOptions, evaluate_samples

    return evaluate_samples(paths.split(args.samples, may_be_remote=True),
                            QualityOptions(**eval_flags.values_of(args, OPTIONS)))


JOB = eval_flags.Job("--samples", ("samples", *OPTIONS), lambda args: None, _run)
