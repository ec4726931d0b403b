"""`bench scaling` as a person starts it: work a device stays what it is, and what is sent is what rings send."""

import json
import os
import subprocess
import sys

import pytest
from toy_runs import ROOT

from bd3lm_jax.experiments.bench import scaling


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    done = subprocess.run([sys.executable, "-m", "launch", "bench", "scaling", f"--out={out}"], cwd=ROOT, text=True,
                          capture_output=True, timeout=600, env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MISSED" not in done.stderr and done.stderr.count("met:") == 6
    found = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert len(found) == 8
    return {(row["case"], row["devices"]): row for row in found}


@pytest.mark.ci_slow
def test_work_of_a_device_is_constant_and_what_is_counted(rows):
    for (kind, count), row in rows.items():
        alone = rows[kind, 1]
        assert row["mflops_needed"] == pytest.approx(alone["mflops_needed"], rel=0.01)  # but for constant adaLN
        assert row["mflops_counted"] == pytest.approx(alone["mflops_counted"], rel=0.01)
        assert row["mflops_compiled"] == pytest.approx(row["mflops_counted"], rel=0.1), (kind, count)
        assert row["flops_ratio"] == pytest.approx(1, abs=0.02)


@pytest.mark.ci_slow
def test_devices_send_what_rings_send(rows):
    layer = 4 * 128**2 + 2 * 128 * 512 + 512 + 128 + 2 * 128 + 128 * 6 * 128 + 6 * 128  # attention, MLP, norms, adaLN
    ends = 2 * 1152 * 128 + 1152 + 128 + 128 * 2 * 128 + 2 * 128  # embedding, output layer with its norm and adaLN
    condition = 256 * 128 + 128 + 128 * 128 + 128
    for (kind, count), row in rows.items():
        assert row["params"] == 2 * layer + ends + condition
        sent = sum(traffic["bytes"] for traffic in row["sent"].values())
        ring = 2 * (count - 1) / count * 4 * row["params"]
        if kind == "data":
            assert row["formula"] == pytest.approx(ring) and ring <= sent <= 1.15 * ring
        elif count > 1:
            assert row["sent"]["all-gather"]["bytes"] > 0.9 * (count - 1) / count * 4 * 2 * 12 * 128**2
            assert 0.5 * row["formula"] < sent < 1.2 * row["formula"], (sent, row["formula"])


def test_limits_are_for_every_mesh():
    assert {(limit.case, limit.variant) for limit in scaling.LIMITS} == {
        (kind, f"{count} devices") for kind in ("data", "fsdp") for count in (2, 4, 8)}
