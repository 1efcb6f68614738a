"""The page: the same records give the same bytes, nothing in them is markup, and nothing is sold as certain."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from refine_harness.errors import DataError, RunError
from refine_harness.leaderboard import (
    Score,
    build,
    chart,
    check,
    count_text,
    leaders,
    length_text,
    markdown_table,
    render,
    script_json,
    seconds_text,
    summary_table,
)
from refine_harness.records import (
    EvaluationFacts,
    GroupScore,
    Machine,
    ModelFacts,
    Provenance,
    ScoreRecord,
    TaskScore,
    TrainingFacts,
    read_records,
    write_record,
)
from refine_harness.resources import resource

HASH = "0123456789abcdef" * 4
HOSTILE = [
    "<script>document.documentElement.dataset.pwned=1</script>",
    "</script><script>document.documentElement.dataset.pwned=1</script>",
    '"><img src=x onerror=document.documentElement.dataset.pwned=1>',
    "' onmouseover='document.documentElement.dataset.pwned=1' x='",
    "<!--<script>",
    "]]>&lt;b&gt;\u2028\u2029{{ 7 * 7 }}{% raw %}",
    "</style></title></textarea><svg/onload=document.documentElement.dataset.pwned=1>",
]


def make_record(
    label: str = "ReFINE mid-training",
    *,
    number: int = 0,
    value: float = 40.0,
    stderr: float | None = 4.9,
    n: int = 100,
    lengths: tuple[int, ...] = (1024, 2048),
    limit: int | None = None,
    dirty: bool = False,
    restore: Any = None,
    truncated: int = 0,
    text: str = "",
    data: str = HASH,
) -> ScoreRecord:
    stage, method = ("test-time", "refine") if restore else ("mid", "refine")
    tasks = [f"niah_{name}{text}" for name in ("single", "multi")]
    scores = [
        TaskScore(task=task, group=f"niah{text}", metric=f"all{text}", length=at, value=value, stderr=stderr, n=n,
                  truncated=truncated)
        for task in tasks
        for at in lengths
    ]  # fmt: skip
    scores.append(TaskScore(task="longbench_lcc", group="longbench", metric="sim", value=value, stderr=stderr, n=n))
    groups = [
        GroupScore(group=f"niah{text}", length=at, value=value, stderr=stderr, n_tasks=2, n=2 * n) for at in lengths
    ]
    groups.append(GroupScore(group="longbench", value=value, stderr=stderr, n_tasks=1, n=n))
    return ScoreRecord(
        source="measured",
        name=f"run-{number}",
        label=label,
        stage=stage,
        method=method,
        restore=restore,
        chain=(f"refine mid{text}",),
        model=ModelFacts(name=f"tiny{text}", model_type=f"delta_net{text}", parameters=1234, weights_sha256=HASH),
        training=TrainingFacts(config={f"key{text}": text}, optimizer_steps=4, tokens=4096, seconds=1.5),
        evaluation=EvaluationFacts(
            backend=f"refine{text}",
            tasks=(f"niah{text}",),
            lengths=lengths,
            limit=limit,
            seed=42,
            dtype="float32",
            device="cpu",
            data_sha256=dict.fromkeys(tasks, data),
        ),
        scores=tuple(scores),
        groups=tuple(groups),
        seconds=3.25,
        provenance=Provenance(
            commit="a" * 40,
            dirty=dirty,
            versions={f"python{text}": f"3.11.0{text}"},
            machine=Machine(cpu=f"a processor{text}", cores=2),
            command=f"refine eval{text}",
            date=f"2026-01-02T03:04:{number:02d}Z",
            seed=0,
        ),
    )


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Path]:
    def _publish(*records: ScoreRecord) -> Path:
        folder = tmp_path / "records"
        folder.mkdir(exist_ok=True)
        for record in records:
            write_record(record, folder)
        return build([folder], tmp_path / "site")

    return _publish


class Elements(HTMLParser):
    """Elements of a page as (name, attributes), with the text inside each kept by name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def having(self, tag: str, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for name, attrs in self.found if name == tag and attribute in attrs]

    def of_class(self, word: str) -> list[tuple[str, dict[str, str | None]]]:
        return [(name, attrs) for name, attrs in self.found if word in (attrs.get("class") or "").split()]


