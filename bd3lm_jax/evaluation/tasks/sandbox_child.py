"""The inside of the sandbox: started by `sandbox.py` as a script for each program, imports only the standard library
(and pyseccomp where seccomp is used). Linux only.

argv[1]: {"limits": {...}, "user": id to become or null, "filters": {"read": paths, "write": paths} or null, "shared":
whether other processes of its user count against its limit of processes}. stdin: lines {"token", "part"}; to each the
answer on stdout is one line, the token if the source text `part` ran, else what was wrong.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import struct
import sys
import types

OPEN_FILES = 64
NO_NEW_PRIVS = 38  # prctl.h
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls
LANDLOCK_VERSION = 3  # Linux 6.2, the first that keeps files from being cut
READ, ALL_ACCESS = 0b1101, (1 << 15) - 1  # landlock.h: execute, read files and directories; all of version 3
OF_FILES = 0b111 | 1 << 14  # execute, write, read, truncate
CLONE_NEW = 0x7E020000  # all kinds of namespaces (sched.h)
# What Python and ordinary programs call. The rest does not exist for them: sockets that connect, changes of modes,
# owners, times and attributes, memory without names, messages, keys, traces, signals to others, namespaces, mounts.
CALLS = """
access alarm arch_prctl brk chdir clock_getres clock_gettime clock_nanosleep close close_range copy_file_range creat dup
dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve execveat exit
exit_group faccessat faccessat2 fadvise64 fallocate fchdir fdatasync flock fork fstat fstatfs fsync ftruncate futex
futex_waitv getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpgid getpgrp getpid getppid
getpriority getrandom getresgid getresuid getrlimit getrusage getsid gettid gettimeofday getuid link linkat lseek lstat
madvise membarrier mkdir mkdirat mlock mmap mprotect mremap msync munlock munmap nanosleep newfstatat open openat
openat2 pause pipe pipe2 poll ppoll prctl pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2 read readahead
readlink readlinkat readv rename renameat renameat2 restart_syscall riscv_flush_icache rmdir rseq rt_sigaction
rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getparam sched_getscheduler sched_yield select sendfile set_robust_list set_tid_address
setitimer sigaltstack socketpair splice stat statfs statx symlink symlinkat sync_file_range sysinfo tee time
timerfd_create timerfd_gettime timerfd_settime times truncate umask uname unlink unlinkat vfork wait4 waitid write
writev
""".split()
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032)  # copies, flags, locks, sizes of pipes; none that sends signals
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # terminals: state, size; bytes waiting, blocking, on exec

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    job = json.loads(sys.argv[1])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # the first to go when memory runs out
    others = processes_of(os.getuid()) if job["shared"] else 0
    if job["user"] is not None:
        os.setgroups([])
        os.setresgid(*[job["user"]] * 3)
        os.setresuid(*[job["user"]] * 3)
    set_limits(job["limits"], others)
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    if job["filters"] is not None:
        confine_files(**job["filters"])
        confine_calls()
    inbox, outbox, nowhere = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    execute(os.fdopen(inbox, "rb"), outbox)


def set_limits(limits: dict, others: int) -> None:
    """others: processes of the same user that count as well."""
    for what, limit in ((resource.RLIMIT_CPU, limits["cpu_s"]), (resource.RLIMIT_AS, limits["memory_mib"] << 20),
                        (resource.RLIMIT_FSIZE, limits["file_mib"] << 20), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_MSGQUEUE, 0),
                        (resource.RLIMIT_NPROC, others + limits["processes"])):
        allowed = resource.getrlimit(what)[1]
        hard = limit + (what == resource.RLIMIT_CPU)  # SIGXCPU says that it was the time, SIGKILL comes a second later
        hard = hard if allowed == resource.RLIM_INFINITY else min(hard, allowed)
        resource.setrlimit(what, (min(limit, hard), hard))


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


def confine_files(read: list[str], write: list[str]) -> None:
    """From now on only these files, and what is below these directories, can be opened (Landlock)."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < LANDLOCK_VERSION:
        sys.exit(f"the kernel's Landlock is of version {max(version, 0)}, expected {LANDLOCK_VERSION} (Linux 6.2)")
    rules = libc.syscall(LANDLOCK_CREATE, ctypes.byref(ctypes.c_uint64(ALL_ACCESS)), 8, 0)
    for paths, rights in ((read, READ), (write, ALL_ACCESS)):
        for path in paths:
            place = os.open(path, os.O_PATH)
            access = rights if os.path.isdir(path) else rights & OF_FILES
            if libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("<Qi", access, place), 0):
                sys.exit(f"Landlock does not take {path}: {os.strerror(ctypes.get_errno())}")
            os.close(place)
    if libc.syscall(LANDLOCK_RESTRICT, rules, 0):
        sys.exit(f"Landlock does not start: {os.strerror(ctypes.get_errno())}")
    os.close(rules)


def confine_calls() -> None:
    """From now on the kernel answers only CALLS (seccomp)."""
    try:
        from pyseccomp import ALLOW, EQ, ERRNO, MASKED_EQ, Arg, SyscallFilter  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        sys.exit(f"seccomp is not there ({error}): pip install pyseccomp, and the system's libseccomp2")
    rules = SyscallFilter(ERRNO(errno.ENOSYS))
    allowed = [(name,) for name in CALLS]
    allowed += [("fcntl", Arg(1, EQ, command)) for command in FCNTL]
    allowed += [("ioctl", Arg(1, EQ, command)) for command in IOCTL]
    allowed += [("clone", Arg(0, MASKED_EQ, CLONE_NEW, 0)), ("prlimit64", Arg(0, EQ, 0)),
                ("tgkill", Arg(0, EQ, os.getpid()))]
    for name, *conditions in allowed:
        with contextlib.suppress(OSError):  # a call that this processor does not have
            rules.add_rule(ALLOW, name, *conditions)
    rules.load()


def execute(inbox, outbox: int, *, compile=compile, exec=exec, getpid=os.getpid, loads=json.loads, write=os.write,
            leave=os._exit, answer_bytes=400) -> None:
    """Run the source texts in one namespace and answer; a program that redefines a builtin changes none of ours."""
    module = sys.modules["program"] = types.ModuleType("program")
    own_pid = getpid()
    try:
        for line in iter(inbox.readline, b""):
            message = loads(line)
            exec(compile(message["part"], "<program>", "exec", dont_inherit=True), module.__dict__)
            if getpid() != own_pid:  # a process that the program forked
                break
            write(outbox, message["token"].encode() + b"\n")
    except BaseException as error:
        if getpid() == own_pid:
            error_line = f"{type(error).__name__}: {error}".encode(errors="replace")[:answer_bytes]
            write(outbox, error_line.replace(b"\n", b" ") + b"\n")
    finally:
        leave(0)


if __name__ == "__main__":
    main()
