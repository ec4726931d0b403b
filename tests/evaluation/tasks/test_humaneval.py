"""The packaged problems: their own solutions are all right, nothing is right by being empty."""

import sys

import pytest

from bd3lm_jax.evaluation.tasks import TASKS, read_problems, score_completions
from bd3lm_jax.evaluation.tasks.task import cut

HUMANEVAL = TASKS["humaneval"]
PROBLEMS = read_problems(HUMANEVAL, "").problems
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run only on Linux")


def verdicts(problems, completions):
    found = score_completions(HUMANEVAL, problems, completions, allow_code_execution=True,
                              unsafe_code_execution=True)  # these programs are our own
    return [verdict.correct for verdict in found]


@pytest.mark.parametrize("problems", [PROBLEMS[::8], pytest.param(PROBLEMS, marks=pytest.mark.ci_slow)],
                         ids=["every eighth", "all"])
def test_solutions_score_one_and_empty_answers_zero(problems):
    solutions = [cut(problem.reference, HUMANEVAL.stop) for problem in problems]
    assert all(verdicts(problems, solutions))
    assert not any(verdicts(problems, [""] * len(problems)))


def test_there_are_164_problems():
    assert len(PROBLEMS) == len({problem.id for problem in PROBLEMS}) == 164


def test_another_problems_solution_is_wrong():
    problems = PROBLEMS[:6]
    others = [problem.reference for problem in problems[1:] + problems[:1]]
    assert not any(verdicts(problems, others))


def test_constants_and_fakes_do_not_pass():
    fakes = ["    return None\n", "    return True\n", "    import sys; sys.exit(0)\n",
             "    pass\nprint('OK')\nexit()\n", "    pass\n\ndef check(candidate): pass\n"]
    assert not any(verdicts(PROBLEMS[:1] * len(fakes), fakes))
