"""MBPP (Austin et al., arXiv 2108.07732): a Python function from a sentence and a test, zero-shot.

The prompt is a docstring with the sentence and the first test, as for InCoder (Fried et al., arXiv 2204.05999).
"""

from bd3lm_jax.evaluation.tasks.task import Problem, Task

TEST_IDS = range(11, 511)  # of the 974 problems; the others are for prompts, training and validation


def _problem(record: dict) -> Problem | None:
    if record["task_id"] not in TEST_IDS:
        return None
    text = record.get("text") or record.get("prompt", "")  # "prompt" in the sanitised version
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports", ()))
    prompt = f'"""\n{text}\n{record["test_list"][0]}\n"""\n'
    return Problem(f"MBPP/{record['task_id']}", prompt, record["code"], [setup, *record["test_list"]])


def _program(problem: Problem, completion: str) -> list[str]:
    return [completion, *problem.answer]


MBPP = Task(
    name="mbpp",
    metric="pass@1",
    stop=("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"),
    prompt_format='"""\n{text}\n{first test}\n"""\n',
    source="mbpp.jsonl of github.com/google-research/google-research/tree/master/mbpp (task_id, text, code, "
           "test_list; task_id 11 to 510 are the test set), or the sanitised version, one record a line",
    fields=("task_id", "code", "test_list"),
    problem=_problem,
    program=_program,
)
