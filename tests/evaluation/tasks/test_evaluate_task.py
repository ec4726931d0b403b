"""The whole evaluation, with a model that says what it is told to."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from bd3lm_jax.checkpoints import hf
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.evaluation.tasks import TASKS, TaskOptions, evaluate_task, read_problems, score, score_completions
from bd3lm_jax.lm import CheckpointId

SAMPLER = {"temperature": 0.0}


def evaluate(run, file, task="gsm8k", sampler=SAMPLER, baseline="", **options):
    return evaluate_task(run, task, TaskOptions(file=file, **{"seed": 3} | options), sampler=sampler, baseline=baseline)


linux = pytest.mark.skipif(sys.platform != "linux", reason="programs run only on Linux")


class Said(NamedTuple):
    text: str
    tokens: list
    nfe: int
    stop: str


class FakeLM:
    """Answers by the prompt; a token is a letter."""

    context, trained = 200, CheckpointId(7, "abc")
    tokenizer = type("Letters", (), {"encode": staticmethod(list)})

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def generate(self, prompts, *, num, length, stop, seed, **sampler):
        self.asked.append({"prompts": prompts, "num": num, "length": length, "stop": stop, "seed": seed, **sampler})
        return [Said(self.answers(prompt, draw), [1, 2], 5, "length") for prompt in prompts for draw in range(num)]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """`models(name=answers, ...)` makes run directories that load as fake models."""
    made = {}

    def make(**answers):
        for name, function in answers.items():
            (tmp_path / name).mkdir()
            made[str(tmp_path / name)] = FakeLM(function)
        return list(made)

    monkeypatch.setattr("bd3lm_jax.lm.load", lambda path, weights: made[path])
    make.lms = made
    return make


@pytest.fixture
def file(tmp_path):
    """Eight problems; the answer to "q3" is 3."""
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"think\n#### {i}"}) + "\n" for i in range(8)))
    return str(path)


def test_gguf_files_and_models_of_the_hub_keep_their_lines_in_the_working_directory(tmp_path, monkeypatch, file):
    lm = FakeLM(lambda prompt, draw: "#### 0")
    monkeypatch.setattr("bd3lm_jax.lm.load", lambda path, weights: lm)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.GGUF").write_bytes(b"")
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(hf, "local", lambda path: str(snapshot) if path == "org/name" else path)
    for model, place in (("model.GGUF", "tasks/model.GGUF"), ("org/name", "tasks/org--name")):
        result = evaluate_task(model, "gsm8k", TaskOptions(file=file))
        assert str(Path(result["lines"]).parent) == place and Path(result["lines"]).exists()
        assert result["score"] == 1 / 8
    assert not list(snapshot.iterdir())


def number(prompt):
    return int(prompt.rsplit("q", 1)[1][0])


def lines(result):
    with open(result["lines"], encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_exact_match_is_counted_with_its_interval(models, file):
    [run] = models(run=lambda prompt, _: f" {number(prompt)}\nQuestion: 99" if number(prompt) < 3 else "no idea")
    result = evaluate(run, file)
    assert result["score"] == 3 / 8 and result["score_ci95"] == list(score.wilson_interval(3, 8)[1:])
    assert result["outcomes"] == {"no answer": 5, "correct": 3} and result["metric"] == "exact_match"
    assert result["sampler"]["temperature"] == 0.0 and result["sampler"]["top_p"] is None
    assert (result["step"], result["config_sha256"]) == (7, "abc")
    assert result["seed"] == 3 and result["length"] == FakeLM.context
    assert result["prompt_format"] == "Question: {question}\nAnswer:" and result["stop"] == ["\nQuestion:"]
    kept = lines(result)
    assert [line["completion"] for line in kept[2:4]] == [" 2", "no idea"]  # cut at the stop text
    assert [line["correct"] for line in kept] == [True] * 3 + [False] * 5
    assert kept[1]["problem"] == "gsm8k/2" and kept[1]["prompt"] == "Question: q1\nAnswer:" and kept[1]["nfe"] == 5
    asked, = models.lms[run].asked
    assert asked["seed"] == 3 and asked["temperature"] == 0.0 and asked["stop"] == ("\nQuestion:",)
    json.dumps(result)


def test_draws_are_averaged_within_problems(models, file):
    [run] = models(run=lambda prompt, draw: f"{number(prompt) if draw < number(prompt) else -1}")
    result = evaluate(run, file, samples_per_problem=4, num_problems=4)
    assert result["score"] == pytest.approx((0 + 1 + 2 + 3) / 16) and result["problems"] == 4
    assert result["score_ci95"] == list(score.mean_interval([0, 0.25, 0.5, 0.75])[1:])
    assert [(line["problem"], line["draw"]) for line in lines(result)][3:6] == [
        ("gsm8k/1", 3), ("gsm8k/2", 0), ("gsm8k/2", 1)]


def test_models_are_compared_problem_by_problem(models, file):
    run, other = models(run=lambda prompt, _: str(number(prompt)),
                        other=lambda prompt, _: str(number(prompt) if number(prompt) < 2 else -1))
    result = evaluate(run, file, baseline=other)
    found = result["against"]
    assert (result["score"], found["score"], found["difference"]) == (1.0, 0.25, 0.75)
    assert found["p_value"] == pytest.approx(2 / 2**6) and found["test"] == "exact McNemar"
    assert found["difference_ci95"][0] > 0 and found["lines"] != result["lines"]
    assert [line["correct"] for line in lines(found)] == [True] * 2 + [False] * 6


def test_shots_stand_before_the_prompt_and_are_not_scored(models, file):
    [run] = models(run=lambda prompt, _: str(number(prompt)))
    result = evaluate(run, file, num_fewshot=2)
    assert result["problems"] == 6 and result["score"] == 1.0 and result["shots"] == 2
    assert lines(result)[0]["prompt"] == ("Question: q0\nAnswer: think\n#### 0\n\nQuestion: q1\nAnswer: think\n#### 1"
                                          "\n\nQuestion: q2\nAnswer:")


def test_prompts_without_room_count_as_wrong(models, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"question": question, "answer": "#### 1"}) + "\n"
                                              for question in ("short", "x" * 300)))
    [run] = models(run=lambda prompt, _: "1")
    result = evaluate(run, str(tmp_path / "a.jsonl"))
    assert result["score"] == 0.5 and result["outcomes"] == {"correct": 1, "too long": 1}
    assert models.lms[run].asked[0]["prompts"] == ["Question: short\nAnswer:"]
    with pytest.raises(UserError, match="no prompt of gsm8k leaves room in 10 tokens"):
        evaluate(run, str(tmp_path / "a.jsonl"), sampler={"length": 10})


@linux
def test_programs_are_run(models):
    solutions = {problem.prompt: problem.reference for problem in read_problems(TASKS["humaneval"], "").problems}
    [run] = models(run=lambda prompt, draw: solutions[prompt] + "\n# more" if draw else "    exit()")
    models.lms[run].context = 10000
    result = evaluate(run, "", "humaneval", unsafe_code_execution=True, num_problems=3, samples_per_problem=2)
    assert result["score"] == 0.5 and result["outcomes"] == {"SystemExit": 3, "passed": 3}
    assert result["metric"] == "pass@1" and result["sandbox"]["limits"]["processes"] > 0
    assert len(result["file_sha256"]) == 64 and result["file"] == "HumanEval.jsonl.gz"


@pytest.mark.parametrize("changes, said", [
    ({"task": "human_eval"}, "did you mean 'humaneval'"),
    ({"task": "humaneval"}, "--allow_code_execution"),
    ({"num_problems": -1}, "num_problems is -1"),
    ({"samples_per_problem": 0}, "samples_per_problem is 0"),
    ({"num_fewshot": 8}, "8 shots leave none"),
    ({"sampler": {"stop": "x", "seed": 1}}, "sampler holds seed, stop"),
    ({"sampler": {"temperatur": 1}}, "did you mean 'temperature'"),
    ({"baseline": "nowhere"}, "no run directory nowhere"),
    ({"file": ""}, "give --file"),
])
def test_bad_input_is_refused_before_anything_is_written(models, file, changes, said):
    [run] = models(run=lambda prompt, _: pytest.fail("asked"))
    with pytest.raises(UserError, match=said):
        evaluate(run, **{"file": file, **changes})


def test_a_directory_that_cannot_be_written_is_refused_first(models, file):
    [run] = models(run=lambda prompt, _: pytest.fail("asked"))
    with open(f"{run}/tasks", "w"):
        with pytest.raises(UserError, match="cannot write .*tasks, where completions are kept: File exists"):
            evaluate(run, file)


def test_completions_and_problems_must_be_as_many(file):
    problems = read_problems(TASKS["gsm8k"], file).problems
    with pytest.raises(UserError, match="7 completions of 8 problems"):
        score_completions(TASKS["gsm8k"], problems, ["1"] * 7, allow_code_execution=False)
    code = read_problems(TASKS["humaneval"], "").problems[:1]
    with pytest.raises(UserError, match="--allow_code_execution"):
        score_completions(TASKS["humaneval"], code, [""], allow_code_execution=False)
