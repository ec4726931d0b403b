"""The watchdog: a stuck step ends the process with code 75 and says where, a living one is left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
STUCK = """
import sys, threading, time
from bd3lm_jax.watchdog import Watchdog
steps, seconds = int(sys.argv[1]), float(sys.argv[2])
def wait_for_a_peer_that_is_gone():
    threading.Event().wait()
with Watchdog(seconds, "no step finished") as watchdog:
    for _ in range(steps):
        time.sleep(0.3 * seconds)
        watchdog.done()
    print("steps", flush=True)
    if len(sys.argv) > 3:
        wait_for_a_peer_that_is_gone()
time.sleep(2 * seconds)
"""


def start(*arguments):
    return subprocess.Popen([sys.executable, "-c", STUCK, *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_stuck_step_ends_the_process():
    began = time.monotonic()
    process = start(2, 0.5, "stuck")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and out == "steps\n"
    assert "wait_for_a_peer_that_is_gone" in err
    assert err.splitlines()[-1] == "error: no step finished within 0.5 s: run the same command again"
    assert time.monotonic() - began > 2 * 0.15 + 0.5


def test_steps_that_finish_in_time_are_left_alone():
    """Eight steps take more than twice the limit, and after the block the limit means nothing."""
    process = start(8, 0.8)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "steps\n", "")


def test_zero_means_never():
    process = start(1, 0, "stuck")
    assert process.stdout.readline() == "steps\n"
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_time_in_which_the_process_was_stopped_does_not_count():
    process = start(0, 1.5, "stuck")
    assert process.stdout.readline() == "steps\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.3)
    assert process.poll() is None, "it was stopped for twice the limit"
    assert process.wait(60) == 75
    process.communicate()
