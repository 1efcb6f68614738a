"""Records become a page, a Markdown table and a terminal table: pure functions of the records, no torch.

The page is one file that works from a disk without network; the same records give the same bytes.
The paper's numbers are records too, shown apart: they come from other models and data. How scores
are made and records are stored is `records.py`'s and the evaluation's business; the words, looks
and behaviour of the page are `leaderboard/page.*`'s.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from refine_harness.errors import DataError, RunError
from refine_harness.records import SHORT_ID, ScoreRecord, TaskScore, in_order, read_records
from refine_harness.resources import resource

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

GROUPS = {
    "niah": ("Needle in a haystack", "Find the facts that were hidden in a long text (RULER's eight tasks)."),
    "longqa": ("Long-context questions", "Answer a question whose paragraph is one of very many (RULER's QA tasks)."),
    "longbench": ("LongBench", "English tasks on real long documents: questions, summaries, examples, code."),
    "longbench_open": ("LongBench, 4 tasks", "The four LongBench tasks whose rows may be passed on."),
}
"""Title and meaning of the groups of ours, in the order of columns; other groups follow by name."""
METHODS = {"none": "Not trained", "ntp": "NTP", "refine": "ReFINE"}
STAGES = {"base": "base", "mid": "mid-training", "post": "post-training", "test-time": "test-time training"}
FEW = 100
"""Below so many examples a task, a score is marked: one standard error at 50% is then over 5 points."""
CLEAR = 2.0
"""Differences below so many combined standard errors are not called differences."""

STACK = 4
"""With more columns than this, a terminal table of runs has errors below their scores, to fit 80 characters."""
_LABEL = 12
"""Fewest characters of a line of a run's name in a terminal table."""
_BETWEEN = 5
"""Characters that the edges of two columns and what is between them take there."""

_AXIS = {1: 0.25, 2: 0.5, 5: 1, 10: 2, 20: 5, 40: 10, 50: 10, 60: 20, 80: 20, 100: 20}
"""Ends of a score axis, and their steps."""
CROWD = 10
"""With more runs than this a chart is taller and shows error bars only of the run that is pointed at."""


# --- What is shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A number with its uncertainty, wherever it came from."""

    value: float
    stderr: float | None
    n: int | None
    higher_is_better: bool = True
    basis: str = ""
    """What examples it rests on; equal for rows that answered the same questions."""

    @property
    def text(self) -> str:
        return f"{self.value:.1f}"

    @property
    def error(self) -> str:
        return "" if self.stderr is None else f"± {self.stderr:.1f}"

    @property
    def spread(self) -> float | None:
        """Standard error for comparisons. Examples that all scored alike give 0, which is no certainty: then that of
        Agresti and Coull (1998), who add two successes and two failures."""
        if self.stderr or self.stderr is None or not self.n:
            return self.stderr
        share = (self.value / 100 * self.n + 2) / (self.n + 4)
        return 100 * math.sqrt(share * (1 - share) / (self.n + 4)) if 0 <= share <= 1 else self.stderr


@dataclass(frozen=True)
class Column:
    """One column of scores and how to find a record's number for it."""

    name: str
    full: str
    length: int | None
    find: Callable[[ScoreRecord], Score | None]

    @property
    def at(self) -> str:
        return length_text(self.length)


@dataclass(frozen=True)
class Cell:
    score: Score | None
    best: bool
    title: str


@dataclass(frozen=True)
class Row:
    record: ScoreRecord
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ScoreTable:
    """Records against columns; `mixed[i]` where rows answered different questions in column i."""

    columns: tuple[Column, ...]
    mixed: tuple[bool, ...]
    rows: tuple[Row, ...]

    @property
    def spans(self) -> list[tuple[str, str, int]]:
        """Neighbouring columns of one name, as (name, full name, how many)."""
        out: list[tuple[str, str, int]] = []
        for column in self.columns:
            if out and out[-1][1] == column.full:
                out[-1] = (column.name, column.full, out[-1][2] + 1)
            else:
                out.append((column.name, column.full, 1))
        return out

    @property
    def has_lengths(self) -> bool:
        return any(column.length is not None for column in self.columns)


