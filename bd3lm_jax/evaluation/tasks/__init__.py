"""Task accuracy: does generated code pass its tests, is the final answer the right one (see docs/tasks.md)."""

from bd3lm_jax.evaluation.tasks.evaluate import TaskOptions, evaluate_task, score_completions
from bd3lm_jax.evaluation.tasks.registry import TASKS
from bd3lm_jax.evaluation.tasks.task import Problem, Task, Verdict, read_problems

__all__ = ["TASKS", "Problem", "Task", "TaskOptions", "Verdict", "evaluate_task", "read_problems", "score_completions"]
