"""Problem files and stop texts."""

import gzip
import json

import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.evaluation.tasks import TASKS, read_problems
from bd3lm_jax.evaluation.tasks.task import cut

GSM8K = TASKS["gsm8k"]
RECORDS = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(3)]


def test_cut_ends_at_the_first_stop_text():
    assert cut("a\ndef b\nclass c", ("\nclass", "\ndef")) == "a"
    assert cut("abc", ("x",)) == "abc" and cut("abc", ()) == "abc" and cut("xabc", ("x",)) == ""


def test_plain_and_compressed_files_hold_the_same(tmp_path):
    text = "\n".join(map(json.dumps, RECORDS)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = (read_problems(GSM8K, str(tmp_path / name)) for name in ("a.jsonl", "a.jsonl.gz"))
    assert plain.problems == packed.problems and plain.sha256 != packed.sha256
    assert [problem.id for problem in plain.problems] == ["gsm8k/1", "gsm8k/2", "gsm8k/3"]
    assert [problem.answer for problem in plain.problems] == [0, 1, 2]


@pytest.mark.parametrize("name, content, said", [
    ("a.jsonl", b"{\"question\": 1", r"a.jsonl:1 is not JSON"),
    ("a.jsonl", b"{\"question\": \"q\"}\n", r"a.jsonl:1 lacks answer"),
    ("a.jsonl", b"[1]\n", r"a.jsonl:1 lacks question, answer"),
    ("a.jsonl", b'{"question": "q", "answer": 5}', r"a.jsonl:1 holds something else"),
    ("a.jsonl", b"", "no test problem"),
    ("a.jsonl", b"\xff\xfe", "cannot read"),
    ("a.jsonl.gz", b"no gzip", "cannot read"),
])
def test_damaged_files_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_problems(GSM8K, str(tmp_path / name))
    assert "grade-school-math" in str(error.value)


@pytest.mark.parametrize("task", ["mbpp", "gsm8k", "math500"])
def test_what_is_not_packaged_says_where_it_is(task):
    with pytest.raises(UserError, match=r"give --file=FILE.jsonl, .*(github|huggingface)"):
        read_problems(TASKS[task], "")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        read_problems(GSM8K, str(tmp_path / "none.jsonl"))
