import dataclasses
import hashlib
import json
import re

import pytest
from toy_runs import toy_config

from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.config import Config, decisive_hash
from bd3lm_jax.core import migrations
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.tokenizers import ByteTokenizer, get_tokenizer

BYTES = ByteTokenizer()


@pytest.fixture
def config(tmp_path):
    return rundir.resolve(toy_config(tmp_path), BYTES)


def test_the_vocabulary_is_the_tokenizers_with_its_mask(tmp_path, config):
    assert config.model.vocab_size == 258  # 256 bytes, end, mask
    larger = toy_config(tmp_path, {"model.vocab_size": 300})
    assert rundir.resolve(larger, BYTES) == larger
    with pytest.raises(UserError, match="model.vocab_size=257 is smaller than the 258 ids of tokenizer 'bytes'.*-1"):
        rundir.resolve(toy_config(tmp_path, {"model.vocab_size": 257}), BYTES)


def test_what_is_claimed_is_read_back(tmp_path, config):
    rundir.create_or_validate(tmp_path / "deep" / "run", config, BYTES)
    there, tokenizer = rundir.read(tmp_path / "deep" / "run")
    assert there == config and tokenizer.identity == BYTES.identity
    stored = json.loads((tmp_path / "deep" / "run" / "config.json").read_text())
    assert stored.pop("config_sha256") == config.sha256()
    assert stored.pop("files_sha256") == {"tokenizer.json": hashlib.sha256(BYTES.to_bytes()).hexdigest()}
    assert re.fullmatch("[0-9a-f]{8}", stored.pop("crc32"))
    assert Config.from_dict(stored) == config
    assert {path.name for path in (tmp_path / "deep" / "run").iterdir()} == {"config.json", "tokenizer.json"}


def test_what_all_processes_must_see_there(tmp_path, config):
    assert rundir.shared_state(tmp_path / "run") == {"config.json": None, "newest checkpoint": None}
    rundir.create_or_validate(tmp_path / "run", config, BYTES)
    for name in ("9", "10", ".trash", "11.orbax-checkpoint-tmp"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    first = rundir.shared_state(tmp_path / "run")
    assert first["newest checkpoint"] == 10 and len(first["config.json"]) == 12
    (tmp_path / "run" / "config.json").write_text("{}")
    assert rundir.shared_state(tmp_path / "run")["config.json"] != first["config.json"]


def test_a_chat_template_beside_the_tokenizer_is_kept(tmp_path, config):
    """With the names of the tokens that it writes; what lies beside a tokenizer without one is not."""
    source, kept = tmp_path / "source", {"chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"}
    source.mkdir()
    BYTES.save(source / "tokenizer.json")
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (source / "special_tokens_map.json").write_text('{"unk_token": "<unk>"}')
    for index, spec in enumerate((source, source / "tokenizer.json")):
        ours = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(spec)))
        rundir.create_or_validate(tmp_path / f"without{index}", ours, BYTES)
        assert not kept & {path.name for path in (tmp_path / f"without{index}").iterdir()}
        (source / "chat_template.jinja").write_text("{{ bos_token }}")
        rundir.create_or_validate(tmp_path / f"with{index}", ours, BYTES)
        for name in kept:
            assert (tmp_path / f"with{index}" / name).read_bytes() == (source / name).read_bytes()
        (tmp_path / f"with{index}" / "config.json").unlink()
        rundir.create_or_validate(tmp_path / f"with{index}", ours, BYTES)  # killed before the config was written
        (source / "chat_template.jinja").unlink()


def test_a_claim_may_be_repeated_with_what_does_not_change_the_run(tmp_path, config):
    workdir = tmp_path / "run"
    rundir.create_or_validate(workdir, config, BYTES)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=99),
                                 compute=dataclasses.replace(config.compute, microbatch=2),
                                 mesh=dataclasses.replace(config.mesh, data=1))
    rundir.create_or_validate(workdir, longer, BYTES)
    assert rundir.read(workdir)[0] == longer
    other = dataclasses.replace(longer, seed=7, train=dataclasses.replace(longer.train, batch_size=16))
    with pytest.raises(UserError, match="another config .seed: 7 != 0; train.batch_size: 16 != 8; here != there"):
        rundir.create_or_validate(workdir, other, BYTES)
    assert rundir.read(workdir)[0] == longer


def test_another_tokenizer_is_refused(tmp_path, config):
    rundir.create_or_validate(tmp_path / "run", config, BYTES)
    other = get_tokenizer("bert-base-uncased", tuple)
    with pytest.raises(UserError, match=f"tokenizer {other.identity} does not match the run in .*{BYTES.identity}"):
        rundir.create_or_validate(tmp_path / "run", config, other)
    rundir.check_tokenizer(BYTES, BYTES.identity, "the checkpoint")


def test_directories_that_are_none_of_ours(tmp_path, config):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "full" / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="full holds metrics.jsonl and no config.json: choose another --workdir"):
        rundir.create_or_validate(tmp_path / "full", config, BYTES)
    (tmp_path / "full" / "metrics.jsonl").unlink()
    (tmp_path / "full" / rundir.TOKENIZER).write_text("{}")
    with pytest.raises(UserError, match="full holds another tokenizer.json and no config.json"):
        rundir.create_or_validate(tmp_path / "full", config, BYTES)
    for place in ("full/letter.txt", "full/letter.txt/run"):
        with pytest.raises(UserError, match=r"cannot write in .*letter\.txt.*; choose another --workdir"):
            rundir.create_or_validate(tmp_path / place, config, BYTES)
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    rundir.create_or_validate(tmp_path / "empty", config, BYTES)


