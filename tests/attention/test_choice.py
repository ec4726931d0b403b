"""Which backend runs where, and what is said about it."""

import logging

import jax
import jax.numpy as jnp
import pytest
from oracle import make_tokens, two_stream_spec

from bd3lm_jax import attention
from bd3lm_jax.attention import gpu, splash
from bd3lm_jax.attention.spec import MaskSpec
from bd3lm_jax.core.errors import UserError


@pytest.fixture(autouse=True)
def said(caplog):
    attention._warn_once.cache_clear()
    caplog.set_level(logging.INFO, "bd3lm_jax")
    return caplog


def choose(backend, platform, length=256, head_size=64, dtype=jnp.bfloat16, one_document=True, **spec):
    mask = two_stream_spec([[length]], length, 16).replace(one_document=one_document, **spec)
    noised = (jax.ShapeDtypeStruct((1, 1, length, 4, head_size), dtype),) * 3
    clean = (jax.ShapeDtypeStruct((1, length - 16, 4, head_size), dtype),) * 3
    return attention.choose(backend, mask, noised, clean, platform)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_decoding_and_tiny_rows_are_dense(platform):
    cache = make_tokens([[16]], 16, 16, 0)
    for backend in ("auto", *attention.BACKENDS):
        assert choose(backend, platform, aligned=False).name == "dense"
        assert choose(backend, platform, cache=cache).name == "dense"
    assert choose("auto", platform, length=attention.SMALL) == ("dense", "64 tokens a row, at most 64")


def test_one_stream_counts_its_own_tokens():
    for length, name in ((64, "dense"), (65, "blocked")):
        spec = MaskSpec("causal", 1, True, True, None, make_tokens([[length]], length, 1, 0), None)
        assert attention.choose("auto", spec, None, (None, jnp.zeros((1, length, 1, 8)), None), "cpu").name == name


def test_cpu_takes_tiles_and_says_nothing(said):
    assert choose("auto", "cpu") == ("blocked", "fastest on cpu")
    assert not said.records


def test_gpu_takes_cudnn_once_it_has_proved_itself(monkeypatch, said):
    monkeypatch.setattr(gpu, "self_check", lambda head_size, dtype, share: None)
    assert choose("auto", "gpu") == ("gpu", "fastest on gpu")
    assert choose("gpu", "gpu") == ("gpu", "asked for")
    assert not said.records


@pytest.mark.parametrize("settings, reason", [
    ({"dtype": jnp.float32}, "float32"), ({"head_size": 60}, "not 60"), ({"one_document": False}, "segments"),
    ({}, "off"),
])
def test_gpu_falls_back_with_one_line(monkeypatch, said, settings, reason):
    monkeypatch.setattr(gpu, "self_check", lambda head_size, dtype, share: "off")
    for _ in range(2):
        name, why = choose("auto", "gpu", **settings)
        assert name == "blocked" and reason in why
    line, = [record.getMessage() for record in said.records]
    assert line.startswith("attention runs on 'blocked', not on 'gpu': ") and reason in line
    with pytest.raises(UserError, match=f"'gpu' cannot run here: .*{reason}.*; use 'auto' or 'blocked'"):
        choose("gpu", "gpu", **settings)


def test_backends_on_the_wrong_device_are_refused():
    with pytest.raises(UserError, match="'gpu' cannot run here: it needs an NVIDIA GPU, and this is a CPU; use 'auto'"):
        choose("gpu", "cpu")
    with pytest.raises(UserError, match="'splash' cannot run here: it needs a TPU, and this is a GPU; use 'auto'"):
        choose("splash", "gpu")
    for platform in ("cpu", "gpu", "tpu"):
        assert choose("dense", platform).name == "dense" and choose("blocked", platform).name == "blocked"


def test_unknown_backend_names_the_nearest():
    with pytest.raises(UserError, match="'blokced'.*did you mean 'blocked'"):
        choose("blokced", "cpu")


def test_tpu_takes_splash_where_it_can(monkeypatch, said):
    monkeypatch.setattr(splash, "unsupported_reason", lambda spec, head_size, dtype, tokens: None)
    assert choose("auto", "tpu") == ("splash", "fastest on tpu")
    assert not said.records
    monkeypatch.setattr(splash, "unsupported_reason",
                        lambda *arguments: f"no {arguments[1]}, {arguments[2]}, {arguments[3]}")
    assert choose("auto", "tpu") == ("blocked", "'splash' cannot run: no 64, bfloat16, 256")
    assert [record.getMessage() for record in said.records] == [
        "attention runs on 'blocked', not on 'splash': no 64, bfloat16, 256"]
    with pytest.raises(UserError, match="'splash' cannot run here: no 64, bfloat16, 256"):
        choose("splash", "tpu")


def test_splash_off_a_tpu_is_slow_and_says_so(monkeypatch, said):
    monkeypatch.setattr(splash, "unsupported_reason", lambda spec, head_size, dtype, tokens: None)
    assert [choose("splash", "cpu").name for _ in range(2)] == ["splash"] * 2
    assert len(said.records) == 1 and "interpreted off a TPU" in said.text


def test_platform_is_that_of_the_mesh():
    assert attention.target_platform() == jax.default_backend()
    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention.target_platform() == "tpu"