def test_page_shows_scores_with_their_errors(publish: Callable[..., Path]) -> None:
    html = publish(make_record(value=41.25, stderr=4.94)).read_text(encoding="utf-8")
    assert '<span class="value">41.2</span> <span class="error">± 4.9</span>' in html
    assert "niah at 1024 tokens, 41.25 ± 4.94, 200 examples" in html
    assert "one standard error over examples" in html


def test_page_loads_nothing(publish: Callable[..., Path]) -> None:
    html = publish(make_record()).read_text(encoding="utf-8")
    page = Elements(html)
    assert re.search(r"https?://|@import|url\(", html) is None
    assert not [attrs for _, attrs in page.found if "src" in attrs or "srcset" in attrs]
    assert page.having("a", "href") == ["records.json"]
    assert not page.having("link", "href")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_page_stands_with_few_records(publish: Callable[..., Path], count: int) -> None:
    page = publish(*(make_record(f"row {i}", number=i) for i in range(count)))
    html = page.read_text(encoding="utf-8")
    assert ("There are no measured records yet" in html) == (count == 0)
    rows = [attrs for name, attrs in Elements(html).of_class("row") if name == "tbody" and "id" in attrs]
    assert len(rows) == count + len(read_records(resource("leaderboard") / "baselines"))
    listed = json.loads((page.parent / "records.json").read_text(encoding="utf-8"))
    assert sum(record["source"] == "measured" for record in listed) == count


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = [make_record(f"row {i}", number=i) for i in range(3)]
    for record in records:
        write_record(record, tmp_path / "a")
    for record in reversed(records):
        write_record(record, tmp_path / "b" / str(record.name[-1]))
    write_record(records[0], tmp_path / "b" / "2")  # the same record twice is one row
    one = build([tmp_path / "a"], tmp_path / "one")
    two = build([tmp_path / "b" / str(i) for i in (2, 0, 1)], tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    assert (one.parent / "records.json").read_bytes() == (two.parent / "records.json").read_bytes()


def test_check_sees_whether_the_page_is_that_of_the_records(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "records")
    page = build([tmp_path / "records"], tmp_path / "site")
    assert check([tmp_path / "records"], page)
    assert not check([tmp_path / "records"], tmp_path / "none.html")
    page.write_bytes(page.read_bytes().replace(b"40.0", b"90.0"))
    assert not check([tmp_path / "records"], page)
    build([tmp_path / "records"], tmp_path / "site")
    write_record(make_record("new", number=1), tmp_path / "records")
    assert not check([tmp_path / "records"], page)


def test_bad_record_leaves_the_old_page(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path / "records")
    page = build([tmp_path / "records"], tmp_path / "site")
    before = page.read_bytes()
    path.write_text(path.read_text().replace("40.0", "90.0"))
    with pytest.raises(DataError, match="changed after it was written"):
        build([tmp_path / "records"], tmp_path / "site")
    assert page.read_bytes() == before
    assert sorted(file.name for file in page.parent.iterdir()) == ["index.html", "records.json"]


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        build([], tmp_path / "file")


def test_importing_and_building_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from refine_harness import leaderboard\n"
        f"leaderboard.build([], {str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- Hostile text -----------------------------------------------------------------------------------------------------


def hostile_records() -> list[ScoreRecord]:
    return [make_record(text[:200], number=i, text=text, limit=5, n=5) for i, text in enumerate(HOSTILE)]


def test_hostile_text_is_text(publish: Callable[..., Path]) -> None:
    html = publish(*hostile_records()).read_text(encoding="utf-8")
    page = Elements(html)
    assert [attrs.get("type") for name, attrs in page.found if name == "script"] == ["application/json", None]
    assert "img" not in {name for name, _ in page.found}
    assert not [key for _, attrs in page.found for key in attrs if key.startswith("on")]
    assert "{{ 7 * 7 }}" in html
    data = html.split('id="records">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data)
    labels = [record["label"] for record in json.loads(data) if record["source"] == "measured"]
    assert labels == HOSTILE


def test_script_json_comes_back_as_it_was() -> None:
    assert json.loads(script_json(HOSTILE)) == HOSTILE


def test_only_the_pages_own_script_and_style_may_act(publish: Callable[..., Path]) -> None:
    html = publish(make_record()).read_text(encoding="utf-8")
    policy = next(attrs["content"] for name, attrs in Elements(html).found if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert " style=" not in html


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def dom(page: Path, fragment: str = "") -> Elements:
    """The page after a browser ran its script."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --dump-dom"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [browser(), *flags.split(), f"--user-data-dir={profile}", page.as_uri() + fragment],
            capture_output=True, text=True, encoding="utf-8", timeout=120,
        )  # fmt: skip
    if "<html" not in done.stdout:
        pytest.skip(f"Chromium does not start here: {done.stderr[-200:]}")
    return Elements(done.stdout)


def test_hostile_text_does_nothing_in_a_browser(publish: Callable[..., Path]) -> None:
    page = dom(publish(*hostile_records()))
    root = next(attrs for name, attrs in page.found if name == "html")
    assert "js" in (root.get("class") or "").split()  # the page's own script ran
    assert "data-pwned" not in root
    assert not [name for name, _ in page.found if name == "img"]
    shown = "".join("".join(texts) for texts in page.texts.values())
    for label in HOSTILE:
        assert label in shown


def test_address_filters_sorts_and_opens(publish: Callable[..., Path]) -> None:
    records = [
        make_record("alpha run", number=0, value=10.0),
        make_record("alpha walk", number=1, value=30.0),
        make_record("beta run", number=2, value=20.0),
    ]
    page = publish(*records)
    opened = records[0].id[:12]
    found = dom(page, f"#q=alpha&sort=1+descending&open={opened}")
    rows = [attrs for name, attrs in found.of_class("row") if name == "tbody" and "id" in attrs]
    shown = [attrs["id"] for attrs in rows if "off" not in (attrs.get("class") or "").split()]
    assert shown == [f"r-{records[1].id[:12]}", f"r-{opened}"]
    assert [attrs["id"] for _, attrs in found.of_class("more") if "shown" in (attrs["class"] or "")] == [f"d-{opened}"]
    assert found.having("th", "aria-sort") == ["descending"]


# --- The paper's rows -------------------------------------------------------------------------------------------------


def test_papers_rows_stand_apart_and_are_marked(publish: Callable[..., Path]) -> None:
    html = publish(make_record()).read_text(encoding="utf-8")
    measured, _, printed = html.partition('<section class="source-paper"')
    printed = printed.partition("</section>")[0]
    paper = read_records(resource("leaderboard") / "baselines")
    assert printed.count('<span class="tag">paper</span>') == len(paper)
    assert "Do not compare these rows" in printed
    assert "LaCT-760M" not in measured
    assert "ReFINE mid-training" not in printed
    for record in paper:
        assert f'id="r-{record.id[:12]}"' in printed


def test_baselines_are_the_papers_tables() -> None:
    paper = {record.name: record for record in read_records(resource("leaderboard") / "baselines")}
    kinds = [name.split("-")[1] for name in paper]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "niah": 6,
        "longqa": 16,
        "longbench": 10,
        "ablation": 12,
    }
    for record in paper.values():
        assert record.source == "paper"
        assert record.reference is not None
        assert record.reference.startswith("arXiv:2602.16704v1")
        assert record.restore == ("never" if record.stage == "test-time" else None)
        assert all(score.stderr is None for score in record.scores)


def test_longbench_means_of_the_paper_agree_with_its_tasks() -> None:
    """Typing errors would show: each printed average is that of the twelve printed scores, up to rounding."""
    for record in read_records(resource("leaderboard") / "baselines"):
        if record.name.startswith("paper-longbench"):
            assert len(record.scores) == 12
            assert fmean(score.value for score in record.scores) == pytest.approx(record.groups[0].value, abs=0.06)


# --- What a reader must know ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "badge"),
    [
        ({"limit": 500}, ">n = 100<"),
        ({"n": 20}, ">n = 20<"),
        ({"dirty": True}, ">uncommitted code<"),
        ({"restore": "never"}, ">carried over<"),
        ({"truncated": 3}, ">12 prompts cut<"),
    ],
)
def test_rows_carry_their_warnings(changes: dict[str, Any], badge: str) -> None:
    def badges(record: ScoreRecord) -> list[str]:
        return re.findall(r'<span class="badge b-\w+" title="[^"]+"(>[^<]+<)/span>', render([record]))

    assert badges(make_record()) == []
    assert badges(make_record(**changes)) == [badge]


def test_restored_test_time_training_is_no_warning() -> None:
    html = render([make_record(restore="prompt")])
    assert "restored after each prompt" in html
    assert "carried over</span>" not in html


def test_leaders_are_all_that_cannot_be_told_from_the_best() -> None:
    def of(*pairs: tuple[float, float | None]) -> list[Score | None]:
        return [Score(value, stderr, 100) for value, stderr in pairs]

    assert leaders(of((50, 3), (45, 4), (30, 3))) == {0, 1}  # 5 < 2·5; 20 > 2·4.24
    assert leaders([*of((50, 3)), None, *of((30, 3))]) == {0}
    assert leaders(of((50, 3), (45, 3))) == set()  # nobody is worse: nothing to say
    assert leaders(of((50, 3))) == set()
    assert leaders(of((50, None), (30, 3))) == set()
    assert leaders([Score(2.0, 0.1, 9, higher_is_better=False), Score(9.0, 0.1, 9, higher_is_better=False)]) == {0}


def test_zero_error_of_few_examples_is_no_certainty() -> None:
    assert leaders([Score(100, 0.0, 4), Score(75, 25.0, 4)]) == set()
    assert leaders([Score(100, 0.0, 1000), Score(75, 1.4, 1000)]) == {0}


def test_rows_that_answered_other_questions_are_not_compared() -> None:
    rows = [make_record("a", number=0, value=10.0, stderr=1.0), make_record("b", number=1, value=50.0, stderr=1.0)]
    assert 'class="num best"' in render(rows)
    assert 'class="mixed" title' not in render(rows)
    other = make_record("b", number=1, value=50.0, stderr=1.0, data="f" * 64, lengths=(1024, 2048))
    html = render([rows[0], other])
    assert html.count('class="mixed" title') == 6  # four task columns and two means; longbench still agrees
    assert 'class="num best" data-sort="50.0" title="longbench, ' in html
    assert 'class="num best" data-sort="50.0" title="niah' not in html


def test_a_task_without_a_group_has_its_own_column() -> None:
    grouped = make_record("grouped", number=0)
    score = TaskScore(task="wikitext", group="wikitext", metric="perplexity", value=512.0, n=9, unit="raw",
                      higher_is_better=False)  # fmt: skip
    alone = make_record("alone", number=1).model_copy(update={"scores": (score,), "groups": ()})
    head, _, first, second = markdown_table([grouped, alone]).splitlines()
    assert head == "| run | niah 1K | niah 2K | longbench | wikitext | examples per task | note |"
    assert first.split(" | ")[4] == ""
    assert second == "| alone |  |  |  | 512.0 | 9 |  |"
    assert ">alone</span></button>" in render([grouped, alone])


# --- Charts and other tables ------------------------------------------------------------------------------------------


def test_chart_is_lines_over_lengths_and_dots_for_one() -> None:
    lines = chart([make_record(value=40.0, stderr=5.0)], "niah")
    assert lines is not None
    assert lines.kind == "lines"
    assert [text for _, text in lines.ticks] == ["1K", "2K"]
    first, second = lines.series[0].points
    assert first.x < second.x
    assert first.high < first.y < first.low  # pixels grow downwards
    assert first.low - first.y == pytest.approx(first.y - first.high)
    dots = chart([make_record(lengths=(512,))], "niah")
    assert dots is not None
    assert dots.kind == "dots"
    assert chart([make_record()], "longqa") is None


def test_chart_axis_starts_at_zero_and_holds_every_bar() -> None:
    for value in (0.0, 0.3, 37.0, 99.9, 100.0):
        lines = chart([make_record(value=value, stderr=2.0)], "niah")
        assert lines is not None
        assert lines.grid[0][1] == "0"
        top, bottom = lines.grid[-1][0], lines.grid[0][0]
        assert all(top <= p.high <= p.y <= p.low <= bottom for p in lines.series[0].points)


def test_markdown_table_escapes_and_links() -> None:
    record = make_record("a|b [c](d) <i>*x*", restore="never")
    table = markdown_table([record], "records/")
    head, _, row = table.splitlines()
    assert head == "| run | niah 1K | niah 2K | longbench | examples per task | note |"
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", head))
    assert f"](records/{record.file_name})" in row
    assert "&lt;i&gt;\\*x\\*" in row
    assert "| 40.0 ± 4.9 |" in row
    assert row.endswith("| 100 | carried over |")


def test_summary_table_keeps_the_given_order_and_fits_a_terminal() -> None:
    records = [make_record("second", number=2), make_record("[bold]first[/bold]", number=1, restore="never")]
    out = StringIO()
    Console(file=out, width=80, color_system=None).print(summary_table(records))
    text = out.getvalue()
    assert text.index("second") < text.index("[bold]first")
    assert "40.0 ± 4.9" in text
    assert "carried over" in text
    assert "niah" in text
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("width", (50, 80, 100, 160, 300, 500))
@pytest.mark.parametrize("runs", (1, 2, 7))
def test_summary_table_loses_nothing_at_any_width(width: int, runs: int) -> None:
    tasks = [f"longbench_{name}" for name in ("passage_retrieval_en", "multifieldqa_en", *"abcdefghij")]
    values = [[10.0 * run + place / 2 for place in range(len(tasks))] for run in range(runs)]
    records = []
    for run in range(runs):
        more = [
            TaskScore(task=task, group=task, metric="f1", value=value, stderr=0.2, n=20)
            for task, value in zip(tasks, values[run], strict=True)
        ]
        record = make_record(f"model-{run} trained long", number=run, value=90.0 + run, restore="never")
        records.append(record.model_copy(update={"scores": (*record.scores, *more)}))
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(summary_table(records))
    text = out.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    words = Counter(text.split())
    assert {"niah", "1K", "2K", "longbench", *tasks} <= set(words)
    assert all(words[f"{value:.1f}"] == 1 for run in values for value in run)
    assert all(words[f"{90.0 + run:.1f}"] == 3 and words[f"model-{run}"] == 1 for run in range(runs))
    assert words["carried"] == words["100"] == runs


def test_numbers_are_written_for_readers() -> None:
    assert [length_text(length) for length in (512, 1024, 16384, None)] == ["512", "1K", "16K", ""]
    assert [count_text(number) for number in (None, 7, 1_234_567, 2_000)] == ["not known", "7", "1.23M", "2k"]
    assert [seconds_text(s) for s in (None, 1.25, 59.6, 600, 3725)] == [
        "not known",
        "1.2 s",
        "60 s",
        "10 min",
        "1 h 2 min",
    ]
