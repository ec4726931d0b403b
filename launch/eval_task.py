"""Job of `eval`: accuracy on a task, by texts that the model writes."""

from absl import flags

from bd3lm_jax.core.errors import lookup
from launch import eval_flags
from launch.arguments import define_path

OPTIONS = ("file", "num_problems", "samples_per_problem", "num_fewshot", "seed", "weights", "allow_code_execution",
           "unsafe_code_execution")  # of TaskOptions
SAMPLER = ("sampler", "length", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "steps", "threshold",
           "block_size")  # what is given goes to LM.generate


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("task", "", "humaneval, mbpp, gsm8k or math500", flag_values=values)
    define_path(values, "file", "", "of --task: JSONL in the task's own format; empty: the packaged one (humaneval)",
                may_be_remote=True)
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


def _check(args: flags.FlagValues) -> None:
    from bd3lm_jax.evaluation.tasks import TASKS

    lookup(TASKS, args.task, "task")


def _run(args: flags.FlagValues) -> dict:
    from bd3lm_jax.evaluation.tasks import TaskOptions, evaluate_task

    sampler = {name: value for name, value in eval_flags.values_of(args, SAMPLER).items() if value is not None}
    return evaluate_task(args.workdir, args.task, TaskOptions(**eval_flags.values_of(args, OPTIONS)), sampler=sampler,
                         baseline=args.baseline)


JOB = eval_flags.Job("--task", ("workdir", "task", "baseline", *OPTIONS, *SAMPLER), _check, _run)
