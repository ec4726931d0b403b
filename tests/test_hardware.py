import types

import pytest

from bd3lm_jax import hardware


@pytest.mark.parametrize(("kind", "name"), [
    ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"),
])
def test_what_jax_calls_them(kind, name):
    assert hardware.find(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", ""])
def test_others_are_not_known(kind):
    assert hardware.find(kind) is None


def test_utilisation_is_flops_over_peak():
    devices = [types.SimpleNamespace(device_kind="TPU v5 lite")] * 8
    assert hardware.utilisation(197e12 * 8 * 3, 6.0, devices) == pytest.approx(0.5)
    assert hardware.utilisation(1e12, 1.0, [types.SimpleNamespace(device_kind="cpu")]) is None


@pytest.mark.parametrize("device", hardware.ACCELERATORS.values(), ids=lambda device: device.name)
def test_figures_are_in_range(device):
    assert 1e14 < device.peak_flops < 1e15 and 8e11 < device.memory_bandwidth < 5e12
    assert 15e9 < device.usable_memory < device.memory < 150e9 and 1e11 < device.links_bandwidth < 1e12
    # Matrix products of a few hundred tokens keep each of them busy, as performance engineers quote for these devices.
    assert 150 < device.peak_flops / device.memory_bandwidth < 600
