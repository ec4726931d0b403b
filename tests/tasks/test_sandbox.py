"""Programs that a model might write: none of them passes without solving the problem, none harms the one who asks."""

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bd3lm_jax.errors import UserError
from bd3lm_jax.tasks import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run only on Linux")
LIMITS = sandbox.Limits(wall_s=30.0, cpu_s=20, memory_mib=512, file_mib=1, processes=6)
HURRIED = LIMITS._replace(wall_s=1.0)
RIGHT = "def f(): return 1"


def run(program, limits=LIMITS):
    return sandbox.run(textwrap.dedent(program), ["assert f() == 1"], limits)


@pytest.fixture(scope="module")
def isolation():
    return sandbox.check(LIMITS)


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
def test_right_programs_pass(program):
    assert run(program) == sandbox.Outcome(True, "", sandbox.check(LIMITS))


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
    ("open('x', 'wb').write(bytes(2 ** 22))", "OSError"),
    ("import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None", "NameError"),
    ("class E(Exception):\n    def __str__(self): return 'x' * 10 ** 6\nraise E", "E: xxx"),
])
def test_wrong_programs_fail_with_a_reason(program, said):
    outcome = run(program)
    assert not outcome.passed and outcome.detail.startswith(said) and len(outcome.detail) <= 500


@pytest.mark.parametrize("text", [b"passed", b"", b"\0" * 16, b"1"])
def test_a_fake_success_on_every_file_it_has_open_does_not_count(text):
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
def test_what_does_not_end_is_ended(program):
    began = time.monotonic()
    assert run(program, HURRIED).detail == "TimeLimit: not done after 1 s"
    assert time.monotonic() - began < 1 + sandbox.GRACE_S


def test_cpu_time_has_a_limit_of_its_own():
    outcome = run("while True: pass", LIMITS._replace(cpu_s=1))
    assert outcome.detail == "TimeLimit: not done after 1 s of CPU time"


def test_a_fork_bomb_stays_small_and_leaves_nothing():
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
    assert not processes_with(marker)


def test_a_process_that_leaves_its_group_is_killed_too():
    marker = f"left-{os.getpid()}"
    outcome = run(f"""
        import os, subprocess
        subprocess.Popen(['sh', '-c', 'sleep 1000; : {marker}'], start_new_session=True)
        def f(): return 1""")
    assert outcome.passed and not processes_with(marker)


def test_killing_its_parent_or_its_group_is_no_success():
    assert not run("import os; os.kill(os.getppid(), 9)\nos._exit(0)").passed
    assert not run("import os; os.kill(0, 9)\nos._exit(0)").passed


def test_nothing_is_inherited(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run("import os\ndef f(): return int(not os.environ.keys() & {'SECRET', 'PYTHONPATH', 'USER'})").passed
    assert run("import sys\ndef f(): return int('bd3lm_jax' not in sys.modules and 'log' not in sys.modules)").passed
    assert run("import os\ndef f(): return int(os.listdir('.') == [])").passed


def test_sets_have_one_order():
    outcomes = {run("raise Exception(list(map(str, {'a', 'b', 'c', 'd', 'e'})))").detail for _ in range(3)}
    assert len(outcomes) == 1


def test_files_elsewhere_stay_as_they_are(isolation, tmp_path):
    if "files" not in isolation:
        pytest.skip("this kernel has no Landlock")
    victim = tmp_path / "victim"
    victim.write_text("whole")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    for attack in ("open({!r}, 'w')", "import os; os.remove({!r})", "import os; os.rename({!r}, 'mine')",
                   "open({!r} + '2', 'w')"):
        assert run(attack.format(str(victim))).detail.split(":")[0] in ("PermissionError", "OSError")
    assert victim.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_there_is_no_network(isolation):
    if "network" not in isolation:
        pytest.skip("this kernel gives no namespaces")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "OSError" in run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)").detail


def test_many_programs_keep_their_order():
    programs = [(f"def f(): return {i % 2}", ["assert f() == 1"]) for i in range(6)]
    assert [outcome.passed for outcome in sandbox.run_all(programs, LIMITS)] == [False, True] * 3


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UserError, match="only on Linux"):
        sandbox.check(LIMITS)
