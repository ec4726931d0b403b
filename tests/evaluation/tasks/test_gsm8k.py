"""Final numbers, by hand."""

import pytest

from bd3lm_jax.evaluation.tasks import TASKS, Problem
from bd3lm_jax.evaluation.tasks.gsm8k import final_number

RECORD = {"question": "How many?", "answer": "She has 48/2 = <<48/2=24>>24.\n#### 1,072"}


@pytest.mark.parametrize("text, number", [
    ("so it is 18.\n#### 18", 18), ("#### 18 and then 20", 18), ("1 and 2 and 3", 3), ("#### 1,072", 1072),
    ("It costs $1,234.50.", 1234.5), ("#### -5", -5), ("it fell by -$3", -3), ("10-5", 5), ("x=.5", 0.5),
    ("between 3 and 18.00", 18), ("$20.", 20), ("no number", None), ("", None), ("3 ####", None), ("12,", 12),
    ("(3)-2", 2), ("007", 7),
])
def test_final_number(text, number):
    assert final_number(text) == number


def test_endless_digits_are_a_number():
    assert final_number("9" * 5000) == final_number("#### 0" + "9" * 5000)
    assert final_number("9" * 5000) != final_number("9" * 4999)


def test_reference_is_right_and_others_are_not():
    task = TASKS["gsm8k"]
    problem = task.problem(RECORD)
    assert problem.prompt == "Question: How many?\nAnswer:" and isinstance(problem, Problem)
    assert task.judge(problem, problem.reference).outcome == "correct"
    assert task.judge(problem, " I think 1072.0 of them").correct
    assert task.judge(problem, " 1072 of 2").outcome == "wrong"
    assert task.judge(problem, "").outcome == "no answer"
