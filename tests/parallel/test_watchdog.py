"""The watchdog: a stuck step ends the process with code 75 and says where, a living one is left alone."""

import os
import signal
import subprocess
import sys
import time

import pytest
from places import ROOT

from bd3lm_jax.parallel.watchdog import Watchdog

STUCK = """
import sys, threading, time
from bd3lm_jax.parallel.watchdog import Watchdog
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


@pytest.mark.ci_slow
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


@pytest.mark.ci_slow
def test_a_process_that_was_stopped_goes_on():
    """For longer than the limit, of which most is left to a machine with other work."""
    process = start(0, 8, "stuck")
    assert process.stdout.readline() == "steps\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(9)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.3)
    assert process.poll() is None, "it was stopped for more than the limit"
    assert process.wait(120) == 75
    process.communicate()


class Ends(Exception):
    """Instead of the end of the process."""


@pytest.mark.parametrize(("late", "news", "looks"), [
    ({}, (), 50),  # the limit is 50 looks
    (dict.fromkeys(range(1, 100), 1.0), (), 25),  # a busy machine: every look takes twice as long, and all of it counts
    ({1: 1000.0}, (), 46), ({30: 49.0}, (), 46), ({10: 1000.0, 20: 1000.0}, (), 42),  # stopped: as much as five looks
    ({10: 1000.0}, (20,), 70), ({}, (50,), 100), ({60: 1000.0}, (50,), 96)])
def test_the_looks_until_the_end(monkeypatch, late, news, looks):
    """By a scripted clock. late: looks more that one takes, by its number; news: when a step has finished."""
    watchdog = Watchdog(50.0, "no step finished")
    now, number = 0.0, 0

    class Closed:
        def wait(self, interval):
            nonlocal now, number
            number += 1
            now += interval * (1 + late.get(number, 0))
            if number in news:
                watchdog.done()

    def end(self):
        raise Ends

    monkeypatch.setattr("bd3lm_jax.parallel.watchdog.time.monotonic", lambda: now)
    monkeypatch.setattr(Watchdog, "_terminate", end)
    watchdog._closed = Closed()
    with pytest.raises(Ends):
        watchdog._watch()
    assert number == looks
