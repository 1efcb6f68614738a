"""Tables of text and questions from a file, a folder or the hub, in one order that never changes.

A path is a parquet, jsonl or txt file, or a folder of them read recursively in the order of their
relative names; files of other kinds and hidden ones are passed over. What is no path here is taken
for a hub data set (`org/name`, or `org/name:subset`), whose `train` split is streamed. Paths that
occur *inside* data are text like any other and are never opened.

Left out: what rows mean (corpus.py, questions.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_harness.errors import DataError, suggest
from refine_harness.resources import find

if TYPE_CHECKING:
    import pyarrow.parquet

SUFFIXES = (".parquet", ".jsonl", ".txt")

Row = dict[str, Any]

_HUB_ID = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*)/[\w.-]+(:[\w.-]+)?")
_ROWS_AT_ONCE = 64
_HUB_SECONDS = 10
_EXPECTED = "a parquet, jsonl or txt file, a folder of them, or a hub data set id (org/name)"


@dataclass(frozen=True)
class Table:
    """One file, or one hub data set."""

    name: str
    """What messages call it."""
    columns: tuple[str, ...]
    """Columns that exist (of a jsonl file: in its first row)."""
    _read: Callable[[Sequence[str]], Iterator[Row]]
    streamed: bool = False
    """Whether rows come over the network as they are asked for."""

    def rows(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
        """Rows in order, each with `columns` and those of `optional` that it has. Raises DataError."""
        self._require(columns, self.columns, self.name)
        wanted = [*columns, *(name for name in optional if name in self.columns)]
        for number, row in enumerate(self._read(wanted), start=1):
            self._require(columns, list(row), f"{self.name}, row {number}")
            yield row

    @staticmethod
    def _require(columns: Sequence[str], present: Sequence[str], where: str) -> None:
        for column in columns:
            if column not in present:
                raise DataError(
                    f"{where} has no column {column}; it has {', '.join(present) or 'none'}.{suggest(column, present)}"
                )


def tables(path: str | Path) -> Iterator[Table]:
    """The tables at `path`, in order.

    Shipped data is found from any folder (`configs/...`). A txt file is a table of one row whose
    columns are `id` (its name below `path`) and `text`. Raises DataError: nothing at `path`, no file
    of a known kind, a corrupt file.
    """
    found = find(path, "configs")
    if found.is_file():
        if found.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path} is a file of another kind; expected {_EXPECTED}.")
        files = [found]
    elif found.is_dir():
        files = _files(found)
        if not files:
            raise DataError(f"{path} is a folder without data in it; expected {_EXPECTED}.")
    else:
        yield _hub_table(str(path))
        return
    for file in files:
        yield _file_table(file, file.name if file == found else file.relative_to(found).as_posix())


def read_rows(path: str | Path, columns: Sequence[str], *, optional: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of all tables at `path`, in order. Raises DataError also when there is no row at all."""
    empty = True
    for table in tables(path):
        for row in table.rows(columns, optional) if table.columns else ():
            empty = False
            yield row
    if empty:
        raise DataError(f"{path} is empty: there is no row of data in it. Put data there or name another path.")


class Excluded:
    """Rows that must not be used, by `id` or `title`."""

    def __init__(self, path: str | None) -> None:
        self.values: dict[str, set[str]] = {"id": set(), "title": set()}
        if path is None:
            return
        for table in tables(path):
            if not set(self.values) & set(table.columns):
                raise DataError(
                    f"{table.name} names nothing to exclude: it has no column id or title, "
                    f"only {', '.join(table.columns) or 'none'}."
                )
            for row in table.rows((), optional=tuple(self.values)):
                for column, value in row.items():
                    if value:
                        self.values[column].add(str(value))

    def __contains__(self, row: Row) -> bool:
        return any(str(row.get(column) or "") in values for column, values in self.values.items() if values)


def _files(folder: Path) -> list[Path]:
    """Data files below `folder`, sorted by relative name on every system."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    visible = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    return [folder / name for name in visible if name.lower().endswith(SUFFIXES)]


def _file_table(file: Path, name: str) -> Table:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return Table(str(file), tuple(_parquet(file).schema_arrow.names), lambda wanted: _parquet_rows(file, wanted))
    if suffix == ".jsonl":
        return Table(str(file), tuple(next(_jsonl_rows(file), {})), lambda wanted: _only(_jsonl_rows(file), wanted))
    return Table(str(file), ("id", "text"), lambda wanted: _only(_text_rows(file, name), wanted))


def _only(rows: Iterator[Row], wanted: Sequence[str]) -> Iterator[Row]:
    for row in rows:
        yield {name: row[name] for name in wanted if name in row}


def _parquet(file: Path) -> pyarrow.parquet.ParquetFile:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(_corrupt(file, "parquet", error)) from None


def _parquet_rows(file: Path, wanted: Sequence[str]) -> Iterator[Row]:
    import pyarrow

    batches = _parquet(file).iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(dict.fromkeys(wanted)))
    while True:
        try:
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(_corrupt(file, "parquet", error)) from None
        if rows is None:
            return
        yield from rows


def _jsonl_rows(file: Path) -> Iterator[Row]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(
                        f"{file}, line {number} holds a {type(row).__name__}; expected one JSON object a line."
                    )
                if "\\ud" in line.lower():
                    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
                yield row
    except (OSError, UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(_corrupt(file, "jsonl", error)) from None


def _text_rows(file: Path, name: str) -> Iterator[Row]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(_corrupt(file, "UTF-8 text", error)) from None
    if text.strip():
        yield {"id": name, "text": text}


def _hub_table(name: str) -> Table:
    """The streamed train split of a hub data set. Data sets that need code of their own are refused by `datasets`."""
    match = _HUB_ID.fullmatch(name)
    # `data/boks` where the folder `data` exists is a misspelt path, not somebody's data set.
    if match is None or name.lower().endswith(SUFFIXES) or Path(match["owner"]).is_dir():
        raise DataError(f"{name} does not exist; expected {_EXPECTED}.")
    repository, _, subset = name.partition(":")
    try:
        stream = _open_hub(repository, subset or None)
        first = next(iter(stream), None)
    except Exception as error:  # the hub client raises many kinds: not found, offline, gated, unknown split
        raise DataError(
            f"{name} is neither a file or folder here nor a data set that could be read from the hub "
            f"({_first_line(error)}). Check the spelling, or give a local path."
        ) from None
    return Table(f"hub data set {name}", tuple(first or ()), lambda wanted: _only(iter(stream), wanted), streamed=True)


def _open_hub(repository: str, subset: str | None) -> Any:
    """A re-iterable stream of rows."""
    import datasets
    import huggingface_hub

    # Asked first, and once: opening the stream of an unreachable hub retries for half a minute.
    revision = huggingface_hub.HfApi().dataset_info(repository, timeout=_HUB_SECONDS).sha
    return datasets.load_dataset(repository, subset, split="train", streaming=True, revision=revision)


def _corrupt(file: Path, kind: str, error: Exception) -> str:
    return f"{file} cannot be read as {kind} ({_first_line(error)}). Replace it or leave it out."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
