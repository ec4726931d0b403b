"""Programs that a model might write: none of them passes without solving the problem, none harms the one who asks.

The table in docs/tasks.md is what `attempts.py` measures, for the mechanisms that this machine and user have.
"""

import os
import re
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import attempts
import pytest
from places import ROOT

from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.evaluation.tasks import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run only on Linux")
LIMITS = attempts.LIMITS
HURRIED = LIMITS._replace(wall_s=1.0)
RIGHT = "def f(): return 1"
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
MECHANISMS = (sandbox.BWRAP, sandbox.FILTERS, sandbox.UNSAFE)


@pytest.fixture(scope="module", params=MECHANISMS)
def mechanism(request):
    try:
        sandbox.run("", [], LIMITS, request.param)
    except RunError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="module")
def confined(mechanism):
    if mechanism == sandbox.UNSAFE:
        pytest.skip("promises nothing")
    return mechanism


@pytest.fixture(scope="module")
def run(mechanism):
    return lambda program, limits=LIMITS: sandbox.run(textwrap.dedent(program), ["assert f() == 1"], limits, mechanism)


def documented() -> dict[str, dict[str, str]]:
    """mechanism -> row -> what docs/tasks.md says of it."""
    lines = re.search(r"(\| a program tries to .*?)\n\n", PAGE, re.DOTALL)[1].splitlines()
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): {row[0]: row[i] for row in rows} for i, name in enumerate(names) if i}


def test_the_table_names_every_attempt():
    for column in documented().values():
        assert list(column) == [*attempts.DANGERS, *attempts.OTHERS]


@pytest.mark.parametrize("row", [*attempts.DANGERS, *attempts.OTHERS])
def test_the_table_is_what_is_measured(confined, row):
    programs = (attempts.DANGERS | attempts.OTHERS)[row]
    assert attempts.measure(confined, {row: programs})[row] == documented()[confined][row]


@pytest.mark.parametrize("row", attempts.DANGERS)
def test_the_attempts_are_dangers(row, tmp_path):
    """Without protection each of them succeeds."""
    programs = attempts.DANGERS[row]
    if "xattr" in row:
        try:
            os.setxattr(tmp_path, "user.x", b"1")
        except OSError:
            pytest.skip("this file system has no attributes")
    assert [attempts.succeeds(program, sandbox.UNSAFE, row) for program in programs] == [True] * len(programs)


def test_without_a_sandbox_it_is_refused_in_one_line(monkeypatch):
    def start(program, tests, limits, mechanism):
        if mechanism != sandbox.UNSAFE:
            raise RunError(f"{mechanism} is not there")
        return sandbox.Outcome(True, "")

    monkeypatch.setattr(sandbox, "run", start)
    with pytest.raises(UserError, match="bwrap is not there; filters is not there.*--unsafe_code_execution"):
        sandbox.choose(LIMITS)
    assert sandbox.choose(LIMITS, unsafe=True) == sandbox.UNSAFE


def test_root_needs_bubblewrap(monkeypatch):
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 0)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="bwrap is not installed; filters are for ordinary users, and this is root"):
        sandbox.choose(LIMITS)


def test_nothing_a_program_leaves_stops_the_next_one(run, tmp_path, monkeypatch):
    """Directories deeper than recursion goes, and one that cannot be read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    deep = run("""
        import os
        os.mkdir('closed'); os.mkdir('closed/x'); open('closed/x/y', 'w').close()
        for _ in range(3000):
            os.mkdir('d'); os.chdir('d')
        os.mkdir('unreadable', 0o300)
        open('unreadable/file', 'w').close()
        def f(): return 1""")
    assert deep.passed and run(RIGHT).passed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [
    "import os\nwhile True:\n  for n in range(3, 10):\n    try: os.write(n, b'x' * 65536)\n    except OSError: pass",
    "import os\nfor n in range(3, 10):\n  try: os.write(n, bytes(range(256)) * 99)\n  except OSError: pass",
    "x = '(' * 3000 + ')' * 3000", "(" * 3000 + ")" * 3000, "[" * 90 + "]" * 90 + "\n1/0", "x = " + "-" * 10**5 + "1",
    "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()", "\0", "\ud800",
    "raise Exception('\x1b[2J\\n\\ud800')",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
])
def test_odd_programs_end_as_others_do(run, program):
    outcome = run(program, HURRIED._replace(cpu_s=2))
    assert not outcome.passed or "'(' *" in program
    assert len(outcome.detail) <= sandbox.ANSWER and "\n" not in outcome.detail


def processes_with(text: str) -> list[str]:
    """Command lines of this machine's processes that hold `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [line for line in found if text in line]


