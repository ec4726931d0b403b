"""The tasks by name; a new one is one file and one line here."""

from bd3lm_jax.tasks.gsm8k import GSM8K
from bd3lm_jax.tasks.humaneval import HUMANEVAL
from bd3lm_jax.tasks.math500 import MATH500
from bd3lm_jax.tasks.mbpp import MBPP

TASKS = {task.name: task for task in (HUMANEVAL, MBPP, GSM8K, MATH500)}
