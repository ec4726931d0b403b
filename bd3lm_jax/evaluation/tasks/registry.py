"""The tasks by name; a new one is one file and one line here."""

from bd3lm_jax.evaluation.tasks.gsm8k import GSM8K
from bd3lm_jax.evaluation.tasks.humaneval import HUMANEVAL
from bd3lm_jax.evaluation.tasks.math500 import MATH500
from bd3lm_jax.evaluation.tasks.mbpp import MBPP

TASKS = {task.name: task for task in (HUMANEVAL, MBPP, GSM8K, MATH500)}
