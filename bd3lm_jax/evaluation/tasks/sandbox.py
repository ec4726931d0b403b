"""Programs that a model wrote, run one by one where they do no harm (docs/tasks.md has a table of what is tested).

`sandbox_child.py` is the other half: it runs inside, takes the limits upon itself, and executes what is sent to it.
This side trusts nothing that comes back: it reads a bounded answer until a deadline, and then kills all that is left.
"""

import contextlib
import json
import os
import secrets
import select
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bd3lm_jax.core.errors import RunError, UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
BWRAP, FILTERS, UNSAFE = "bwrap", "filters", "unsafe"
GRACE_S = 10.0  # for the interpreter to start
ANSWER = 500  # bytes of an answer that are read
TEMPORARY_MIB = 64  # of all files that a program has at once, under bwrap
USERS = range(61184, 65520)  # nobody's: systemd lends them to services for a while
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/urandom")
INSIDE = "/tmp/program"  # where a program works under bwrap


class Limits(NamedTuple):
    """Of one program. cpu_s, memory_mib (address space): of each of its processes; file_mib: of each file; processes:
    how many at once, threads counted."""

    wall_s: float
    cpu_s: int
    memory_mib: int
    file_mib: int
    processes: int


class Outcome(NamedTuple):
    """detail: "" if passed, else the exception or how the program ended."""

    passed: bool
    detail: str


def choose(limits: Limits, unsafe: bool = False) -> str:
    """The mechanism that confines programs on this machine, found by trial: "bwrap" (bubblewrap, namespaces), else
    "filters" (Landlock and seccomp, for ordinary users); where there is neither, "unsafe" if that is allowed.

    Raises UserError where none is there, saying why.
    """
    if sys.platform != "linux":
        raise UserError(f"generated programs run only on Linux, whose kernel confines them; this is {sys.platform}: "
                        "run this task in a Linux container")
    reasons = []
    for mechanism in (BWRAP, FILTERS, *[UNSAFE] * unsafe):
        try:
            outcome = run("", [], limits, mechanism)
            if outcome.passed:
                return mechanism
            reasons.append(f"{mechanism}: {outcome.detail}")
        except RunError as error:
            reasons.append(str(error))
    raise UserError(f"this machine offers no sandbox for generated programs ({'; '.join(reasons)}): install bubblewrap "
                    "0.8 or newer (apt install bubblewrap), or as an ordinary user 'bd3lm_jax[sandbox]', or run them "
                    "without any protection with --unsafe_code_execution, which lets them do whatever you can do")


def run(program: str, tests: Sequence[str], limits: Limits, mechanism: str) -> Outcome:
    """Run the source text `program`, then `tests` one by one in its namespace; passed if none raises in time.

    The process starts with an empty environment, in an empty directory of its own. A test is sent to it when what came
    before has run. Raises RunError if the sandbox itself does not start.
    """
    with _directory(mechanism) as directory, _started(mechanism, directory, limits) as process:
        began = _exchange(process, "", time.monotonic() + GRACE_S)
        if began != "":
            _wait_for_end(process)
            assert process.stderr
            readable, _, _ = select.select([process.stderr], [], [], 0)
            reason = os.read(process.stderr.fileno(), 4 * ANSWER).decode(errors="replace") if readable else str(began)
            raise RunError(f"{mechanism} does not start: {reason.strip()[-ANSWER:]}")
        deadline = time.monotonic() + limits.wall_s
        for part in (program, *tests):
            problem = _exchange(process, part, deadline)
            if problem is None:
                return Outcome(False, f"TimeLimit: not done after {limits.wall_s:g} s")
            if problem:
                return Outcome(False, problem if problem != ENDED else _end_reason(process, limits))
    return Outcome(True, "")