def length_text(length: int | None) -> str:
    """4096 as `4K`, 1000 as `1000`, None as nothing."""
    if length is None:
        return ""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def group_title(group: str) -> str:
    return GROUPS[group][0] if group in GROUPS else group


def _group_rank(group: str) -> tuple[int, str]:
    known = list(GROUPS)
    return (known.index(group) if group in known else len(known), group)


def group_columns(records: Sequence[ScoreRecord]) -> list[Column]:
    """A column for each group mean at each length, groups in order and lengths rising."""
    keys = {(score.group, score.length) for record in records for score in record.groups}
    return [
        Column(group_title(group), group, length, lambda record, g=group, at=length: _group_score(record, g, at))
        for group, length in sorted(keys, key=lambda key: (_group_rank(key[0]), key[1] or 0))
    ]


def overview_columns(records: Sequence[ScoreRecord]) -> list[Column]:
    """Group means, and the tasks of groups that have none, such as a stock task asked for by itself."""
    means = group_columns(records)
    with_means = {column.full for column in means}
    others = {score.group for record in records for score in record.scores} - with_means
    return [*means, *(column for group in sorted(others, key=_group_rank) for column in task_columns(records, group))]


def _group_score(record: ScoreRecord, group: str, length: int | None) -> Score | None:
    for score in record.groups:
        if (score.group, score.length) == (group, length):
            tasks = [task for task in record.scores if (task.group, task.length) == (group, length)]
            return Score(score.value, score.stderr, score.n, basis="|".join(sorted(_basis(record, t) for t in tasks)))
    return None


def _basis(record: ScoreRecord, score: TaskScore) -> str:
    hashes = record.evaluation.data_sha256
    data = hashes.get(f"{score.task}@{score.length}") or hashes.get(score.task)
    return f"{score.task} {score.version} {score.n} {data}"


def task_columns(records: Sequence[ScoreRecord], group: str) -> list[Column]:
    """A column for each metric of each task of `group` at each length, in the records' order."""
    keys: dict[tuple[str, str], set[int | None]] = {}
    for record in records:
        for score in record.scores:
            if score.group == group:
                keys.setdefault((score.task, score.metric), set()).add(score.length)
    tasks = [task for task, _ in keys]
    columns: list[Column] = []
    for (task, metric), lengths in keys.items():
        name = _short_names(tasks)[task]
        full = task if tasks.count(task) == 1 else f"{task} {metric}"
        name = name if tasks.count(task) == 1 else f"{name} {metric}"
        for at in sorted(lengths, key=lambda length: length or 0):
            columns.append(Column(name, full, at, lambda r, t=task, m=metric, a=at: _task_score(r, t, m, a)))
    return columns


def _task_score(record: ScoreRecord, task: str, metric: str, length: int | None) -> Score | None:
    for score in record.scores:
        if (score.task, score.metric, score.length) == (task, metric, length):
            return Score(score.value, score.stderr, score.n, score.higher_is_better, _basis(record, score))
    return None


def _short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Task names without the words, up to an underscore, that all of several tasks begin with."""
    words = [task.split("_") for task in set(tasks)]
    common = 0
    while len(words) > 1 and all(len(w) > common + 1 and w[common] == words[0][common] for w in words):
        common += 1
    return {task: "_".join(task.split("_")[common:]) for task in tasks}


def score_table(records: Sequence[ScoreRecord], columns: Sequence[Column]) -> ScoreTable:
    """`records` against `columns`, with each column's leaders marked."""
    found = [(record, [column.find(record) for column in columns]) for record in records]
    down = [[scores[i] for _, scores in found] for i in range(len(columns))]
    mixed = tuple(len({score.basis for score in column if score}) > 1 for column in down)
    best = [set() if mixed[i] else leaders(column) for i, column in enumerate(down)]
    rows = tuple(
        Row(record, tuple(Cell(score, at in best[i], _title(score, columns[i])) for i, score in enumerate(scores)))
        for at, (record, scores) in enumerate(found)
    )
    return ScoreTable(tuple(columns), mixed, rows)


