"""Records: what goes in comes out, what was changed is found out, and nothing tells whose machine it was."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from refine_harness import records
from refine_harness.config import MidConfig
from refine_harness.errors import DataError, RunError
from refine_harness.records import (
    EvaluationFacts,
    GroupScore,
    Machine,
    ModelFacts,
    Provenance,
    ScoreRecord,
    TaskScore,
    TrainingFacts,
    canonical_json,
    file_sha256,
    provenance,
    read_record,
    read_records,
    shown_path,
    write_record,
)

HASH = "0123456789abcdef" * 4


def make_record(**changes: Any) -> ScoreRecord:
    fields: dict[str, Any] = {
        "source": "measured",
        "name": "mid-refine",
        "label": "ReFINE mid-training",
        "stage": "mid",
        "method": "refine",
        "chain": ("refine mid",),
        "model": ModelFacts(name="tiny", model_type="delta_net", parameters=1000, weights_sha256=HASH),
        "training": TrainingFacts(
            config=MidConfig().model_dump(mode="json"), optimizer_steps=4, tokens=4096, seconds=1.5, data_sha256=HASH
        ),
        "evaluation": EvaluationFacts(
            backend="refine", tasks=("niah",), lengths=(512,), seed=42, dtype="float32", device="cpu", batch_size=8
        ),
        "scores": (
            TaskScore(task="niah_single_1", group="niah", metric="all", length=512, value=62.5, stderr=8.7, n=32),
        ),
        "groups": (GroupScore(group="niah", length=512, value=62.5, stderr=8.7, n_tasks=1, n=32),),
        "seconds": 3.25,
        "provenance": Provenance(
            commit="a" * 40,
            dirty=False,
            versions={"python": "3.11.0"},
            machine=Machine(cpu="a processor", cores=2),
            command="refine eval --model tiny",
            date="2026-01-02T03:04:05Z",
            seed=0,
        ),
    }
    return ScoreRecord(**{**fields, **changes})


def test_written_record_reads_back_equal(tmp_path: Path) -> None:
    record = make_record()
    path = write_record(record, tmp_path / "new" / "folder")
    assert path.name == f"mid-refine-{record.id[:12]}.json"
    assert read_record(path) == record
    assert json.loads(path.read_text())["id"] == record.id


def test_id_is_the_hash_of_everything_else() -> None:
    record = make_record()
    assert make_record().id == record.id
    assert make_record(seconds=3.26).id != record.id
    assert make_record(label="ReFINE mid-training.").id != record.id
    assert record.model_copy(update={"seconds": 3.26}).id == make_record(seconds=3.26).id


def test_later_fields_at_their_defaults_leave_ids_and_files_as_they_were() -> None:
    record = make_record()
    assert not {"metrics", "by_size"} & set(record.as_json()["groups"][0])
    group = record.groups[0].model_copy(update={"by_size": True})
    changed = make_record(groups=(group,))
    assert changed.as_json()["groups"][0]["by_size"] is True
    assert changed.id != record.id


def test_every_record_that_was_published_reads_back() -> None:
    folder = Path(__file__).resolve().parent.parent / "leaderboard"
    files = [path for name in ("records", "baselines") for path in (folder / name).glob("*.json")]
    assert files
    for path in files:
        assert read_record(path).file_name == path.name


def test_a_group_averages_its_tasks_and_of_several_metrics_the_one_it_names() -> None:
    record = make_record()
    group, score = record.groups[0], record.scores[0]
    assert group.averages(score)
    for changes in ({"group": "longqa"}, {"length": 1024}, {"unit": "raw"}):
        assert not group.averages(score.model_copy(update=changes))
    named = group.model_copy(update={"metrics": {"niah_single_1": "part"}})
    assert not named.averages(score)
    assert named.averages(score.model_copy(update={"metric": "part"}))


def test_record_cannot_be_changed_in_memory() -> None:
    record = make_record()
    with pytest.raises(ValidationError):
        record.label = "better"


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"value": 62.5', '"value": 63.5', "was changed after it was written"),
        ('"dirty": false', '"dirty": null', "was changed after it was written"),
        ('"batch_size": 8', '"batch_size": "8"', "evaluation.batch_size"),
        ('"batch_size": 8', '"batch_size": 8, "note": 1', "evaluation.note"),
        ('"value": 62.5', '"value": NaN', "not a finite number"),
        ('"value": 62.5', '"value": 1e999', "not finite"),
        ('"value": 62.5', '"value": 162.5', "scores.0: value 162.5"),
        ('"schema_version": 1', '"schema_version": 2', "schema_version 2"),
        ('"id"', '"identity"', "has no id"),
        ('"source"', '"source', "not valid JSON"),
    ],
)
def test_changed_or_broken_file_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = write_record(make_record(), tmp_path)
    _edit(path, old, new)
    with pytest.raises(DataError) as error:
        read_record(path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_layout_of_the_file_is_not_its_content(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_record(path) == make_record()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_record(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_record(tmp_path / "no.json")
    with pytest.raises(DataError, match="not a folder of records"):
        read_records(tmp_path / "no")


def test_writing_twice_changes_nothing_and_never_overwrites(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    before = path.stat().st_mtime_ns
    assert write_record(make_record(), tmp_path) == path
    assert path.stat().st_mtime_ns == before
    _edit(path, "62.5", "99.5")
    edited = path.read_bytes()
    with pytest.raises(RunError, match="holds something else"):
        write_record(make_record(), tmp_path)
    assert path.read_bytes() == edited


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_record(make_record(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_hard_links_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = write_record(make_record(), tmp_path)
    assert read_record(path) == make_record()
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_record(make_record(), tmp_path / "file")


def test_records_come_in_the_order_they_were_made(tmp_path: Path) -> None:
    first = make_record().provenance
    assert first is not None
    for name, second in (("b", 7), ("a", 9), ("c", 8)):
        date = f"2026-01-02T03:04:0{second}Z"
        write_record(make_record(name=name, provenance=first.model_copy(update={"date": date})), tmp_path)
    assert [record.name for record in read_records(tmp_path)] == ["b", "c", "a"]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x"},
        {"name": ""},
        {"label": "two\nlines"},
        {"label": "\x1b[31mred"},
        {"seconds": float("nan")},
        {"seconds": None},
        {"provenance": None},
        {"model": ModelFacts(name="tiny", model_type="delta_net")},
        {"scores": (), "groups": ()},
        {"restore": "never"},
        {"stage": "test-time"},
        {"stage": "base"},
        {"method": "none"},
        {"source": "paper"},
        {"scores": make_record().scores * 2},
    ],
)
def test_impossible_record_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_record(**changes)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -0.1, 100.1])
def test_score_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        TaskScore(task="t", group="g", metric="m", value=value, n=1)


def test_raw_numbers_may_exceed_100_but_not_be_infinite() -> None:
    assert TaskScore(task="t", group="g", metric="perplexity", value=512.0, n=1, unit="raw").value == 512.0
    with pytest.raises(ValidationError):
        TaskScore(task="t", group="g", metric="perplexity", value=float("inf"), n=1, unit="raw")


def test_settings_with_a_non_finite_number_are_refused() -> None:
    with pytest.raises(ValidationError):
        TrainingFacts(config={"a": {"b": [float("nan")]}}, optimizer_steps=1, tokens=1, seconds=1.0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/books", "books"),
        ("/home/ann/books/", "books"),
        ("data.path=/home/ann/books", "data.path=books"),
        ("--model=/mnt/x/y", "--model=y"),
        ("[/a/b,/c/d]", "[b,d]"),
        ("/home/ann lee/my books", "my books"),
        ("~/books", "books"),
        ("~ann/books", "books"),
        ("file:///home/ann/x", "x"),
        ("C:\\Users\\ann\\x.txt", "x.txt"),
        ("k=C:\\Users\\ann\\x.txt", "k=x.txt"),
        ("read /home/ann/x now", "read x now"),
        ("./runs/x", "./runs/x"),
        ("fla-hub/delta_net-1.3B-100B", "fla-hub/delta_net-1.3B-100B"),
        ("https://host.org/a/b", "https://host.org/a/b"),
        ("and/or", "and/or"),
        ("optim.lr=3e-6", "optim.lr=3e-6"),
    ],
)
def test_absolute_paths_lose_their_folders(text: str, shown: str) -> None:
    assert shown_path(text) == shown


def test_cutting_paths_twice_is_cutting_them_once() -> None:
    draw = random.Random(0)
    parts = ["/", "~", "C:", "\\", " ", "a", "home", ":", "=", ",", "file:", "http://", "'", "[", "."]
    for _ in range(5000):
        once = shown_path("".join(draw.choices(parts, k=draw.randint(1, 9))))
        assert shown_path(once) == once


def test_no_record_holds_an_absolute_path(tmp_path: Path) -> None:
    record = make_record(
        model=ModelFacts(name=str(tmp_path / "tiny"), model_type="delta_net", weights_sha256=HASH),
        training=TrainingFacts(
            config={"data": {"path": tmp_path / "books", "sources": ({"path": str(tmp_path / "b")},)}},
            optimizer_steps=1,
            tokens=1,
            seconds=1.0,
        ),
        provenance=provenance([str(tmp_path / "bin" / "refine"), "eval", f"--out={tmp_path}/out", str(tmp_path)], 7),
    )
    path = write_record(record, tmp_path)
    assert str(tmp_path) not in path.read_text()
    assert read_record(path).training == record.training
    assert record.provenance is not None
    assert record.provenance.command.startswith("refine eval --out=out ")


def _git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_is_that_of_the_packages_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, other = tmp_path / "checkout", tmp_path / "other"
    for folder in (checkout, other):
        (folder / "refine_harness").mkdir(parents=True)
        _git(folder, "init", "-q")
        assert records._checkout(folder) == (None, None)  # no commit yet
        (folder / "refine_harness" / "x.py").write_text(folder.name)
        _git(folder, "add", ".")
        _git(folder, "commit", "-qm", "first")
    head = _git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.chdir(other)
    assert records._checkout(checkout) == (head, False)
    (checkout / "notes.txt").write_text("not code")
    assert records._checkout(checkout) == (head, False)
    (checkout / "refine_harness" / "new.py").write_text("code")
    assert records._checkout(checkout) == (head, True)


def test_package_below_somebodys_repository_has_no_commit(tmp_path: Path) -> None:
    inside = tmp_path / ".venv" / "site-packages"
    inside.mkdir(parents=True)
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-qm", "theirs", "--allow-empty")
    assert records._checkout(inside) == (None, None)


def test_provenance_does_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = provenance(["refine"], 3)
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-qm", "theirs", "--allow-empty")
    monkeypatch.chdir(tmp_path)
    there = provenance(["refine"], 3)
    assert (there.commit, there.machine, there.seed) == (here.commit, here.machine, 3)
    assert there.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert there.machine.cores is not None


def test_canonical_json_is_one_text_for_equal_values() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"\\u00e9","b":1}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json([float("inf")])


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match="cannot be read"):
        file_sha256(tmp_path / "none")
