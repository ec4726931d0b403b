"""What a hostile program tries, and the table of what came of it.

Every program raises where it is stopped. `measure` runs them with a mechanism of the sandbox and gives a column of the
table in docs/tasks.md; without any protection (`sandbox.UNSAFE`) those of DANGERS must succeed, or they try nothing.
As a script: the column of this machine and user for the mechanism that argv names.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bd3lm_jax.evaluation.tasks import sandbox

LIMITS = sandbox.Limits(wall_s=30.0, cpu_s=20, memory_mib=512, file_mib=8, processes=6)
STOPPED, POSSIBLE = "stopped", "**possible**"
SLEEP = "import time; time.sleep(600)"
DANGERS = {  # row of the table -> programs; {place} is a directory of the user, {pid} a process of the user
    "write, remove or rename files of yours": (
        "open('{place}/file', 'w')", "open('{place}/new', 'w')", "import os; os.remove('{place}/file')",
        "import os; os.rename('{place}/file', '{place}/other')", "import os; os.truncate('{place}/file', 0)",
        "import os; os.symlink('x', '{place}/link')", "import os; os.mkdir('{place}/new')",
        "import os; os.link('{place}/file', 'mine')"),
    "change their modes or times (chmod, utime)": (
        "import os; os.chmod('{place}/file', 0o600)", "import os; os.utime('{place}/file', (1, 1))",
        "import os; os.chmod('{place}', 0o700)"),
    "change their attributes (xattr)": ("import os; os.setxattr('{place}/file', 'user.x', b'1')",),
    "read files of yours": ("assert open('{place}/file').read()", "import os; assert os.listdir('{place}')",
                            "assert open('/proc/{pid}/cwd/file').read()"),
    "read the environment or memory of your processes (/proc)": (
        "assert b'SECRET' in open('/proc/{pid}/environ', 'rb').read()",
        "assert open('/proc/{pid}/maps').read()", "assert open('/proc/{pid}/cmdline').read()"),
    "signal or change your processes": (
        "import os; os.kill({pid}, 0)", "import os; os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
        "import os; os.sched_setaffinity({pid}, os.sched_getaffinity({pid}))",
        "import resource; resource.prlimit({pid}, resource.RLIMIT_CORE, (0, 0))",
        "import os, signal; os.pidfd_open({pid}); signal.pidfd_send_signal(os.pidfd_open({pid}), 0)"),
    "connect to Unix sockets": (
        "import socket; socket.socket(socket.AF_UNIX).connect('{place}/socket')",
        "import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')"),
    "use the network": ("import socket; socket.create_connection(('127.0.0.1', {port}), 5)",),
    "leave processes behind": (
        "import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {sleep!r}, '{name}'], "
        "start_new_session=True)",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.execv('/bin/sleep', "
        "['{name}', '600'])\n    os._exit(0)\nimport time\ntime.sleep(0.5)"),
}
OTHERS = {
    "be root": ("import os; os.setuid(0)", "import os; assert 0 in (os.getuid(), os.geteuid(), os.getegid())"),
    "use more memory than the limit": (
        "x = [bytearray(2 ** 24) for _ in range(40)]",
        "import os\nfor n in range(600 // 8 + 1):\n    file = os.memfd_create('x')\n"
        "    for _ in range(8): assert os.write(file, bytes(2 ** 20)) == 2 ** 20",
        "import os\nfile = os.memfd_create('x')\nos.ftruncate(file, 2 ** 30)"),
    "write a file beyond the limit": ("with open('x', 'wb') as f: f.write(bytes(9 * 2 ** 20))",),
    "have more processes than the limit": (
        "import os, time\nfor _ in range(7):\n    if os.fork() == 0:\n        time.sleep(9); os._exit(0)",),
    "fill the disk with many files": (
        "for n in range(10):\n    with open(f'x{{n}}', 'wb') as f: f.write(bytes(8 * 2 ** 20))",),
    "learn that a file of yours exists": ("import os; assert os.path.exists('{place}/file')",),
    "find the tests in its memory or open files before its own code has run": (
        "import gc, os\ntexts = [str(x) for x in gc.get_objects() if 'get_objects' not in str(type(x))]\n"
        "for file in range(64):\n    try:\n        os.set_blocking(file, False)\n"
        "        texts.append(os.read(file, 9999).decode())\n    except OSError: pass\n    except TypeError: pass\n"
        "assert any(''.join(['MARK', 'OFTEST']) in text for text in texts)",),
    "pass by leaving early, or by writing to all it has open": (
        "import os; os._exit(0)", "raise SystemExit(0)",
        "import os\nfor file in range(64):\n    try: os.write(file, b'passed\\n')\n    except OSError: pass\n"
        "os._exit(0)",
        "import os; os.kill(os.getppid(), 9); os._exit(0)", "import os; os.closerange(0, 64)"),
    "have the tests sent early and answer them, by what its interpreter's frames hold": (
        "import json, os, sys\nframe, tests = sys._getframe(1).f_locals, ''\nmessage = frame['message']\n"
        "while 'MARKOF' + str('TEST') not in tests:\n"
        "    os.write(frame['outbox'], message['token'].encode() + b'\\n')\n"
        "    message = json.loads(frame['inbox'].readline())\n    tests += message['part']\n"
        "os.write(frame['outbox'], message['token'].encode() + b'\\n')\nos._exit(0)",),
    "pass by cheating its tests from within": (
        "class Anything:\n    __eq__ = lambda self, other: True\ndef f(): return Anything()",),
}
HONEST = {"pass by leaving early, or by writing to all it has open", "pass by cheating its tests from within"}


def measure(mechanism: str, rows: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """STOPPED where every program of the row was, else POSSIBLE."""
    return {row: POSSIBLE if any(succeeds(program, mechanism, row) for program in programs) else STOPPED
            for row, programs in rows.items()}


def succeeds(program: str, mechanism: str, row: str) -> bool:
    with _surroundings() as surroundings:
        program = program.format(**surroundings)
        if row not in HONEST:
            program += "\ndef f(): return 1"
        passed = sandbox.run(program, ["assert f() == 1 or 'MARKOFTEST' == 0"], LIMITS, mechanism).passed
        time.sleep(0.2 * row.startswith("leave processes"))  # the kernel ends a namespace after its first process
        left = end_processes(surroundings["name"])
        return left if row.startswith("leave processes") else passed


def end_processes(name: str) -> bool:
    """Kill the processes that have `name` in their command line; whether there were any."""
    found = False
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if name.encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), 9)
                found = True
    return found


@contextlib.contextmanager
def _surroundings() -> Iterator[dict]:
    """A directory that all may change, with a file and a socket; sockets elsewhere; a process."""
    place = tempfile.mkdtemp(prefix="victim-")
    os.chmod(place, 0o777)
    name = os.path.basename(place)
    Path(place, "file").write_text("whole")
    Path(place, "file").chmod(0o666)
    other = subprocess.Popen([sys.executable, "-c", SLEEP], env={"SECRET": "1"}, cwd=place)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named, \
            socket.socket(socket.AF_UNIX) as abstract:
        for unix, address in ((named, f"{place}/socket"), (abstract, f"\0{name}")):
            unix.bind(address)
            unix.listen()
        os.chmod(f"{place}/socket", 0o777)
        try:
            yield {"place": place, "name": name, "pid": other.pid, "port": server.getsockname()[1], "sleep": SLEEP}
        finally:
            other.kill()
            other.wait()
            shutil.rmtree(place)


if __name__ == "__main__":
    print("\n".join(f"| {row} | {outcome} |" for row, outcome in measure(sys.argv[1], DANGERS | OTHERS).items()))