def leaders(scores: Sequence[Score | None]) -> set[int]:
    """Indices of the scores that cannot be told from the best; nothing where that says nothing.

    A score is told from the best when it is `CLEAR` combined standard errors away. Rows that answer
    the same questions could be told apart by less; scores alone cannot show it.
    """
    known = [(i, score) for i, score in enumerate(scores) if score is not None]
    if len(known) < 2 or any(score.spread is None for _, score in known):
        return set()
    sign = 1 if known[0][1].higher_is_better else -1
    top = max((score for _, score in known), key=lambda score: sign * score.value)
    near = {
        i
        for i, score in known
        if abs(top.value - score.value) < CLEAR * math.hypot(top.spread or 0, score.spread or 0) or score is top
    }
    return near if len(near) < len(known) else set()


def _title(score: Score | None, column: Column) -> str:
    if score is None:
        return "not scored"
    parts = [column.full if column.length is None else f"{column.full} at {column.length} tokens"]
    parts.append(f"{score.value:.2f}" + (f" ± {score.stderr:.2f}" if score.stderr is not None else ""))
    if score.n is not None:
        parts.append(f"{score.n} examples")
    return ", ".join(parts)


@dataclass(frozen=True)
class Note:
    """Something a reader must know before believing a row."""

    kind: str
    short: str
    long: str


def notes(record: ScoreRecord) -> list[Note]:
    """The warnings of a record, gravest first."""
    out: list[Note] = []
    if record.source == "paper":
        return out
    if record.restore == "never":
        text = "Weights were carried from prompt to prompt and never put back: scores depend on the order of prompts."
        out.append(Note("carried", "carried over", text))
    if record.provenance is not None and record.provenance.dirty:
        text = "The checkout held changes that its commit does not, so the commit does not say exactly what ran."
        out.append(Note("dirty", "uncommitted code", text))
    fewest = min((score.n for score in record.scores if score.n), default=None)
    limit = record.evaluation.limit
    if limit is not None or (fewest is not None and fewest < FEW):
        size = f"n = {fewest}" if fewest is not None else f"limit {limit}"
        cause = f" (limit {limit})" if limit is not None else ""
        text = f"Only {fewest or limit} examples in the smallest task{cause}: differences of several points are noise."
        out.append(Note("few", size, text))
    cut = sum(score.truncated for score in record.scores)
    if cut:
        total = sum(score.n or 0 for score in record.scores)
        text = f"{cut} of {total} prompts were longer than max_length = {record.evaluation.max_length} and lost a part."
        out.append(Note("cut", f"{cut} prompts cut", text))
    return out


def examples_text(record: ScoreRecord) -> str:
    """Examples per task: `500`, or `20 to 200` where tasks differ."""
    counts = sorted({score.n for score in record.scores if score.n is not None})
    return "" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def count_text(number: int | None) -> str:
    """1234567 as `1.2M`."""
    if number is None:
        return "not known"
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def seconds_text(seconds: float | None) -> str:
    """3725.2 as `1 h 2 min`."""
    if seconds is None:
        return "not known"
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# --- Charts: x in percent of the width and y in pixels, so that a phone shows text of full size ----------------------


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Series:
    record: ScoreRecord
    dash: str
    points: tuple[Point, ...]

    @property
    def segments(self) -> list[tuple[Point, Point]]:
        return list(zip(self.points, self.points[1:], strict=False))


@dataclass(frozen=True)
class Chart:
    """Lines against context length, or, where there is one length only, one dot for each run."""

    kind: str
    height: int
    grid: tuple[tuple[float, str], ...]
    """Score axis: (pixel or percent, text)."""
    ticks: tuple[tuple[float, str], ...]
    """Length axis: (percent, text); empty for dots."""
    series: tuple[Series, ...]

    @property
    def crowded(self) -> bool:
        return len(self.series) > CROWD


_DASHES = ("", "7 4", "2 4", "10 4 2 4", "14 4", "4 2 1 2")


