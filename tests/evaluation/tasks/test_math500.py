"""Boxed answers and their one way of writing, by hand."""

import pytest

from bd3lm_jax.evaluation.tasks import TASKS
from bd3lm_jax.evaluation.tasks.math500 import last_boxed, normalise


@pytest.mark.parametrize("text, found", [
    (r"so \boxed{5}.", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} and \boxed{2}", "2"),
    (r"\fbox{7}", "7"), (r"$\boxed 9$", "9"), ("nothing", None), (r"\boxed{open", None), (r"\boxed{1} \boxed{2", "1"),
    (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"), (r"\boxed {3}", "3"),
])
def test_last_boxed(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize("one, other", [
    (r"\frac12", r"\frac{1}{2}"), (r"\dfrac{3}{4}", r"\tfrac{3}{4}"), ("1/2", r"\frac{1}{2}"), ("0.5", ".5"),
    ("0.5", r"\frac{1}{2}"), (r"\sqrt3", r"\sqrt{3}"), ("x = 5", "5"), (r"90^\circ", "90"), (r"90^{\circ}", "90"),
    (r"\$12", "12"), (r"30\%", "30"), ("(1, 2)", "(1,2)"), (r"\left( 1,2 \right)", "(1,2)"), ("12,345", "12345"),
    (r"12{,}345", "12345"), (r"12,\!345", "12345"), (r"5 \text{ cm}", "5"), (r"\text{Evelyn}", "Evelyn"),
    (r"\frac1{72}", r"\frac{1}{72}"), (r"\frac{1}2", r"\frac{1}{2}"), ("7.", "7"), ("-1/3", r"-\frac{1}{3}"),
    (r"2\sqrt2", r"2\sqrt{2}"), (r"\textbf{(A)}", "(A)"),
])
def test_ways_to_write_one_answer(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize("one, other", [
    ("1", "-1"), (r"\frac{1}{2}", r"\frac{2}{1}"), ("(1,2)", "(2,1)"), ("12", "1"), (r"\sqrt{3}", "3"), ("0.51", "0.5"),
    ("x^2", "x2"), ("(1,234)", "(1234)"), (r"\pi", "pi"), ("5!", "5"),
])
def test_different_answers_stay_different(one, other):
    assert normalise(one) != normalise(other)


def test_reference_is_right_and_others_are_not():
    task = TASKS["math500"]
    problem = task.problem({"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$.", "answer": "2"})
    assert problem.prompt == "Problem:\nWhat is $1+1$?\n\nSolution:"
    assert task.judge(problem, problem.reference).outcome == "correct"
    assert task.judge(problem, r"\boxed{3}").outcome == "wrong"
    assert task.judge(problem, "2").outcome == task.judge(problem, "").outcome == "no answer"
