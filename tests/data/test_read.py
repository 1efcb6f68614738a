from __future__ import annotations

import json
from pathlib import Path

import pytest

from refine_harness.data import read
from refine_harness.data.read import Excluded, read_rows, tables
from refine_harness.errors import DataError


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path: Path, write):
    write("b/rows.parquet", [{"text": "parquet"}])
    (tmp_path / "a.jsonl").write_text('{"text": "jsonl", "more": 1}\n\n', encoding="utf-8")
    (tmp_path / "b" / "z.TXT").write_text("plain é", encoding="utf-8")
    (tmp_path / "b" / "notes.md").write_text("not data", encoding="utf-8")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.txt").write_text("hidden", encoding="utf-8")
    assert [row["text"] for row in read_rows(tmp_path, ["text"])] == ["jsonl", "parquet", "plain é"]


def test_a_text_file_has_its_name_as_id(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("hello", encoding="utf-8")
    assert list(read_rows(tmp_path, ["text"], optional=["id", "title"])) == [{"text": "hello", "id": "deep/a.txt"}]


def test_only_asked_columns_are_read_and_many_rows_stay_in_order(write):
    path = write("many.parquet", [{"text": str(i), "id": i, "big": "x" * 100} for i in range(300)])
    rows = list(read_rows(path, ["text"], optional=["id"]))
    assert rows == [{"text": str(i), "id": i} for i in range(300)]


def test_shipped_data_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert len(list(read_rows("configs/quickstart/data/mid/books.parquet", ["id"]))) == 4


def test_paths_inside_data_are_text(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": str(tmp_path / "secret.txt")}) + "\n", encoding="utf-8")
    assert [row["text"] for row in read_rows(data, ["text"])] == [str(tmp_path / "secret.txt")]


@pytest.mark.parametrize("name", ["missing.parquet", "./nowhere", "deep/er/path", "word", "/absent"])
def test_a_missing_path_is_one_sentence_without_asking_the_hub(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(read, "_open_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="does not exist; expected a parquet, jsonl or txt file, a folder of them"):
        list(read_rows(name, ["text"]))


def test_a_misspelt_file_of_an_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(read, "_open_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="data/boks does not exist"):
        list(read_rows("data/boks", ["text"]))


def test_a_folder_without_data_and_a_file_of_another_kind(tmp_path: Path):
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="is a folder without data in it; expected a parquet, jsonl or txt"):
        list(read_rows(tmp_path, ["text"]))
    with pytest.raises(DataError, match="is a file of another kind; expected a parquet"):
        list(read_rows(tmp_path / "notes.md", ["text"]))


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.parquet", b"PAR1 but not really", "parquet"),
        ("a.parquet", b"", "parquet"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "jsonl"),
        ("a.jsonl", b'{"text": "\xff"}\n', "jsonl"),
        ("a.jsonl", b'{"text": "half \\ud83e"}\n', "jsonl"),
        ("a.txt", b"\xff\xfe\x00broken", "UTF-8 text"),
    ],
)
def test_a_corrupt_file_is_named(tmp_path: Path, name: str, content: bytes, kind: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} cannot be read as {kind} .*Replace it or leave it out"):
        list(read_rows(tmp_path, ["text"]))


def test_a_truncated_parquet_file_is_named(tmp_path: Path, write):
    path = Path(write("a.parquet", [{"text": "x" * 50 + str(i)} for i in range(500)]))
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(200) + content[300:])  # a page is spoilt, the footer is whole
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        list(read_rows(path, ["text"]))


def test_an_absent_column_says_which_there_are(tmp_path: Path, write):
    path = write("a.parquet", [{"txt": "x", "id": 1}])
    with pytest.raises(DataError, match=r"a\.parquet has no column text; it has txt, id\. Did you mean txt\?"):
        list(read_rows(path, ["text"]))
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"other": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl, row 2 has no column text; it has none"):
        list(read_rows(tmp_path / "b.jsonl", ["text"]))


def test_rows_that_are_no_objects(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('["text"]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 holds a list; expected one JSON object a line"):
        list(read_rows(tmp_path, ["text"]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_empty_data(tmp_path: Path, name: str):
    (tmp_path / name).write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="is empty: there is no row of data in it"):
        list(read_rows(tmp_path / name, ["text"]))


def test_a_hub_data_set_is_streamed(write, monkeypatch: pytest.MonkeyPatch):
    """The real `datasets` over a local folder in the hub's layout; only the network is not there."""
    import datasets
    import huggingface_hub

    folder = Path(write("set/data/train-00000.parquet", [{"text": f"row {i}", "n": i} for i in range(5)])).parent.parent
    load = datasets.load_dataset
    asked = []

    def offline(repository: str, subset: str | None, **settings):
        asked.append((repository, subset, settings.pop("revision")))
        return load(str(folder), subset, **settings)

    info = type("Info", (), {"sha": "abc"})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert [row["text"] for row in read_rows("someone/books", ["text"])] == [f"row {i}" for i in range(5)]
    assert asked == [("someone/books", None, "abc")]
    [table] = tables("someone/books")
    assert (table.streamed, table.columns) == (True, ("text", "n"))
    with pytest.raises(DataError, match="hub data set someone/books has no column body; it has text, n"):
        list(read_rows("someone/books", ["body"]))


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: object) -> None:
        raise ConnectionError("no route to host.\nmore")

    monkeypatch.setattr(read, "_open_hub", unreachable)
    with pytest.raises(DataError) as error:
        list(read_rows("someone/books", ["text"]))
    assert str(error.value) == (
        "someone/books is neither a file or folder here nor a data set that could be read from the hub "
        "(no route to host). Check the spelling, or give a local path."
    )


def test_excluded_rows_are_known_by_id_or_title(write):
    excluded = Excluded(write("out.parquet", [{"id": "a", "title": "One"}, {"id": "b", "title": ""}]))
    rows = [{"id": "a"}, {"id": "c", "title": "One"}, {"id": "b", "title": "Two"}, {"id": "c", "title": ""}, {}]
    assert [row in excluded for row in rows] == [True, True, True, False, False]
    assert {"id": "a"} not in Excluded(None)
    with pytest.raises(DataError, match="names nothing to exclude: it has no column id or title, only text"):
        Excluded(write("wrong.parquet", [{"text": "a"}]))
