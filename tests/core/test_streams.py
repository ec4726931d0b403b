"""stdout and stderr that are full, closed or read no more: one line, the right exit code, never a traceback."""

import os
import subprocess
import sys

import pytest
from places import ROOT
from toy_runs import environment

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
RESULT = "python -m launch clean --cache_dir=."
CASES = {  # shell -> exit code and what is said
    f"{RESULT} > /dev/full": (1, "error: cannot write the result to stdout: No space left on device"),
    f"{RESULT} >&-": (1, "error: cannot write the result to stdout: it is closed"),
    f"{RESULT} | true; exit ${{PIPESTATUS[0]}}": (1, "error: cannot write the result to stdout: Broken pipe"),
    f"{RESULT} 2> /dev/full": (0, '{"leftovers"'),
    f"{RESULT} 2>&-": (0, '{"leftovers"'),
    f"{RESULT} <&- >&- 2>&-": (1, ""),
    f"{RESULT} > /dev/full 2> /dev/full": (1, ""),
    "python -m launch clean --help > /dev/full": (1, "error: cannot write to stdout: No space left on device"),
    "python -m launch --help | true; exit ${PIPESTATUS[0]}": (0, ""),
    "python -m launch clean --nonsense 2> /dev/full": (2, ""),
    "python -m launch clean --nonsense 2>&-": (2, ""),
}


@pytest.mark.ci_slow
@pytest.mark.parametrize("words", CASES)
def test_exit_codes_and_words(words):
    code, said = CASES[words]
    words = words.replace("python", sys.executable).replace("--cache_dir=.", f"--cache_dir={ROOT / 'configs'}")
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=120, cwd=ROOT,
                          env=environment())
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_full_disk_that_nobody_caught_is_one_line(monkeypatch, capsys):
    from bd3lm_jax.evaluation import doctor
    from launch.__main__ import main

    def diagnose():
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == ("error: cannot write some/file: No space left on device; free some space, or "
                                       "choose another place\n")
