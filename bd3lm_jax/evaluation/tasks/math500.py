"""MATH-500 (Lightman et al., arXiv 2305.20050): 500 test problems of MATH (Hendrycks et al., arXiv 2103.03874).

The last boxed expression must equal the answer as a text, once both are written in one way: the rules are those that
were published with MATH.
"""

import re

from bd3lm_jax.evaluation.tasks.task import Problem, Task, Verdict

OPEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\boxed (?=[^\s{$])")
WORD_END = re.compile(r"[\s$]")
DROPPED = re.compile(r"\\!|\\left|\\right|\^\\circ|\^\{\\circ\}|\\\$|\$|\\%|%|\\ |\s+|\\[,;:]|\.$")
REWRITES = (  # in this order, once spaces are gone
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\text(?:bf|it|rm)?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"(?<!\d)\.(?=\d)"), "0."),
    (re.compile(r"\\sqrt([^{\[])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac([^{\\])([^{\\])"), r"\\frac{\1}{\2}"),  # \frac12
    (re.compile(r"\\frac([^{\\])\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\{[^{}]*\})([^{\\])"), r"\1{\2}"),
    (re.compile(r"^(-?)(\d+)/(\d+)$"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"^(-?)0\.5$"), r"\1\\frac{1}{2}"),
)
NAMED = re.compile(r"^[^=]{1,2}=")  # "x = 5" means 5
GROUPED = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")  # 12,345
UNIT = re.compile(r"\\(?:text|mbox)\{ .*")  # "5 \text{ cm}"


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} of `text`, None without one that is closed."""
    found, closing, open_braces = None, {}, []  # closing: place of every { that is closed -> that of its }
    for place, sign in enumerate(text):
        if sign == "{":
            open_braces.append(place)
        elif sign == "}" and open_braces:
            closing[open_braces.pop()] = place
    for start in OPEN.finditer(text):
        if start.group().endswith(" "):  # \boxed 5
            end = WORD_END.search(text, start.end())
            found = text[start.end():end.start() if end else len(text)]
            continue
        end = closing.get(start.end() - 1)
        found = text[start.end():end] if end is not None else found
    return found


def normalise(answer: str) -> str:
    r"""One way to write an answer: no spaces, units, signs of currency and per cent; \frac{1}{2} for 1/2 and 0.5."""
    answer = DROPPED.sub("", UNIT.sub("", answer.strip()).replace("\\\\", "\\").replace("{,}", ","))
    answer = NAMED.sub("", answer)
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer.replace(",", "") if GROUPED.fullmatch(answer) else answer


def _problem(record: dict) -> Problem:
    return Problem(record.get("unique_id", ""), f"Problem:\n{record['problem']}\n\nSolution:", f" {record['solution']}",
                   normalise(record["answer"]))


def _judge(problem: Problem, completion: str) -> Verdict:
    found = last_boxed(completion)
    if found is None:
        return Verdict(False, "no answer", "")
    correct = normalise(found) == problem.answer
    return Verdict(correct, "correct" if correct else "wrong", found)


MATH500 = Task(
    name="math500",
    metric="exact_match",
    stop=("\nProblem:",),
    prompt_format="Problem:\n{problem}\n\nSolution:",
    source="test.jsonl of huggingface.co/datasets/HuggingFaceH4/MATH-500 (problem, solution, answer)",
    fields=("problem", "solution", "answer"),
    problem=_problem,
    judge=_judge,
)
