"""Settings by preference: from a measured file, from the run directory, from presets; what is given by hand wins."""

import json

import pytest
from toy_lm import make_lm, masked

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.diffusion import AR
from bd3lm_jax.evaluation.settings import FILE, PREFERENCES, PRESETS, merge_settings, settings_for
from bd3lm_jax.generation.options import check_options, make_options
from bd3lm_jax.lm import LM, CheckpointId

MEASURED = {"quality": {"sampler": "first_hitting"}, "balanced": {"sampler": "factor", "threshold": 1.0},
            "speed": {"sampler": "confidence", "steps": 2}, "measured": []}


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def test_no_preference_is_no_setting(tmp_path):
    write(tmp_path / FILE, MEASURED)
    assert settings_for(make_lm(), str(tmp_path), "", "") == ({}, "defaults")


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_files_go_before_presets(tmp_path, prefer):
    lm = make_lm(masked(4))
    found, source = settings_for(lm, str(tmp_path), "", prefer)
    assert found == PRESETS[prefer] and "not measured" in source
    check_options(lm, make_options(**found))
    write(tmp_path / FILE, MEASURED)
    assert settings_for(lm, str(tmp_path), "", prefer)[0] == MEASURED[prefer]
    other = write(tmp_path / "other.json", {prefer: {"temperature": 0.5}})
    assert settings_for(lm, str(tmp_path), other, prefer) == ({"temperature": 0.5}, f"{prefer} of {other}")


def test_files_without_a_preference(tmp_path):
    plain = write(tmp_path / "plain.json", {"sampler": "margin", "top_p": 0.9})
    assert settings_for(make_lm(), "none", plain, "")[0] == {"sampler": "margin", "top_p": 0.9}
    measured = write(tmp_path / "measured.json", MEASURED)
    assert settings_for(make_lm(), "none", measured, "")[0] == MEASURED["balanced"]


@pytest.mark.parametrize("trained, said", [
    (CheckpointId(9, "abc"), ""), (None, ""), (CheckpointId(18, "abc"), "measured at step 9, and this is step 18"),
    (CheckpointId(9, "xyz"), "measured on a model of another config")])
def test_a_file_that_was_measured_on_another_checkpoint(tmp_path, capsys, trained, said):
    lm = make_lm(masked(4))
    lm = LM(lm.config, lm.params, None, lm.model, lm.context, trained)
    path = write(tmp_path / FILE, {**MEASURED, "step": 9, "config_sha256": "abc"})
    found, source = settings_for(lm, str(tmp_path), "", "speed")
    assert found == MEASURED["speed"] and source == f"speed of {path}" + (f", {said}" if said else "")
    err = capsys.readouterr().err
    assert len(err.splitlines()) == (said != "") and said in err


@pytest.mark.parametrize("objective", [AR(bos=True), masked(1)])
def test_models_of_one_token_a_call_have_one_preset(objective):
    for prefer in PREFERENCES:
        assert settings_for(make_lm(objective), "none", "", prefer)[0] == {"sampler": "first_hitting"}


@pytest.mark.parametrize("given, expected", [
    ({}, {"sampler": "confidence", "steps": 2, "block_size": 8}),
    ({"steps": 4}, {"sampler": "confidence", "steps": 4, "block_size": 8}),
    ({"sampler": "confidence"}, {"sampler": "confidence", "steps": 2, "block_size": 8}),
    ({"sampler": "threshold"}, {"sampler": "threshold", "block_size": 8}),
    ({"sampler": "margin", "steps": 1}, {"sampler": "margin", "steps": 1, "block_size": 8})])
def test_what_is_given_wins(given, expected):
    assert merge_settings({"sampler": "confidence", "steps": 2, "block_size": 8}, given) == expected


@pytest.mark.parametrize("content, prefer, message", [
    ('{"quality": {}}', "speed", "has no settings for --prefer=speed"),
    ('{"sampler": "margin"}', "speed", "has no settings for --prefer=speed"),
    ('{"speed": 3}', "speed", "has no settings for --prefer=speed"),
    ("[1]", "", "holds a JSON list, expected an object"), ("{", "", "is not valid JSON"),
    (None, "speed", "cannot read .*No such file")])
def test_bad_files(tmp_path, content, prefer, message):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        settings_for(make_lm(), "none", str(path), prefer)
