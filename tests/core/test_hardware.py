import types

import pytest

from bd3lm_jax.core import hardware


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


# What the makers print: TFLOP/s, memory, GB/s of links in both directions together.
PRINTED = {
    "v4": (275, 32 * 2**30, 2 * 6 * 50),  # docs.cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433
    "v5e": (197, 16 * 2**30, 400),  # docs.cloud.google.com/tpu/docs/v5e
    "v5p": (459, 95 * 2**30, 1200),  # docs.cloud.google.com/tpu/docs/v5p
    "v6e": (918, 32 * 2**30, 800),  # docs.cloud.google.com/tpu/docs/v6e
    "H100": (1979 / 2, 80e9, 900),  # NVIDIA H100 data sheet, SXM; 1979 is "with sparsity"
    "H200": (1979 / 2, 141e9, 900),  # NVIDIA H200 data sheet, SXM
}


@pytest.mark.parametrize("device", hardware.ACCELERATORS.values(), ids=lambda device: device.name)
def test_figures_are_those_of_the_makers(device):
    tflops, memory, links_gbps = PRINTED[device.name]
    assert device.peak_flops == pytest.approx(tflops * 1e12, rel=1e-3) and device.memory == memory
    assert device.links_bandwidth == links_gbps * 1e9 / 2
    assert 0.7 * memory < device.usable_memory < memory