def chart(records: Sequence[ScoreRecord], group: str) -> Chart | None:
    """The group's means against context length; None where no record has one."""
    columns = [column for column in group_columns(records) if column.full == group]
    rows = [(record, [column.find(record) for column in columns]) for record in records]
    rows = [(record, scores) for record, scores in rows if any(scores)]
    if not rows:
        return None
    highest = max(s.value + (s.stderr or 0) for _, scores in rows for s in scores if s)
    top = next((end for end in _AXIS if end >= min(highest, 100)), 100)
    lengths = [column.length for column in columns]
    lines = len(columns) > 1 and all(length is not None for length in lengths)
    height = 420 if len(rows) > CROWD else 260
    steps = [i * _AXIS[top] for i in range(round(top / _AXIS[top]) + 1)]

    def up(value: float) -> float:
        share = min(max(value, 0.0), top) / top
        place = height - 30 - share * (height - 46) if lines else 2 + share * 94
        return round(place, 2)

    series: list[Series] = []
    alike: dict[tuple[str, str], int] = {}
    shift = min(1.0, 5.0 / len(rows))
    for i, (record, scores) in enumerate(rows):
        points: list[Point] = []
        for j, score in enumerate(scores):
            if score is None:
                continue
            x = _along(lengths, j) + shift * (i - (len(rows) - 1) / 2) if lines else 0.0
            error = score.stderr or 0.0
            low, high = up(score.value - error), up(score.value + error)
            title = f"{record.label}: {_title(score, columns[j])}"
            points.append(Point(round(x, 2), up(score.value), low, high, title))
        seen = alike[record.method, record.stage] = alike.get((record.method, record.stage), -1) + 1
        dash = _DASHES[seen % len(_DASHES)]
        series.append(Series(record, dash, tuple(points)))
    return Chart(
        kind="lines" if lines else "dots",
        height=height,
        grid=tuple((up(step), f"{step:g}") for step in steps),
        ticks=tuple((_along(lengths, j), length_text(length)) for j, length in enumerate(lengths)) if lines else (),
        series=tuple(series),
    )


def _along(lengths: Sequence[int | None], index: int) -> float:
    """Place of a length on a logarithmic axis, in percent of the width."""
    logs = [math.log2(length) for length in lengths if length is not None]
    return round(11 + 82 * (logs[index] - logs[0]) / (logs[-1] - logs[0]), 2)


# --- The page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One group of the measured records: a chart, and every task."""

    group: str
    title: str
    meaning: str
    chart: Chart | None
    table: ScoreTable
    lengths: tuple[int, ...]


