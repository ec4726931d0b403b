"""The doctor passes a healthy machine and says what is wrong with a sick one."""

import pytest

from bd3lm_jax import attention
from bd3lm_jax.evaluation import doctor
from bd3lm_jax.generation.sampling import reveal


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path))


def failed(report: dict) -> list[str]:
    assert report["ok"] == all(check["ok"] for check in report["checks"])
    return [check["check"] for check in report["checks"] if not check["ok"]]


def test_healthy(capsys):
    report = doctor.diagnose()
    captured = capsys.readouterr()
    assert failed(report) == []
    assert captured.out == "", "stdout is for the result"
    assert all(name in captured.err for name in doctor.CORE)
    said, = [check["detail"] for check in report["checks"] if check["check"] == "attention"]
    assert "one document a row: blocked (fastest on cpu" in said and "packed documents: blocked (fastest on cpu" in said


def test_attention_that_sees_too_much_is_found(monkeypatch):
    """A backend that lets noised tokens see every clean block, their own included."""
    def leaky(spec, noised, clean, cache):
        later = spec.noised.replace(block=spec.noised.block + 1)
        return attention.dense_attention(spec.replace(noised=later), noised, clean, cache)

    monkeypatch.setitem(attention.BACKENDS, "blocked", leaky)
    with pytest.raises(doctor.RunError, match="relative difference"):
        doctor._attention()


def test_sampler_that_draws_wrong_tokens_is_found(monkeypatch):
    monkeypatch.setattr(reveal, "sample_categorical", lambda keys, logits: logits.argmin(-1))
    with pytest.raises(doctor.RunError, match="every token is certain"):
        doctor._sampler()


def test_cache_directory_that_cannot_be_made_is_found(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BD3LM_CACHE", str(tmp_path / "file" / "cache"))
    check = doctor._check("cache directory", doctor._cache_directory)
    assert not check["ok"] and str(tmp_path / "file") in check["detail"]


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(doctor, "_attention", lambda: "")
    monkeypatch.setattr(doctor, "_sampler", lambda: "")
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("chex", "tokenizers") else "1.0")
    report = doctor.diagnose()
    assert failed(report) == ["core packages"]
    assert list(report["missing"]) == ["tokenizers"]
