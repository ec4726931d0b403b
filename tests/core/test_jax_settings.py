"""Training, going on, measuring and writing give the same bits whatever JAX is set to."""

import os
import re
import subprocess
import sys

import jax
import pytest
from toy_runs import ROOT

from bd3lm_jax.core import jax_settings
from bd3lm_jax.core.errors import UserError

SETTINGS = {
    "jax_default_prng_impl": "rbg", "jax_threefry_partitionable": False, "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise",
}


def test_a_key_is_that_of_jax_for_32_bits_and_takes_64():
    for seed in (0, 1, 2**31, 2**32 - 1):
        assert jax_settings.key(seed) == jax.random.key(seed, impl="threefry2x32")
    seeds = [0, 2**32, 2**32 + 1, 1, -1, 2**32 - 1, 2**63 - 1, -2**63]
    words = {tuple(jax.random.key_data(jax_settings.key(seed)).tolist()) for seed in seeds}
    assert len(words) == len(seeds)
    for seed in (2**63, -2**63 - 1):
        with pytest.raises(UserError, match=f"seed is {seed}, expected .*64 bits"):
            jax_settings.key(seed)


@pytest.mark.parametrize("name, value", SETTINGS.items())
def test_the_key_of_a_seed_is_that_under_every_setting(name, value):
    words = jax.random.key_data(jax_settings.key(2**40 + 3)).tolist()
    old = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        assert jax.random.key_data(jax_settings.key(2**40 + 3)).tolist() == words == [2**8, 3]
    finally:
        jax.config.update(name, old)


def test_settings_are_those_of_the_caller_between_the_items_of_a_stream():
    def items():
        for _ in range(2):
            yield jax.config.jax_numpy_rank_promotion

    with jax.numpy_rank_promotion("raise"):
        for inside in jax_settings.iterate(items()):
            assert (inside, jax.config.jax_numpy_rank_promotion) == ("allow", "raise")


@pytest.mark.ci_slow
def test_commands_set_the_variables_before_jax_is_imported():
    """What is set otherwise is named; the processes that a command starts inherit the variables."""
    code = ("from launch.__main__ import JAX_SETTINGS, _fix_settings; import os, sys; _fix_settings()\n"
            "assert 'jax' not in sys.modules\n"
            "import jax; print([os.environ[name] for name in JAX_SETTINGS], jax.config.jax_enable_x64,"
            " jax.config.jax_threefry_partitionable, jax.config.jax_numpy_rank_promotion)")
    names = [name.upper() for name in SETTINGS]
    for environment, notes in ((dict(zip(names, ("rbg", "0", "True", "strict", "raise"))), 5), (
            {"JAX_ENABLE_X64": "false", "JAX_THREEFRY_PARTITIONABLE": "1"}, 0)):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, text=True,
                              capture_output=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("False True allow\n") and done.stderr.count("is not used") == notes


def test_keys_are_made_in_one_place():
    made = re.compile(r"random\.(key|PRNGKey)\(")
    assert not [path for path in (ROOT / "bd3lm_jax").rglob("*.py") if made.search(path.read_text(encoding="utf-8"))]


PROGRAM = """
import hashlib, json, sys
from pathlib import Path
sys.path.append("tests/helpers")
import jax
import numpy as np
for word in sys.argv[3:]:
    name, _, value = word.partition("=")
    jax.config.update(name, {"True": True, "False": False}.get(value, value))
import bd3lm_jax
from bd3lm_jax.core.log import read_metrics
from bd3lm_jax.training.train import train
from toy_runs import toy_config
home, run = Path(sys.argv[1]), sys.argv[2]
for steps in (3, 6):
    train(toy_config(home, {"train.steps": steps, "eval.every": 3, "checkpoint.every": 3}), run)
lm = bd3lm_jax.load(run)
digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(lm.params))).hexdigest()
dtypes = sorted({str(x.dtype) for x in jax.tree.leaves(lm.params)})
bound = lm.nll(np.arange(64).reshape(2, 32), draws=2, seed=5)
samples = [sample.tokens for sample in lm.generate(["the cat"], num=2, length=24, seed=3, top_p=0.9)]
stream = "".join(x.text for x in lm.stream("the cat", length=24, seed=3) if type(x).__name__ == "Committed")
score = lm.score(["the cat"], [" sat on"], seed=1)[0]
losses = [line.get("train/loss") for line in read_metrics(run)]
nats = np.asarray(bound.per_token).tolist()
print(json.dumps([losses, digest, dtypes, nats, samples, stream, list(map(str, score))]))
"""


def outcome(home, run, words: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", PROGRAM, str(home), str(run), *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from toy_runs import write_text

    home = tmp_path_factory.mktemp("home")
    write_text(home / "text.txt", 60)
    return home


@pytest.fixture(scope="module")
def usual(home):
    return outcome(home, home / "usual", [], {})


@pytest.mark.ci_slow
@pytest.mark.parametrize("name, value", SETTINGS.items())
def test_train_resume_eval_and_sample_from_python(home, usual, name, value):
    assert outcome(home, home / name, [f"{name}={value}"], {}) == usual


@pytest.mark.ci_slow
def test_all_of_them_as_variables(home, usual):
    variables = {name.upper(): str(value).lower() if isinstance(value, bool) else value
                 for name, value in SETTINGS.items()}
    assert outcome(home, home / "variables", [], variables) == usual
