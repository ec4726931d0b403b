"""The inside of the sandbox: started by `sandbox.py` as a script for each program, imports only the standard library.

Two processes. The supervisor (this one) takes the limits and the isolation upon itself and forks; it keeps the time,
and draws a secret after the fork. The child runs the program and its tests; only then does it read the secret from a
pipe and send it back. Whatever else a program does, it does not have the secret in its memory before. Linux only.

stdin: {"parts": source texts, "limits": {...}}; stdout: the fields of `sandbox.Outcome`.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import types

NOBODY = 65534
NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000  # user, pid, net, ipc (sched.h)
PDEATHSIG, SUBREAPER, NO_NEW_PRIVS = 1, 36, 38  # prctl.h
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls
WRITE_FILE, REMOVE_AND_MAKE, TRUNCATE = 1 << 1, 0b1111111110000, 1 << 14  # landlock.h
ANSWER = 500  # bytes of a verdict: less than a pipe writes at once
SECRET = 16

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    job = json.load(sys.stdin)
    limits = job["limits"]
    isolation = isolate(limits)
    secret_out, secret_in = os.pipe()
    verdict_out, verdict_in = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(secret_in)
        os.close(verdict_out)
        execute(job["parts"], secret_out, verdict_in)
    os.close(verdict_in)
    secret = os.urandom(SECRET)
    os.write(secret_in, secret)
    in_time = select.select([verdict_out], [], [], limits["wall_s"])[0]
    answer = os.read(verdict_out, ANSWER) if in_time else b""
    status = end(child)
    passed = answer == secret
    detail = "" if passed else answer.decode(errors="replace") or how_it_ended(status, bool(in_time), limits)
    print(json.dumps({"passed": passed, "detail": detail, "isolation": isolation}))


def isolate(limits: dict) -> list[str]:
    """Give up what no program needs; the names of what the kernel could isolate. Exits where root cannot be left."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # the first to go when memory runs out
    root = os.geteuid() == 0
    if root:
        # Files of root stay readable where Python is one of them; the real user is what the process limit counts.
        files_as = NOBODY if readable_by(NOBODY) else 0
        os.chown(".", files_as, files_as)
        os.setgroups([])
        os.setresgid(NOBODY, files_as, files_as)
        os.setresuid(NOBODY, files_as, files_as)
    libc.prctl(SUBREAPER, 1, 0, 0, 0)
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    unseen = libc.unshare(NAMESPACES) == 0
    written = confine_writes()
    if root and files_as == 0 and not (unseen and written):
        sys.exit(f"as root it needs namespaces and Landlock, or a Python that every user can read, not {sys.prefix}: "
                 "run as an ordinary user, or with a system Python")
    others = 0 if unseen else processes_of(os.getuid())
    for what, limit in ((resource.RLIMIT_CPU, limits["cpu_s"]), (resource.RLIMIT_AS, limits["memory_mib"] << 20),
                        (resource.RLIMIT_FSIZE, limits["file_mib"] << 20), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_NPROC, others + limits["processes"] + 1)):  # 1: the supervisor
        allowed = resource.getrlimit(what)[1]
        limit = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
        resource.setrlimit(what, (limit, limit))
    return ["processes", "network"] * unseen + ["files"] * written


def readable_by(user: int) -> bool:
    """Whether `user` can read the standard library and what is installed."""
    os.setresuid(-1, user, -1)
    try:
        return all(os.access(path, os.R_OK, effective_ids=True) for path in (os.__file__, sys.prefix))
    finally:
        os.setresuid(-1, 0, -1)


def processes_of(user: int) -> int:
    """Processes and threads of a user, as the kernel counts them."""
    total = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{process}").st_uid == user:
                total += len(os.listdir(f"/proc/{process}/task"))
        except OSError:
            continue  # it has ended
    return total


def confine_writes() -> bool:
    """From now on files change only in the current directory (Landlock, Linux 5.13); False where there is none."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    file_access = WRITE_FILE | (TRUNCATE if version >= 3 else 0)
    handled = ctypes.c_uint64(file_access | REMOVE_AND_MAKE)
    rules = libc.syscall(LANDLOCK_CREATE, ctypes.byref(handled), 8, 0)
    for path, access in ((".", handled.value), ("/dev/null", file_access)):
        place = os.open(path, os.O_PATH)
        libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("<Qi", access, place), 0)
        os.close(place)
    restricted = libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return restricted


def execute(parts: list[str], secret_out: int, verdict_in: int, *, compile=compile, exec=exec, getpid=os.getpid,
            read=os.read, write=os.write, leave=os._exit) -> None:
    """Run the source texts in one namespace and answer; a program that redefines a builtin changes none of ours."""
    os.setsid()
    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    module = sys.modules["program"] = types.ModuleType("program")
    me = getpid()
    try:
        for part in parts:
            exec(compile(part, "<program>", "exec", dont_inherit=True), module.__dict__)
        if getpid() == me:  # not a process that the program forked
            write(verdict_in, read(secret_out, SECRET))
    except BaseException as error:
        if getpid() == me:
            write(verdict_in, f"{type(error).__name__}: {error}".encode(errors="replace")[:ANSWER])
    finally:
        leave(0)


def end(child: int) -> int:
    """Kill the child and all that it started; returns the status with which it ended.

    In a namespace of its own the kernel ends all with the child; else orphans come to this process, their reaper.
    """
    os.kill(child, signal.SIGKILL)
    status, waiting = 0, True
    while waiting:
        for orphan in children():
            os.kill(orphan, signal.SIGKILL)
        try:
            ended, how = os.waitpid(-1, 0)
            status = how if ended == child else status
        except ChildProcessError:
            waiting = False
    return status


def children() -> list[int]:
    """Processes whose parent this one is."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(number) for number in file.read().split()]
    except OSError:
        return []


def how_it_ended(status: int, in_time: bool, limits: dict) -> str:
    if not in_time:
        return f"TimeLimit: not done after {limits['wall_s']:g} s"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if used.ru_utime + used.ru_stime > 0.8 * limits["cpu_s"]:  # the limit counts ticks, the usage is measured
        return f"TimeLimit: not done after {limits['cpu_s']} s of CPU time"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        return f"Killed: by signal {os.WTERMSIG(status)}"
    return "Ended: without finishing its tests"


if __name__ == "__main__":
    main()
