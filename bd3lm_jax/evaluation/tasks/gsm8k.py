"""GSM8K (Cobbe et al., arXiv 2110.14168): word problems whose answer is one number."""

import re
from decimal import Decimal

from bd3lm_jax.evaluation.tasks.task import Problem, Task, Verdict

MARK = "####"  # stands before the final answer
NUMBER = re.compile(r"((?<![\w.)])-)?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)  # the hyphen of "10-5" is no sign


def final_number(text: str) -> Decimal | None:
    """The number after "####", else the last one: "-$1,234.50" is -1234.5. None without a number."""
    _, mark, after = text.partition(MARK)
    numbers = NUMBER.findall(after if mark else text)
    if not numbers:
        return None
    sign, digits = numbers[0 if mark else -1]
    return Decimal(("-" if sign else "") + digits.replace(",", ""))


def _problem(record: dict) -> Problem:
    return Problem("", f"Question: {record['question']}\nAnswer:", f" {record['answer']}",
                   final_number(record["answer"]))


def _judge(problem: Problem, completion: str) -> Verdict:
    found = final_number(completion)
    if found is None:
        return Verdict(False, "no answer", "")
    correct = found == problem.answer
    return Verdict(correct, "correct" if correct else "wrong", str(found))


GSM8K = Task(
    name="gsm8k",
    metric="exact_match",
    stop=("\nQuestion:",),
    prompt_format="Question: {question}\nAnswer:",
    source="test.jsonl of github.com/openai/grade-school-math (question, answer)",
    fields=("question", "answer"),
    problem=_problem,
    judge=_judge,
)
