"""Flags of `eval` and what its three evaluations get."""

import json
import sys
import types

import pytest

from bd3lm_jax.evaluation import tasks
from launch.__main__ import main


@pytest.fixture
def calls(monkeypatch):
    """Calls of the library: (name, arguments, keywords)."""
    found = []
    for module, name in (("evaluation.quality", "evaluate_samples"), ("tasks", "evaluate_task"),
                         ("evaluation.evaluate_run", "evaluate_run"), ("evaluation.block_sizes", "curve")):
        def call(*args, name=name, **kwargs):
            found.append((name, args, kwargs))
            return {"done": 1}

        if module == "tasks":  # whose registry is read
            monkeypatch.setattr(tasks, name, call)
        else:
            monkeypatch.setitem(sys.modules, f"bd3lm_jax.{module}", types.SimpleNamespace(**{name: call}))
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
        ("evaluate_samples", (["a.json", "b.json"],),
         {"scorer": "s", "reference": "none", "stride": 32, "max_tokens": 9, "mauve": True, "plot": "p.png",
          "split": "valid", "weights": "params"}),
        ("evaluate_samples", (["run"],),
         {"scorer": "", "reference": "", "stride": 0, "max_tokens": 0, "mauve": False, "plot": "", "split": "test",
          "weights": "ema"})]


def test_task(capsys, calls):
    assert run(capsys, "--workdir=w", "--task=gsm8k", "--file=f", "--baseline=v", "--num_problems=3", "--seed=2",
               "--samples_per_problem=5", "--num_fewshot=2", "--temperature=0", "--block_size=8",
               "--sampler=confidence")[0] == 0
    assert run(capsys, "--workdir=w", "--task=humaneval", "--allow_code_execution")[0] == 0
    assert calls == [
        ("evaluate_task", ("w",),
         {"task": "gsm8k", "file": "f", "against": "v", "allow_code_execution": False,
          "unsafe_code_execution": False, "num_problems": 3, "draws_per_problem": 5, "shots": 2, "seed": 2,
          "weights": "ema",
          "sampler": {"sampler": "confidence", "temperature": 0.0, "block_size": 8}}),
        ("evaluate_task", ("w",),
         {"task": "humaneval", "file": "", "against": "", "allow_code_execution": True,
          "unsafe_code_execution": False, "num_problems": 0, "draws_per_problem": 1, "shots": 0, "seed": 0,
          "weights": "ema", "sampler": {}})]


def test_a_likelihood_without_other_flags(capsys, calls):
    assert run(capsys, "--workdir=w", "--data=x.txt")[0] == 0
    assert calls[0][0] == "evaluate_run" and "scorer" not in calls[0][2]


def test_block_sizes(capsys, calls):
    assert run(capsys, "--workdir=w", "--block_size=4")[0] == 0
    assert run(capsys, "--workdir=w", "--curve", "--nll_tolerance=0.05", "--split=valid", "--mc_samples=3")[0] == 0
    assert calls[0][2]["block_size"] == 4
    assert calls[1] == ("curve", ("w",), {"within": 0.05, "split": "valid", "estimator": "", "draws": 3, "seed": 0,
                                          "weights": "ema", "batch": 0})


@pytest.mark.parametrize("argv, said", [
    (("--workdir=w", "--curve", "--data=austen"), "--data does not go with --curve"),
    (("--workdir=w", "--data=all", "--block_size=4"), "--block_size does not go with --data=all"),
    (("--samples=a", "--task=gsm8k"), "two evaluations"),
    (("--samples=a", "--workdir=w"), "--workdir does not go with --samples"),
    (("--samples=a", "--mc_samples=2"), "--mc_samples does not go with --samples"),
    (("--workdir=w", "--scorer=s"), "--scorer does not go with a likelihood"),
    (("--workdir=w", "--temperature=1"), "--temperature does not go with a likelihood"),
    (("--task=gsm8k", "--workdir=w", "--data=all"), "--data does not go with --task"),
    (("--task=gsm8k",), "--workdir is missing"), ((), "--workdir is missing")])
def test_flags_that_do_not_go_together(capsys, calls, argv, said):
    code, _, err = run(capsys, *argv)
    assert code == 2 and said in err and not calls