def test_what_schedulers_and_file_systems_leave_is_no_conflict(tmp_path, config):
    for name in ("lost+found", "wandb", "logs"):
        (tmp_path / name).mkdir()
    for name in ("slurm-17.out", ".nfs0000000000a1", "train.log"):
        (tmp_path / name).write_text("a line\n")
    rundir.create_or_validate(tmp_path, config, BYTES)
    assert rundir.read(tmp_path)[0] == config
    assert (tmp_path / "train.log").read_text() == "a line\n"


def test_reading_what_is_not_there(tmp_path, config):
    with pytest.raises(UserError, match="no run directory .*absent: train first"):
        rundir.read(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no config.json: expected a directory written by"):
        rundir.read(tmp_path)
    rundir.create_or_validate(tmp_path / "run", config, BYTES)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        rundir.read(tmp_path / "run")
    written = {"seed": 0, "modle": {}}  # by a later version
    path.write_text(json.dumps(written | {"config_sha256": decisive_hash(written)}))
    with pytest.raises(UserError, match="unknown config key 'modle': did you mean 'model'"):
        rundir.read(tmp_path / "run")
    path.write_text('{"hidden_size": 64, "architectures": ["GPTNeoXForCausalLM"]}')
    with pytest.raises(UserError, match="has no model_type, .*supported: bd3lm, .*llama, .*modernbert"):
        rundir.read(tmp_path / "run")


def test_claim_goes_on_after_a_kill_between_its_two_files(tmp_path, config):
    (tmp_path / "run").mkdir()
    BYTES.save(tmp_path / "run" / rundir.TOKENIZER)
    rundir.create_or_validate(tmp_path / "run", config, BYTES)
    assert rundir.read(tmp_path / "run")[0] == config


def test_a_directory_of_an_earlier_version_goes_on_as_it_was(tmp_path, config):
    """Keys that were added since are not in its config.json."""
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, keep_best=0))
    rundir.create_or_validate(tmp_path / "run", config, BYTES)
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    for section, keys in {**migrations.MIGRATIONS, "diffusion": migrations.MIGRATIONS_BY_KIND["masked"],
                          "model": migrations.MIGRATIONS_BY_KIND["dit"]}.items():
        stored[section] = {key: value for key, value in stored[section].items() if key not in keys}
    for key in ("noise", "crc32", "files_sha256", "config_sha256"):
        del stored[key]
    path.write_text(json.dumps(stored | {"config_sha256": decisive_hash(stored)}))
    assert rundir.read(tmp_path / "run")[0] == config
    rundir.create_or_validate(tmp_path / "run", config, BYTES)


def damage(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1, old
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(("old", "new"), [
    ('"rope_theta": ', '"rope_theta": 1'), ('"valid_fraction": 0.1', '"valid_fraction": 0.2'),
    ('"block_size": ', '"block_size": 3'), ('"seed": 0', '"seed": 1'), ('"config_sha256": "', '"config_sha256": "f'),
    ('"config_sha256"', '"config_sha255"')])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_config_that_was_changed_is_refused(tmp_path, config, old, new, sealed):
    """Also one of an earlier version, which had no checksum but the hash of what decides the run."""
    rundir.create_or_validate(tmp_path / "run", config, BYTES)
    path = tmp_path / "run" / "config.json"
    if not sealed:
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({key: x for key, x in stored.items() if key not in ("crc32", "files_sha256")}))
        assert rundir.read(tmp_path / "run")[0] == config
    damage(path, old, new)
    for use in (lambda: rundir.read(tmp_path / "run"),
                lambda: rundir.create_or_validate(tmp_path / "run", config, BYTES),
                lambda: rundir.planned_steps(tmp_path / "run")):
        with pytest.raises(UserError, match="config.json was changed since training wrote it.*in another --workdir"):
            use()


def test_changes_that_decide_nothing_are_told(tmp_path, config, capsys):
    rundir.create_or_validate(tmp_path / "run", config, BYTES)
    damage(tmp_path / "run" / "config.json", f'"mc_samples": {config.eval.mc_samples}', '"mc_samples": 77')
    assert rundir.read(tmp_path / "run")[0].eval.mc_samples == 77
    assert "config.json was changed since training wrote it, in keys that do not decide" in capsys.readouterr().err
    rundir.create_or_validate(tmp_path / "run", config, BYTES)
    assert rundir.read(tmp_path / "run")[0] == config


def test_files_beside_the_config_are_those_of_the_start(tmp_path, config):
    source = tmp_path / "source"
    source.mkdir()
    BYTES.save(source / "tokenizer.json")
    (source / "chat_template.jinja").write_text("{{ bos_token }}")
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    ours = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(source)))
    rundir.create_or_validate(tmp_path / "run", ours, BYTES)
    for name in ("chat_template.jinja", "tokenizer.json", "special_tokens_map.json",
                 "additional_chat_templates/rag.jinja"):
        (tmp_path / "run" / name).write_bytes((source / name).read_bytes() + b" ")
        with pytest.raises(UserError, match=f"{name} is not the file that the run was started with.*restore it"):
            rundir.read(tmp_path / "run")
        rundir.create_or_validate(tmp_path / "run", ours, BYTES)
        assert rundir.read(tmp_path / "run")[0] == ours


def test_what_a_run_makes_anew_whose_directory_was_moved_is_no_obstacle(tmp_path, config):
    (tmp_path / "run" / "checkpoints" / ".trash").mkdir(parents=True)
    (tmp_path / "run" / "plots").mkdir()
    (tmp_path / "run" / "train.lock").write_text("")
    rundir.create_or_validate(tmp_path / "run", config, BYTES)
    assert (tmp_path / "run" / "config.json").exists()
    (tmp_path / "other" / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "10" / "params").write_text("")
    with pytest.raises(UserError, match="holds checkpoints and no config.json"):
        rundir.create_or_validate(tmp_path / "other", config, BYTES)
