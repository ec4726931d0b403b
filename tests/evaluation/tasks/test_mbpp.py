"""Records of both versions of MBPP."""

import json
import sys

import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.evaluation.tasks import TASKS, read_problems, score_completions

MBPP = TASKS["mbpp"]
TESTS = ["assert area(2) == math.pi * 4", "assert area(0) == 0"]
CODE = "import math\r\ndef area(r):\r\n  return math.pi * r * r"
FULL = {"task_id": 11, "text": "Write a function.", "code": CODE, "test_list": TESTS, "test_setup_code": "",
        "challenge_test_list": []}
SANITISED = {"task_id": 510, "prompt": "Write a function.", "code": CODE, "test_list": TESTS,
             "test_imports": ["import math"], "source_file": "x"}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_only_the_test_set_counts(tmp_path):
    file = write(tmp_path / "mbpp.jsonl", FULL | {"task_id": 10}, FULL, SANITISED, FULL | {"task_id": 511})
    problems = read_problems(MBPP, file).problems
    assert [problem.id for problem in problems] == ["MBPP/11", "MBPP/510"]
    assert {problem.prompt for problem in problems} == {f'"""\nWrite a function.\n{TESTS[0]}\n"""\n'}
    with pytest.raises(UserError, match="no test problem"):
        read_problems(MBPP, write(tmp_path / "train.jsonl", FULL | {"task_id": 600}))


ALLOWED = {"allow_code_execution": True, "unsafe_code_execution": True}  # these programs are our own


@pytest.mark.skipif(sys.platform != "linux", reason="programs run only on Linux")
def test_solutions_score_one_and_empty_answers_zero(tmp_path):
    problems = read_problems(MBPP, write(tmp_path / "mbpp.jsonl", FULL, SANITISED)).problems
    completions = [CODE, "", "def area(r): return 4 * 3.141592653589793 if r else 0", "def area(r): return 0"]
    found = [[verdict.correct for verdict in score_completions(MBPP, [problem] * 4, completions, **ALLOWED)]
             for problem in problems]
    # The sanitised version brings the imports of its tests, the full one leaves them to the program.
    assert found == [[True, False, False, False], [True, False, True, False]]