def render(records: Iterable[ScoreRecord]) -> str:
    """The page as HTML text: all it needs is inside, and it loads nothing."""
    records = in_order(records)
    measured = [record for record in records if record.source == "measured"]
    paper = [record for record in records if record.source == "paper"]
    folder = resource("leaderboard")
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    return _template().render(
        parents=_parents(measured),
        overview=score_table(measured, overview_columns(measured)),
        measured=measured,
        sections=_sections(measured),
        paper=_paper_tables(paper),
        paper_count=len(paper),
        methods=METHODS,
        stages=STAGES,
        notes=notes,
        examples=examples_text,
        few=FEW,
        clear=f"{CLEAR:g}",
        style=Markup(style),
        script=Markup(script),
        # Only what is hashed here may run or style: text that slipped through escaping still could do nothing.
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        data=Markup(script_json([record.as_json() for record in records])),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(resource("leaderboard")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = count_text
    environment.filters["seconds"] = seconds_text
    environment.filters["at"] = length_text
    environment.filters["short"] = lambda digest: digest[:SHORT_ID]
    return environment.get_template("page.html.j2")


def _parents(records: Sequence[ScoreRecord]) -> dict[str, str]:
    """Weights hash to the label of the run that made them; test-time training starts from those of an earlier run."""
    makers = [record for record in records if record.stage != "test-time" and record.model.weights_sha256]
    return {record.model.weights_sha256 or "": record.label for record in reversed(makers)}


def _sections(records: Sequence[ScoreRecord]) -> list[Section]:
    found = {score.group for record in records for score in record.scores}
    found |= {score.group for record in records for score in record.groups}
    sections: list[Section] = []
    for group in sorted(found, key=_group_rank):
        columns = task_columns(records, group)
        scored = [record for record in records if any(score.group == group for score in record.scores)]
        sections.append(
            Section(
                group=group,
                title=group_title(group),
                meaning=GROUPS[group][1] if group in GROUPS else "",
                chart=chart(records, group),
                table=score_table(scored, columns),
                lengths=tuple(sorted({column.length for column in columns if column.length is not None})),
            )
        )
    return sections


def _paper_tables(records: Sequence[ScoreRecord]) -> list[tuple[str, str, ScoreTable]]:
    """(title, where it is printed, table): one for each table of the paper that the records come from."""
    by_reference: dict[str, list[ScoreRecord]] = {}
    for record in records:
        by_reference.setdefault(record.reference or "", []).append(record)
    tables: list[tuple[str, str, ScoreTable]] = []
    for reference, rows in by_reference.items():
        groups = sorted({score.group for row in rows for score in (*row.scores, *row.groups)}, key=_group_rank)
        columns = [column for group in groups for column in task_columns(rows, group)]
        means = [Column("mean", f"mean of {c.name}", c.length, c.find) for c in group_columns(rows)]
        title = ", ".join(group_title(group) for group in groups)
        tables.append((title, reference, score_table(rows, [*means, *columns])))
    rank = {group_title(group): i for i, group in enumerate(GROUPS)}
    return sorted(tables, key=lambda table: (rank.get(table[0], len(rank)), -len(table[2].columns), table[1]))


def script_json(value: Any) -> str:
    """JSON that can stand inside a <script> element: it holds no <, >, & and only ASCII."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _gather(record_folders: Sequence[str | Path]) -> list[ScoreRecord]:
    folders = [*record_folders, resource("leaderboard") / "baselines"]
    return in_order(record for folder in folders for record in read_records(folder))


def _files(record_folders: Sequence[str | Path]) -> dict[str, bytes]:
    records = _gather(record_folders)
    listing = json.dumps([record.as_json() for record in records], indent=1, ensure_ascii=False, allow_nan=False)
    return {"records.json": f"{listing}\n".encode(), "index.html": render(records).encode()}


def build(record_folders: Sequence[str | Path], out: str | Path) -> Path:
    """Writes `index.html` and `records.json` into the folder `out` from all records there are; the page's path.

    The paper's numbers are added by themselves. The same records give the same bytes. Raises
    DataError for a bad record and RunError when `out` cannot be written; then nothing is.
    """
    files = _files(record_folders)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _replace(out / name, content)
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}). Give a folder that you may write to.") from None
    return out / "index.html"


def check(record_folders: Sequence[str | Path], page: str | Path) -> bool:
    """Whether `page`, and the `records.json` beside it, are what `build` would write now."""
    page = Path(page)
    files = _files(record_folders)
    try:
        return (
            page.read_bytes() == files["index.html"]
            and (page.parent / "records.json").read_bytes() == files["records.json"]
        )
    except FileNotFoundError:
        return False


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


# --- Other tables -----------------------------------------------------------------------------------------------------


def markdown_table(records: Sequence[ScoreRecord], links: str | None = None) -> str:
    """Group means of `records`, in their order, as a GitHub table; with `links`, a prefix of the records' file names,
    each label links to its record."""
    table = score_table(records, overview_columns(records))
    head = ["run", *(f"{_markdown(c.full)} {c.at}".strip() for c in table.columns), "examples per task", "note"]
    lines = [_line(head), _line(["-", *("-:" for _ in head[1:-1]), "-"])]
    for row in table.rows:
        label = _markdown(row.record.label)
        label = f"[{label}]({links}{row.record.file_name})" if links is not None else label
        label = f"{label} (the paper's)" if row.record.source == "paper" else label
        scores = [_both(cell.score, " ") for cell in row.cells]
        lines.append(_line([label, *scores, examples_text(row.record), _remarks(row.record)]))
    return "\n".join(lines) + "\n"


def fill_readme(readme: Path, records: Sequence[ScoreRecord], links: str) -> None:
    """Put `markdown_table` of `records` between the two `results` marks of a README. Raises DataError without marks."""
    text = readme.read_text(encoding="utf-8")
    head, opening, rest = text.partition("<!-- results")
    mark, arrow, inside = rest.partition("-->")
    _, closing, tail = inside.partition("<!-- /results -->")
    if not (opening and arrow and closing):
        raise DataError(
            f"{readme} has no <!-- results --> and <!-- /results --> marks. Put them where the table belongs."
        )
    table = markdown_table(records, links) if records else ""
    _replace(readme, f"{head}{opening}{mark}{arrow}\n{table}{closing}{tail}".encode())


def _both(score: Score | None, between: str) -> str:
    if score is None:
        return ""
    error = score.error if between == " " else score.error.replace(" ", "")
    return f"{score.text}{between}{error}".strip()


def _remarks(record: ScoreRecord) -> str:
    """The warnings of a record, less that of few examples, which has its own column."""
    return "; ".join(note.short for note in notes(record) if note.kind != "few")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    """`text` as itself in a Markdown table: nothing in it is markup."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]()|~#!" else c for c in text)


def summary_table(records: Sequence[ScoreRecord]) -> RenderableType:
    """Group means of `records`, in their order, for a terminal; n counts examples per task.

    A row for each run where that fits the width; else a row for each score, and as many runs beside each other as fit.
    """
    return _Summary(score_table(records, overview_columns(records)))


@dataclass(frozen=True)
class _Summary:
    """What is printed at the end; rich cuts what does not fit without a word, so the width decides how."""

    shown: ScoreTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        def fits(table: Table) -> bool:
            return _least_width(table, console, options) <= options.max_width

        rows, width = self.shown.rows, options.max_width
        if fits(self._by_run()):
            tables = [self._by_run()]
        else:
            several = range(len(rows), 1, -1)
            beside = next((n for n in several if all(fits(self._by_score(part, width)) for part in _parts(rows, n))), 1)
            tables = [self._by_score(part, width) for part in _parts(rows, beside)]
        tables[-1].caption = "0 to 100, higher is better. ±: one standard error over examples. n: examples per task."
        yield from tables

    def _by_run(self) -> Table:
        from rich.text import Text

        table = _terminal_table()
        table.add_column("run", overflow="fold", min_width=_LABEL)
        for column in self.shown.columns:
            table.add_column(Text(f"{column.full}\n{column.at}".rstrip()), justify="right", no_wrap=True)
        table.add_column("n", justify="right", no_wrap=True)
        between = "\n" if len(self.shown.columns) > STACK else " "
        for row in self.shown.rows:
            label = Text(_label(row.record))
            if remarks := _remarks(row.record):
                label.append(f"\n{remarks}", "yellow")
            scores = [_styled(cell, between) for cell in row.cells]
            table.add_row(label, *scores, examples_text(row.record))
        return table

    def _by_score(self, rows: Sequence[Row], width: int) -> Table:
        from rich.text import Text

        names = [f"{column.full} {column.at}".rstrip() for column in self.shown.columns]
        examples = [examples_text(row.record) for row in rows]
        scores = [[_styled(cell, " ") for cell in row.cells] for row in rows]
        whole = max(_LABEL, *map(len, examples), *(len(score) for run in scores for score in run))
        table = _terminal_table()
        table.add_column(
            "score", overflow="fold", width=max(_LABEL, min(max(map(len, names)), width - whole - _BETWEEN))
        )
        for row in rows:
            table.add_column(Text(_label(row.record)), justify="right", overflow="fold", min_width=whole)
        for name, *cells in zip(names, *scores, strict=True):
            table.add_row(Text(name), *cells)
        table.add_row("n", *examples)
        if any(remarks := [Text(_remarks(row.record), "yellow") for row in rows]):
            table.add_row("", *remarks)
        return table


def _terminal_table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")


def _least_width(table: Table, console: Console, options: ConsoleOptions) -> int:
    """Of `table`, which is not to be printed any more, with its folding columns as narrow as they may be."""
    for column in table.columns:
        if column.overflow == "fold":
            column.max_width = column.min_width
    return table.__rich_measure__(console, options.update(max_width=10_000)).minimum


def _parts(rows: Sequence[Row], most: int) -> list[Sequence[Row]]:
    """As few parts as can be of at most so many rows, of about one size."""
    count = -(-len(rows) // most)
    return [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]


def _label(record: ScoreRecord) -> str:
    return record.label + (" (the paper's)" if record.source == "paper" else "")


def _styled(cell: Cell, between: str) -> Text:
    from rich.text import Text

    return Text(_both(cell.score, between), "bold" if cell.best else "")
