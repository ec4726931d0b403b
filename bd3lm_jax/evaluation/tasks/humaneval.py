"""HumanEval (Chen et al., arXiv 2107.03374): the body of a Python function from its signature and docstring."""

from pathlib import Path

from bd3lm_jax.evaluation.tasks.task import Problem, Task


def _problem(record: dict) -> Problem:
    return Problem(record["task_id"], record["prompt"], record["canonical_solution"],
                   {"tests": record["test"], "entry_point": record["entry_point"]})


def _program(problem: Problem, completion: str) -> list[str]:
    return [problem.prompt + completion, problem.answer["tests"], f"check({problem.answer['entry_point']})"]


HUMANEVAL = Task(
    name="humaneval",
    metric="pass@1",
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),  # those of the paper
    prompt_format="{prompt}",
    source="HumanEval.jsonl or .jsonl.gz of github.com/openai/human-eval (one is packaged)",
    fields=("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    problem=_problem,
    program=_program,
    packaged=Path(__file__).parents[2] / "data" / "resources" / "HumanEval.jsonl.gz",
)
