"""The accuracy of a model on a task: prompts, completions, verdicts, intervals, and a record of each of them."""

import collections
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from bd3lm_jax.checkpoints import hf
from bd3lm_jax.checkpoints.published.card import HUB_CACHE, base_name
from bd3lm_jax.core import files, jax_settings, log
from bd3lm_jax.core.errors import UserError, command_line, lookup
from bd3lm_jax.core.stats import format_interval, format_number
from bd3lm_jax.evaluation.tasks import sandbox, score
from bd3lm_jax.evaluation.tasks.registry import TASKS
from bd3lm_jax.evaluation.tasks.task import Problem, Task, Verdict, cut, read_problems

FOLDER = "tasks"  # of a run directory
RESERVED_OPTIONS = {"prompts", "num", "seed", "stop"}  # keywords of `LM.generate` that the task gives
LIMITS = sandbox.Limits(wall_s=20.0, cpu_s=10, memory_mib=1024, file_mib=16, processes=16)


class Completion(NamedTuple):
    """text: up to the first stop text. stop: why it ended, "too_long" where the prompt left no room: then it is "".
    """

    text: str
    tokens: int
    nfe: int
    stop: str


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Which problems of a task, how often, and whether generated code may run.

    file: problems, JSON lines in the task's own format ("": the packaged ones). num_problems: the first ones of the
    file, 0 for all. samples_per_problem: completions of each; the score is the mean over problems of the part that is
    right, which is without bias for pass@1. num_fewshot: problems of the file, the first ones, that stand solved before
    each prompt and are not scored. unsafe_code_execution: run generated code even where this machine offers no sandbox.
    """

    file: str = ""
    num_problems: int = 0
    samples_per_problem: int = 1
    num_fewshot: int = 0
    seed: int = 0
    weights: str = "ema"
    allow_code_execution: bool = False
    unsafe_code_execution: bool = False


@jax_settings.pinned()
def evaluate_task(workdir: str | os.PathLike, task: str, options: TaskOptions = TaskOptions(), *,
                  sampler: Mapping[str, Any] = MappingProxyType({}), baseline: str = "") -> dict[str, Any]:
    """Task accuracy of a model, as the `eval --task` command gives it.

    task: a name in TASKS. sampler: keywords of `LM.generate`; its `length` counts prompt and completion (left out: the
    model's context). baseline: another model to compare with on the same problems, or "".

    Returns `score` and `score_ci95` (over problems), what was asked and how, `outcomes` (how often what happened),
    `step` and `config_sha256` of the checkpoint (None if it is no run's) and `lines`, the JSON-lines file in
    `workdir`/tasks with every prompt, completion and verdict; of a baseline the same as `against`, with
    `difference`, `difference_ci95` and `p_value` (McNemar's test with one draw, else a paired t test).

    Raises UserError for wrong input before anything is generated: code that may not run, files, numbers.
    """
    began = time.perf_counter()
    chosen = lookup(TASKS, task, "task")
    shots, draws = options.num_fewshot, options.samples_per_problem
    _check_numbers(num_problems=(options.num_problems, 0), samples_per_problem=(draws, 1), num_fewshot=(shots, 0))
    settings = _sampler_settings(sampler)
    mechanism = _check_execution(chosen, options.allow_code_execution, options.unsafe_code_execution)
    source = read_problems(chosen, options.file)
    if shots >= len(source.problems):
        raise UserError(f"{source.path} holds {len(source.problems)} problems, of which {shots} shots leave none")
    workdir, baseline = hf.local(workdir), baseline and hf.local(baseline)
    for model in filter(None, (workdir, baseline)):
        if not Path(model).exists():
            raise UserError(f"no run directory {model}: train first ({command_line('train')} --workdir={model}), or "
                            "give a published checkpoint")
    examples, problems = source.problems[:shots], source.problems[shots:]
    problems = problems[:options.num_problems or len(problems)]
    task_settings = {"task": task, "file": source.path.name, "file_sha256": source.sha256, "problems": len(problems),
                     "draws_per_problem": draws, "prompt_format": chosen.prompt_format, "shots": shots,
                     "stop": list(chosen.stop), "sampler": settings, "seed": options.seed,
                     "weights": options.weights}
    prompts = [_prompt(examples, problem) for problem in problems]
    run = _TaskRun(chosen, problems, prompts, dict(sampler), task_settings, _folder(workdir), mechanism)
    candidate = run.measure(workdir, "")
    result = {"workdir": str(workdir), **task_settings, **candidate.summary(), "metric": chosen.metric,
              "sandbox": {"limits": LIMITS._asdict(), "mechanism": mechanism} if chosen.runs_code else None}
    if baseline:
        other = run.measure(baseline, f"-against-{Path(baseline).name}")
        found = score.paired(candidate.scores_N, other.scores_N)
        result["against"] = {"workdir": baseline, **other.summary(), "difference": found.difference,
                             "difference_ci95": [found.low, found.high], "p_value": found.p_value, "test": found.test}
    _show(result)
    return result | {"wall_s": time.perf_counter() - began}


def score_completions(task: Task, problems: Sequence[Problem], completions: Sequence[str], *,
                      allow_code_execution: bool, unsafe_code_execution: bool = False) -> list[Verdict]:
    """The verdict on each completion; completion i answers problem i (repeat a problem that has several).

    Raises UserError where programs would have to run and may not, or lengths differ; RunError if the sandbox fails.
    """
    if len(problems) != len(completions):
        raise UserError(f"{len(completions)} completions of {len(problems)} problems: expected one for each")
    return _verdicts(task, problems, completions, _check_execution(task, allow_code_execution, unsafe_code_execution))


def _verdicts(task: Task, problems: Sequence[Problem], completions: Sequence[str], mechanism: str) -> list[Verdict]:
    if task.program is None:
        assert task.judge is not None  # one of the two
        return [task.judge(problem, completion) for problem, completion in zip(problems, completions)]
    programs = [task.program(problem, completion) for problem, completion in zip(problems, completions)]
    outcomes = sandbox.run_all([(program, tests) for program, *tests in programs], LIMITS, mechanism)
    return [Verdict(outcome.passed, "passed" if outcome.passed else outcome.detail.split(":")[0], outcome.detail)
            for outcome in outcomes]


class _TaskScores(NamedTuple):
    scores_N: np.ndarray  # of the problems, mean over draws
    outcomes: dict[str, int]
    length: int  # the most tokens of prompt and completion
    trained: dict[str, Any]  # step and config_sha256 of the checkpoint
    path: Path

    def summary(self) -> dict[str, Any]:
        mean, low, high = score.mean_interval(self.scores_N)
        return {"score": mean, "score_ci95": [low, high], "outcomes": self.outcomes, "length": self.length,
                **self.trained, "lines": str(self.path)}


class _TaskRun(NamedTuple):
    """What all models are asked."""

    task: Task
    problems: list[Problem]
    prompts: list[str]
    sampler: dict[str, Any]
    task_settings: dict[str, Any]
    folder: Path
    mechanism: str  # of the sandbox, "" where no code is run

    def measure(self, workdir: str | os.PathLike, suffix: str) -> _TaskScores:
        """Load a model, let it complete all prompts, judge, and write the lines."""
        from bd3lm_jax.lm import load

        draws = self.task_settings["draws_per_problem"]
        lm = load(str(workdir), self.task_settings["weights"])
        length = self.sampler.get("length", lm.context)
        completions = self._complete(lm, workdir, length)
        problems = [problem for problem in self.problems for _ in range(draws)]
        verdicts = _verdicts(self.task, problems, [completion.text for completion in completions], self.mechanism)
        lines = [{"problem": problem.id, "draw": i % draws, "correct": verdict.correct, "outcome": verdict.outcome,
                  "detail": verdict.detail, "prompt": self.prompts[i // draws], "completion": completion.text,
                  "tokens": completion.tokens, "nfe": completion.nfe, "stop": completion.stop}
                 for i, (problem, completion, verdict) in enumerate(zip(problems, completions, verdicts))]
        settings = json.dumps(self.task_settings, sort_keys=True, default=str)
        path = self.folder / f"{self.task.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}{suffix}.jsonl"
        with files.errors(path, "give another run directory"):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            files.write(path, text.encode(errors="replace"))
        scores_N = np.array([verdict.correct for verdict in verdicts], np.float64).reshape(-1, draws).mean(1)
        outcomes = collections.Counter("too long" if completion.stop == "too_long" else verdict.outcome
                                       for completion, verdict in zip(completions, verdicts))
        trained = lm.trained._asdict() if lm.trained else {"step": None, "config_sha256": None}
        return _TaskScores(scores_N, dict(outcomes.most_common()), length, trained, path)

    def _complete(self, lm: Any, workdir: str | os.PathLike, length: int) -> list[Completion]:
        """Completions of all prompts, the draws of a prompt one after the other."""
        if lm.tokenizer is None:
            raise UserError(f"{workdir} has no tokenizer, which a task needs to write its prompts")
        task_settings, draws = self.task_settings, self.task_settings["draws_per_problem"]
        settings = {**self.sampler, "length": length}
        sizes = [len(lm.tokenizer.encode(prompt)) for prompt in self.prompts]
        fitting = [i for i, size in enumerate(sizes) if size < length]
        if not fitting:
            raise UserError(f"no prompt of {self.task.name} leaves room in {length} tokens for {workdir}: "
                            f"the shortest of {len(sizes)} has {min(sizes)}; use a model with a longer context")
        log.note(f"{workdir}: {len(fitting)} of {len(sizes)} prompts leave room in {length} tokens; writes {draws} "
                 "completion(s) of each")
        samples = lm.generate([self.prompts[i] for i in fitting], num=draws, seed=task_settings["seed"],
                              stop=self.task.stop, **settings)
        found = [[Completion("", 0, 0, "too_long")] * draws for _ in self.prompts]
        for place, i in enumerate(fitting):
            found[i] = [Completion(cut(sample.text, self.task.stop), len(sample.tokens), sample.nfe, sample.stop)
                        for sample in samples[place * draws:(place + 1) * draws]]
        return [completion for row in found for completion in row]


def _check_execution(task: Task, allowed: bool, unsafe: bool) -> str:
    """The mechanism that confines programs; "" where none are run. UserError if they may not or cannot be."""
    if not task.runs_code:
        return ""
    if not allowed and not unsafe:
        raise UserError(f"{task.name} runs programs that the model wrote: give --allow_code_execution if they may run "
                        "here, in a sandbox (docs/tasks.md says what it stops and what not)")
    mechanism = sandbox.choose(LIMITS, unsafe)
    if mechanism == sandbox.UNSAFE:
        log.note("warning: this machine offers no sandbox: generated programs run as you, and can do whatever you can")
    return mechanism


def _sampler_settings(sampler: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the sampler, also those that were not given. UserError for unknown ones."""
    from bd3lm_jax.generation.options import make_options

    if reserved := RESERVED_OPTIONS & sampler.keys():
        raise UserError(f"sampler holds {', '.join(sorted(reserved))}, which the task decides: leave it out")
    options_given = {name: value for name, value in sampler.items() if name != "length"}
    options = vars(make_options(**options_given))
    return {
        "length": sampler.get("length"), **{name: options[name]
                                            for name in options if name not in RESERVED_OPTIONS}
    }


def _prompt(examples: Sequence[Problem], problem: Problem) -> str:
    return "".join(f"{example.prompt}{example.reference.rstrip()}\n\n" for example in examples) + problem.prompt


def _check_numbers(**numbers: tuple[int, int]) -> None:
    """name=(value, least)"""
    for name, (value, least) in numbers.items():
        if value < least:
            raise UserError(f"{name} is {value}, expected at least {least}")


def _folder(workdir: str | os.PathLike) -> Path:
    """In a run directory; those of a GGUF file or of a model of the Hub's cache are in the working directory."""
    path = Path(workdir)
    is_outside_run = path.is_file() or any(part.startswith(HUB_CACHE) for part in path.absolute().parts)
    folder = Path(FOLDER) / base_name(str(path)).replace("/", "--") if is_outside_run else path / FOLDER
    with files.errors(f"{folder}, where completions are kept", "change its permissions", work_started=False):
        folder.mkdir(parents=is_outside_run, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write in {folder}, where completions are kept: change its permissions")
    return folder


def _show(result: dict[str, Any]) -> None:
    rows = []
    for side in filter(None, (result, result.get("against"))):
        outcomes = ", ".join(f"{name} {count}" for name, count in side["outcomes"].items())
        rows.append((side["workdir"], f"{side['score']:.1%}", format_interval(side["score_ci95"], ".1%"), outcomes))
    log.table(f"{result['task']}: {log.pluralize(result['problems'], 'problem')}, "
              f"{log.pluralize(result['draws_per_problem'], 'draw')} each",
              ("model", result["metric"], "95 % interval", "outcomes"), rows)
    if "against" in result:
        other = result["against"]
        interval = format_interval(other["difference_ci95"], "+.1%")
        log.note(f"difference {other['difference']:+.1%}, 95 % interval {interval}, "
                 f"p = {format_number(other['p_value'], '.2g')} ({other['test']})")