def run_all(programs: Sequence[tuple[str, Sequence[str]]], limits: Limits, mechanism: str) -> list[Outcome]:
    """`run` of many (program, tests), as many at a time as this process has cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda one: run(one[0], one[1], limits, mechanism), programs))


ENDED = "Ended: without finishing its tests"


def _exchange(process: subprocess.Popen, part: str, deadline: float) -> str | None:
    """Have `part` run: "" if it was, the problem if not (ENDED if no answer came), None past the deadline.

    What counts as success is not known to the process before it is sent.
    """
    token = secrets.token_hex(16)
    assert process.stdin and process.stdout
    message, answer = json.dumps({"token": token, "part": part}).encode() + b"\n", b""
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        ready.register(process.stdin, selectors.EVENT_WRITE)
        while b"\n" not in answer and len(answer) < ANSWER:
            events = ready.select(deadline - time.monotonic()) if time.monotonic() < deadline else []
            if not events:
                return None
            for key, _ in events:
                if key.fileobj is process.stdout:
                    received = os.read(key.fd, ANSWER)
                    if not received:
                        return ENDED
                    answer += received
                    continue
                with contextlib.suppress(BrokenPipeError):
                    message = message[os.write(key.fd, message[:select.PIPE_BUF]):]
                    if message:
                        continue
                ready.unregister(process.stdin)
    if answer == token.encode() + b"\n":
        return ""
    return answer[:ANSWER].partition(b"\n")[0].decode(errors="replace") or "Ended: it answered nothing"


@contextlib.contextmanager
def _started(mechanism: str, directory: str, limits: Limits) -> Iterator[subprocess.Popen]:
    """The process, in a group of its own that is killed at the end."""
    root = os.geteuid() == 0
    if mechanism == FILTERS and root:
        raise RunError("filters are for ordinary users, and this is root")
    if mechanism == BWRAP and not shutil.which("bwrap"):
        raise RunError("bwrap is not installed")
    readable_paths = _readable_paths()
    filters = {"read": [*readable_paths, *DEVICES], "write": [directory, "/dev/null"]}
    job = {"limits": limits._asdict(), "user": secrets.choice(USERS) if root and mechanism == BWRAP else None,
           "filters": filters if mechanism == FILTERS else None, "shared": mechanism != BWRAP}
    # Not -I, which would ignore the fixed order of sets: nothing else is inherited either.
    command = [sys.executable, "-s", "-P", "-X", "utf8", str(CHILD), json.dumps(job)]
    environment = {"PATH": "/usr/bin:/bin", "HOME": directory, "TMPDIR": directory, "PYTHONHASHSEED": "0",
                   "OPENBLAS_NUM_THREADS": "1"}
    command = [*_bwrap(readable_paths, directory, root), *command] if mechanism == BWRAP else command
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   bufsize=0, cwd="/" if mechanism == BWRAP else directory, env=environment,
                                   start_new_session=True)
    except OSError as error:
        raise RunError(f"{mechanism} does not start: {error.strerror or error}") from None
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _bwrap(readable_paths: Sequence[str], directory: str, root: bool) -> list[str]:
    """Namespaces of all kinds, and a file system of the system's programs and Python, to read only. Root needs no
    namespace of users, and gives itself up inside."""
    users = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--unshare-ipc",
             "--unshare-pid", "--unshare-net", "--unshare-uts"] if root else ["--unshare-all", "--unshare-user",
                                                                              "--disable-userns"]
    binds = []
    for bind, paths in (("--ro-bind", readable_paths), ("--dev-bind", DEVICES)):
        for path in paths:  # --dir: with parents that all may enter, whatever they are outside
            binds += ["--dir", path if os.path.isdir(path) else os.path.dirname(path), bind, path, path]
    return ["bwrap", *users, "--die-with-parent", "--new-session", *binds, "--perms", "0777", "--size",
            str(TEMPORARY_MIB << 20), "--tmpfs", directory, "--chdir", directory, "--remount-ro", "/"]


def _readable_paths() -> list[str]:
    """What a program may read: the system's programs and libraries, and this Python with what is installed in it."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    python = [sys.base_prefix, sys.prefix, os.path.dirname(os.path.realpath(sys.executable)), *packages, str(CHILD)]
    return list(dict.fromkeys(path for path in (*SYSTEM, *python) if os.path.exists(path)))


@contextlib.contextmanager
def _directory(mechanism: str) -> Iterator[str]:
    """Where a program works: under bwrap in memory and gone with it, else a temporary directory.

    The system's `rm` removes directories of any depth; what a program made unreadable becomes readable before.
    """
    if mechanism == BWRAP:
        yield INSIDE
        return
    directory = tempfile.mkdtemp(prefix="program-")
    try:
        yield directory
    finally:
        for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            if os.path.exists(directory):
                subprocess.run([*command, "--", directory], stdin=subprocess.DEVNULL, capture_output=True)


def _wait_for_end(process: subprocess.Popen) -> None:
    """Until the process has ended, for a second at most; it is not reaped, so that its group keeps its number."""
    descriptor = os.pidfd_open(process.pid)
    try:
        select.select([descriptor], [], [], 1.0)
    finally:
        os.close(descriptor)


def _end_reason(process: subprocess.Popen, limits: Limits) -> str:
    """Why no answer came. bwrap ends with 128 + the signal that ended its program."""
    _wait_for_end(process)
    status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    ended_by = 0 if status is None else status.si_status - 128 * (status.si_code == os.CLD_EXITED)
    if ended_by == signal.SIGXCPU:
        return f"TimeLimit: not done after {limits.cpu_s} s of CPU time"
    return f"Killed: by signal {ended_by}" if ended_by > 0 else ENDED