@pytest.mark.parametrize("program", [
    RIGHT,
    "import math, re, collections\ndef f(): return math.gcd(1, 2)",
    "open('mine', 'w').write('x')\ndef f(): return len(open('mine').read())",
    "import subprocess\ndef f(): return int(subprocess.run(['echo', '1'], capture_output=True).stdout)",
    "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\ndef f(): return 1",
], ids=["plain", "imports", "file", "subprocess", "thread left behind"])
def test_right_programs_pass(run, program):
    assert run(program) == sandbox.Outcome(True, "")


@pytest.mark.parametrize("program, said", [
    ("def f(): return 2", "AssertionError"),
    ("def f(: return 1", "SyntaxError"),
    ("def f(): return 1\n'''", "SyntaxError"),  # would hide the tests, were they one text with the program
    ("import sys; sys.exit(0)", "SystemExit: 0"),
    ("import os; os._exit(0)", "Ended"),
    ("import os; os.abort()", "Killed: by signal"),
    ("print('passed'); raise SystemExit", "SystemExit"),
    ("import sys, os\nsys.stdout.close(); os.close(1)\ndef f(): return 2", "AssertionError"),
    ("import os\nos.closerange(0, 256)\ndef f(): return 1", "Ended"),
    ("def f(): return f()", "RecursionError"),
    ("raise Exception(input())", "EOFError"),
    ("x = [bytearray(2 ** 20) for _ in range(2 ** 20)]", "MemoryError"),
    ("open('x', 'wb').write(bytes(2 ** 24))", "OSError"),
    ("import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None", "NameError"),
    ("class E(Exception):\n    def __str__(self): return 'x' * 10 ** 6\nraise E", "E: xxx"),
])
def test_wrong_programs_fail_with_a_reason(run, program, said):
    outcome = run(program)
    assert not outcome.passed and outcome.detail.startswith(said) and len(outcome.detail) <= 500


@pytest.mark.parametrize("text", [b"passed", b"", b"\0" * 16, b"1"])
def test_a_fake_success_on_every_file_it_has_open_does_not_count(run, text):
    outcome = run(f"""
        import os
        for file in range(100):
            try:
                os.write(file, {text!r})
            except OSError:
                pass
        os._exit(0)""")
    assert not outcome.passed


@pytest.mark.parametrize("program", [
    "while True: pass",
    "import time; time.sleep(1000)",
    "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "import os, time\nif os.fork(): time.sleep(1000)\ndef f(): return 1",  # only the copy reaches the tests
    "import signal\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\n"
    "while True: pass",
])
def test_what_does_not_end_is_ended(run, program):
    began = time.monotonic()
    assert run(program, HURRIED).detail == "TimeLimit: not done after 1 s"
    assert time.monotonic() - began < 1 + sandbox.GRACE_S


def test_cpu_time_has_a_limit_of_its_own(run):
    outcome = run("while True: pass", LIMITS._replace(cpu_s=1))
    assert outcome.detail == "TimeLimit: not done after 1 s of CPU time"


def test_a_fork_bomb_stays_small_and_leaves_nothing(run, confined):
    marker = f"bomb-{os.getpid()}"
    bomb = f"""
        import os, subprocess, time
        subprocess.Popen(['sh', '-c', 'sleep 1000; : {marker}'])
        made = 0
        try:
            while made < 200:
                if os.fork() == 0:
                    time.sleep(1000)
                made += 1
        except OSError:
            pass
        """
    outcome = run(bomb + "raise Exception(made)")
    assert 1 <= int(outcome.detail.removeprefix("Exception: ")) <= LIMITS.processes
    assert not run(bomb + "while True:\n            try: os.fork()\n            except OSError: pass", HURRIED).passed
    deadline = time.monotonic() + 5  # the kernel ends a namespace after its first process
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_with(marker)


def test_nothing_is_inherited(run, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run("import os\ndef f(): return int(not os.environ.keys() & {'SECRET', 'PYTHONPATH', 'USER'})").passed
    assert run("import sys\ndef f(): return int('bd3lm_jax' not in sys.modules and 'log' not in sys.modules)").passed
    assert run("import os\ndef f(): return int(os.listdir('.') == [])").passed


def test_sets_have_one_order(run):
    outcomes = {run("raise Exception(list(map(str, {'a', 'b', 'c', 'd', 'e'})))").detail for _ in range(3)}
    assert len(outcomes) == 1


def test_many_programs_keep_their_order(mechanism):
    programs = [(f"def f(): return {i % 2}", ["assert f() == 1"]) for i in range(6)]
    assert [outcome.passed for outcome in sandbox.run_all(programs, LIMITS, mechanism)] == [False, True] * 3


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UserError, match="only on Linux"):
        sandbox.choose(LIMITS)
