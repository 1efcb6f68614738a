"""The file of answers: what goes in comes out, small, whole or not at all, and what was changed is found out."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from refine_harness.errors import DataError, RunError
from refine_harness.evaluation.samples import (
    SAMPLES,
    as_text,
    checked,
    plain,
    read_samples,
    samples_sha256,
    score_name,
    write_samples,
)

from .runs import make_run, sample

ROWS = [
    sample("niah_single_1", 512, 0, 1.0),
    sample("niah_single_1", 512, 1, 0.1 + 0.2, prompt_tokens=None),
    sample("niah_single_1", 1024, 2, 0.0, truncated=True),
    sample(
        *("arc_easy", None, 0, 0.0),
        output_type="multiple_choice",
        answers=("[-1.2345678901234567, true]", "[-Infinity, false]"),
        reference=2,
        scores={"acc": 1.0, "acc_norm": 0.0, "f1": [0, 1], "odd": "nan"},
    ),
]


def in_order(rows):
    return sorted(rows, key=lambda row: (row.task, row.length or 0, row.doc_id))


def test_rows_come_back_as_they_were_by_task_length_and_place(tmp_path: Path):
    path = write_samples(ROWS[::-1], tmp_path / "new" / "folder")
    assert path.name == SAMPLES
    assert read_samples(path) == in_order(ROWS)


def test_the_hash_is_of_what_rows_say_not_of_the_file(tmp_path: Path):
    path = write_samples(ROWS, tmp_path)
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table, path, compression="none")
    assert samples_sha256(read_samples(path)) == samples_sha256(in_order(ROWS))
    assert samples_sha256(ROWS) != samples_sha256(ROWS[::-1])
    assert samples_sha256(ROWS[:1]) != samples_sha256([sample("niah_single_1", 512, 0, 1.0, answers=("no",))])


def test_a_needle_task_of_500_examples_is_small(tmp_path: Path):
    path = write_samples([sample("niah_single_1", 131072, i, float(i % 3 > 0)) for i in range(500)], tmp_path)
    assert path.stat().st_size < 100 * 500


def test_log_probabilities_keep_their_bits():
    assert as_text("42") == "42"
    assert as_text((-0.1 - 0.2, True)) == "[-0.30000000000000004, true]"


def test_names_and_values_are_those_of_records():
    assert score_name("512", "none", "string_match_all") == "string_match_all"
    assert score_name("exact_match", "strict-match", None) == "exact_match,strict-match"
    assert score_name("acc", "none", None) == "acc"
    assert plain({"a": (1, float("nan"), Path("x"))}) == {"a": [1, "nan", "x"]}


def test_answers_that_a_record_does_not_rest_on_are_refused(tmp_path: Path):
    record = make_run(tmp_path / "run", {("niah_single_1", 512): [1.0, 0.0], ("niah_single_2", 512): [1.0]})
    (path,) = tmp_path.glob(f"run/scores/*/{SAMPLES}")
    rows = read_samples(path)
    assert checked(rows, record, path) == rows
    changed = [*rows[:2], sample("niah_single_2", 512, 0, 0.0)]
    with pytest.raises(DataError, match="those to niah_single_2 at 512 tokens differ"):
        checked(changed, record, path)
    with pytest.raises(DataError, match="niah_single_2"):
        checked(rows[:2], record, path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"task": "niah"}\n' * 50])
def test_what_is_no_file_of_answers_is_refused_in_one_sentence(tmp_path: Path, content: bytes):
    path = tmp_path / SAMPLES
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_samples(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_parquet_and_missing_files_are_refused(tmp_path: Path):
    path = tmp_path / SAMPLES
    with pytest.raises(DataError, match="No such file"):
        read_samples(path)
    pyarrow.parquet.write_table(pyarrow.table({"task": ["niah"]}), path)
    with pytest.raises(DataError, match="no answers of ours"):
        read_samples(path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_samples(ROWS[:1], tmp_path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_samples(ROWS, tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_killed_in_the_middle_the_file_is_whole_or_not_there_and_nothing_is_left_in_the_end(tmp_path: Path):
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.evaluation.runs import sample\n"
        "from refine_harness.evaluation.samples import write_samples\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_samples([sample('a', None, i, 1.0) for i in range(100)], sys.argv[1])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(root)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / SAMPLES).exists()
    assert len(list(tmp_path.iterdir())) == 1
    path = write_samples(ROWS, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
