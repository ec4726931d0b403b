"""Flags of `eval` and what its jobs get."""

import json

import pytest

from bd3lm_jax.evaluation import block_sizes, evaluate_run, quality, suite, tasks
from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions, TextOptions
from launch.__main__ import main


@pytest.fixture
def calls(monkeypatch):
    """Calls of the library: (name, arguments, keywords)."""
    found = []
    for module, name in ((quality, "evaluate_samples"), (tasks, "evaluate_task"), (evaluate_run, "evaluate_run"),
                         (suite, "evaluate_suite"), (block_sizes, "curve")):
        def call(*args, name=name, **kwargs):
            found.append((name, args, kwargs))
            return {"done": 1}

        monkeypatch.setattr(module, name, call)
    return found


def run(capsys, *argv):
    code = main(["eval", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_samples(capsys, calls):
    code, out, _ = run(capsys, "--samples=a.json,b.json", "--scorer=s", "--reference=none", "--stride=32",
                       "--max_tokens=9", "--mauve", "--plot=p.png", "--split=valid", "--weights=params")
    assert (code, json.loads(out)) == (0, {"done": 1})
    assert run(capsys, "--samples=run")[0] == 0
    assert calls == [
        ("evaluate_samples", (["a.json", "b.json"], quality.QualityOptions("s", "params", "valid", "none", 32, 9, True,
                                                                          "p.png")), {}),
        ("evaluate_samples", (["run"], quality.QualityOptions()), {})]


def test_task(capsys, calls):
    assert run(capsys, "--workdir=w", "--task=gsm8k", "--file=f", "--baseline=v", "--num_problems=3", "--seed=2",
               "--samples_per_problem=5", "--num_fewshot=2", "--temperature=0", "--block_size=8",
               "--sampler=confidence")[0] == 0
    assert run(capsys, "--workdir=w", "--task=humaneval", "--allow_code_execution")[0] == 0
    assert calls == [
        ("evaluate_task", ("w", "gsm8k", tasks.TaskOptions("f", 3, 5, 2, 2)),
         {"baseline": "v", "sampler": {"sampler": "confidence", "temperature": 0.0, "block_size": 8}}),
        ("evaluate_task", ("w", "humaneval", tasks.TaskOptions(allow_code_execution=True)),
         {"baseline": "", "sampler": {}})]


def test_a_likelihood_without_other_flags(capsys, calls):
    assert run(capsys, "--workdir=w", "--data=x.txt")[0] == 0
    assert calls == [("evaluate_run", ("w",), {"text": TextOptions("x.txt"), "estimator": EstimatorOptions(),
                                               "model": ModelOptions(), "baseline": ""})]


def test_all_texts(capsys, calls):
    assert run(capsys, "--workdir=w,v", "--data=all", "--length=64", "--data_dir=d")[0] == 0
    assert calls == [("evaluate_suite", (["w", "v"],),
                      {"text": TextOptions("all", data_dir="d"), "estimator": EstimatorOptions(),
                       "model": ModelOptions(length=64)})]


def test_block_sizes(capsys, calls):
    assert run(capsys, "--workdir=w", "--block_size=4", "--step=3")[0] == 0
    assert run(capsys, "--workdir=w", "--curve", "--within=0.05", "--split=valid", "--mc_samples=3")[0] == 0
    assert calls[0][2]["model"] == ModelOptions(block_size=4, step=3)
    assert calls[1] == ("curve", ("w",), {"tolerance": 0.05, "split": "valid", "estimator": EstimatorOptions(draws=3),
                                          "model": ModelOptions()})


@pytest.mark.parametrize("argv, said", [
    (("--workdir=w", "--curve", "--data=austen"), "--data does not go with --curve"),
    (("--workdir=w", "--data=all", "--block_size=4"), "--block_size does not go with --data=all"),
    (("--samples=a", "--task=gsm8k"), "two evaluations"),
    (("--samples=a", "--workdir=w"), "--workdir does not go with --samples"),
    (("--samples=a", "--mc_samples=2"), "--mc_samples does not go with --samples"),
    (("--workdir=w", "--scorer=s"), "--scorer does not go with a likelihood"),
    (("--workdir=w", "--temperature=1"), "--temperature does not go with a likelihood"),
    (("--task=gsm8k", "--workdir=w", "--data=all"), "--data does not go with --task"),
    (("--workdir=w", "--curve", "--watch"), "--curve does not go with --watch"),
    (("--workdir=w", "--nll_tolerance=0.1"), "--nll_tolerance goes with --curve: add it"),
    (("--task=gsm8k",), "--workdir is missing"), ((), "--workdir is missing")])
def test_flags_that_do_not_go_together(capsys, calls, argv, said):
    code, _, err = run(capsys, *argv)
    assert code == 2 and said in err and not calls
