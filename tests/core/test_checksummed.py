"""Every flipped bit of a sealed file is found or changes no value; what earlier versions wrote without a seal is read.
"""

import json
import zlib

import numpy as np
import pytest

from bd3lm_jax.core import log
from bd3lm_jax.core.checksummed import ChecksumError, add_checksum, verify_checksum
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.log import RunLog, append, read_lines, read_metrics
from bd3lm_jax.evaluation.settings import read_object
from bd3lm_jax.likelihood import paired
from bd3lm_jax.training import report

RECORD = {"step": 6, "valid": {"nll": 2.1234567890123, "nll_ci95": [1.5, None], "name": "é"}}


def flipped(content: bytes):
    """The content with each of its bits flipped."""
    for i in range(8 * len(content)):
        data = bytearray(content)
        data[i // 8] ^= 1 << i % 8
        yield bytes(data)


def test_the_checksum_is_that_of_the_json():
    text = '{"a": [1.5, null]}'
    assert add_checksum({"a": [1.5, None]}) == {"a": [1.5, None], "crc32": f"{zlib.crc32(text.encode()):08x}"}
    assert verify_checksum(json.dumps(add_checksum(RECORD), indent=3)) == RECORD == verify_checksum(json.dumps(RECORD))


@pytest.mark.parametrize("content", [b"", b"[1]", b"3", b'{"a": 1', b"\xff", b'{"a": 1, "crc32": 5}', b"[" * 100_000])
def test_what_is_no_sealed_object(content):
    with pytest.raises(ChecksumError):
        verify_checksum(content)


def test_no_flipped_bit_changes_a_value():
    found = 0
    for content in flipped(json.dumps(add_checksum(RECORD)).encode()):
        try:
            record = verify_checksum(content)
        except ChecksumError:
            found += 1
            continue
        assert {key: record.get(key) for key in RECORD} == RECORD  # a letter of the key "crc32"
    assert found > 500


def test_a_flipped_bit_in_a_report_is_told_or_harmless(tmp_path, capsys):
    log.save(tmp_path / report.REPORT, RECORD)
    content = (tmp_path / report.REPORT).read_bytes()
    assert report.read(tmp_path) == RECORD
    for damaged in list(flipped(content))[::7]:
        (tmp_path / report.REPORT).write_bytes(damaged)
        assert report.read(tmp_path) in (RECORD, None)
    assert "report.json is damaged and passed over" in capsys.readouterr().err


def test_settings_that_were_edited_say_how_to_go_on(tmp_path):
    path = tmp_path / "sampling.json"
    log.save(path, {"speed": {"threshold": 0.5}})
    assert read_object(path) == {"speed": {"threshold": 0.5}}
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match="sampling.json does not match its checksum.*on purpose delete its 'crc32'"):
        read_object(path)
    path.write_text('{"speed": {"threshold": 0.6}}')
    assert read_object(path) == {"speed": {"threshold": 0.6}}


@pytest.mark.parametrize("damage", [
    b"3", b"null", b"[]", b'{"train/loss": 1.0}', b'{"step": "4"}', b'{"step": 4, "train/loss": "low"}', b"\xff\x00",
    b'{"step": 4, "train/loss": 2.5, "crc32": "00000000"}', b"[" * 100_000, "\u2028".encode()])
def test_damaged_lines_of_metrics_are_left_out_told_and_removed(tmp_path, capsys, damage):
    log.note_once.cache_clear()
    with RunLog(tmp_path, 9, quiet=True) as run:
        for step in (1, 2):
            run.metrics(step, {"train/loss": step / 2})
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(True)
    path.write_bytes(first + damage + b"\n" + second + b'{"step": 3, "cut o')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().err == f"warning: {path} has 1 damaged line, left out\n"
    with RunLog(tmp_path, 9, quiet=True, start_step=2):
        assert path.read_bytes() == first + second


def test_lines_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.5}]


def test_an_appended_line_that_was_changed_is_no_line(tmp_path):
    path = tmp_path / "watch.jsonl"
    for step in (1, 2):
        append(path, {"step": step, "nll": 2.5})
    path.write_text(path.read_text().replace("2.5", "2.4", 1))
    assert read_lines(path) == [{"step": 2, "nll": 2.5}]


def test_a_full_disk_is_one_error_in_every_writer(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.files, "write", full)
    for write in (lambda: log.save(tmp_path / "a", {}), lambda: RunLog(tmp_path, 1)):
        with pytest.raises(RunError, match="cannot write .*: No space left on device; free some (disk )?space"):
            write()


def test_damage_to_documents_costs_the_differences_alone(tmp_path, capsys):
    path = tmp_path / paired.DOCUMENTS
    np.savez(path, nats=np.arange(6.0), tokens=np.arange(6), text=np.array("ab"))
    right, content = paired.read(tmp_path), path.read_bytes()
    assert right.text == "ab" and right.nats_N.tolist() == [0, 1, 2, 3, 4, 5]
    for damaged in [*list(flipped(content))[::13], b"", content[:100], content[:-40], b"PK" + content]:
        path.write_bytes(damaged)
        found = paired.read(tmp_path)
        assert found is None or all(np.array_equal(a, b) for a, b in zip(found, right))
    assert "documents.npz is damaged" in capsys.readouterr().err
