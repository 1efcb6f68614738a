"""LongBench as its authors publish it: tasks, prompts, data, scores, and where lm-eval's tasks differ."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lm_eval.tasks
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from refine_harness.config import Evaluation
from refine_harness.errors import TaskError
from refine_harness.evaluation import longbench
from refine_harness.evaluation.lm import RefineLM, parse_generation
from refine_harness.evaluation.longbench import BUCKETS, CATEGORIES, E_TASKS, WITHOUT_CHAT_TEMPLATE
from refine_harness.evaluation.scorers import code_similarity
from refine_harness.evaluation.statistics import Estimate, combined
from refine_harness.evaluation.tasks import extract_scores, our_groups, resolve
from refine_harness.records import category_weights
from refine_harness.resources import resource

OFFICIAL = json.loads((Path(__file__).parent / "official_longbench.json").read_text(encoding="utf-8"))
TASKS = [task for tasks in CATEGORIES.values() for task in tasks]
STOCK = Path(str(lm_eval.tasks.__file__)).parent / "longbench"

ANSWERS = {
    "trec": "Date",
    "lsht": "体育",
    "passage_count": "3",
    "passage_retrieval_en": "Paragraph 3",
    "passage_retrieval_zh": "段落3",
}
"""Task -> the right answer of every row that is made here; for the others, `Ann`."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def yaml_of(task: str, *, functions: bool = True) -> dict[str, Any]:
    folder = "longbench_e" if task.endswith("_e") else "longbench"
    return load_yaml(resource("tasks") / folder / f"{task}.yaml", resolve_func=functions)


def stock_yaml(task: str) -> dict[str, Any]:
    return load_yaml(STOCK / f"{task}.yaml", resolve_func=False)


def template(task: str) -> str:
    return yaml_of(task)["dataset_kwargs"]["template"]


def rows_of(task: str, lengths: Sequence[int] = (100, 3999, 4000, 7999, 8000, 9000)) -> list[dict[str, Any]]:
    return [
        {
            "context": f"Some text {i} of {task}.",
            "input": f"question {i}",
            "answers": [ANSWERS.get(task, "Ann")],
            "all_classes": ["Date", "Food", "体育", "时政"] if task in ("trec", "lsht") else None,
            "length": length,
        }
        for i, length in enumerate(lengths)
    ]


def jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def put(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_text(jsonl(rows), encoding="utf-8")


def archive(members: Mapping[str, str]) -> bytes:
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, text in members.items():
            opened.writestr(name, text)
    return blob.getvalue()


def load(task: str, **metadata: Any) -> list[dict[str, Any]]:
    """The examples of a task as its YAML loads them."""
    tree = yaml_of(task)
    return list(tree["custom_dataset"](**{**tree["metadata"], **metadata}, **tree["dataset_kwargs"])["test"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every task of LongBench and LongBench-E, as the hub's archive unpacks."""
    folder = tmp_path_factory.mktemp("hub")
    for task in TASKS:
        put(folder / "data" / f"{task}.jsonl", rows_of(task))
    for task in E_TASKS:
        put(folder / "data" / f"{task}_e.jsonl", rows_of(task))
    return str(folder)


# What there is


def test_there_are_longbenchs_21_tasks_and_longbench_es_13():
    groups = {name: [task.removeprefix("refine_longbench_") for task in tasks] for name, tasks in our_groups().items()}
    published = list(OFFICIAL["published"]["tasks"])
    assert groups["refine_longbench"] == published == TASKS
    assert len(published) == 21
    assert groups["refine_longbench_e"] == [f"{task}_e" for task in E_TASKS]
    assert len(E_TASKS) == 13
    assert {path.stem for path in STOCK.glob("*_e.yaml") if not path.stem.startswith("_")} == {
        f"{task}_e" for task in E_TASKS
    }


def test_english_and_chinese_are_told_apart_and_share_the_code():
    groups = {name: {task.removeprefix("refine_longbench_") for task in tasks} for name, tasks in our_groups().items()}
    chinese = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
    assert groups["refine_longbench_zh"] == chinese | {"lcc", "repobench-p"}
    assert groups["refine_longbench_en"] == set(TASKS) - chinese
    assert len(groups["refine_longbench_paper"]) == 12
    for group in ("en", "zh", "paper", "open"):
        assert groups[f"refine_longbench_{group}"] < set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_template_is_the_published_one_to_the_last_byte(task: str):
    assert hashlib.sha256(template(task).encode()).hexdigest() == OFFICIAL["prompts"][task]


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_may_have_as_many_tokens_as_published(task: str):
    settings = yaml_of(task)["generation_kwargs"]
    assert settings["max_gen_toks"] == OFFICIAL["answer_tokens"][task]
    assert settings["until"] == []
    assert parse_generation(settings, task).temperature == 0.0


@pytest.mark.parametrize("task", E_TASKS)
def test_a_task_of_longbench_e_is_that_of_longbench_with_other_data_and_metrics(task: str):
    plain, by_length = yaml_of(task), yaml_of(f"{task}_e")
    assert [metric["metric"] for metric in by_length.pop("metric_list")] == list(BUCKETS)
    assert by_length.pop("metadata")["by_length"] is True
    assert by_length.pop("task") == f"{plain.pop('task')}_e"
    del plain["metric_list"], plain["metadata"]
    assert plain == by_length


# Scores


@pytest.mark.parametrize("case", OFFICIAL["scorer"], ids=lambda case: case["task"])
def test_a_task_is_scored_as_by_longbenchs_scorer(case: dict[str, Any]):
    score = yaml_of(case["task"])["process_results"]
    scores = [
        score({"answers": answers, "all_classes": case["all_classes"]}, [prediction])["score"]
        for prediction, answers in zip(case["predictions"], case["answers"], strict=True)
    ]
    assert round(100 * fmean(scores), 2) == case["score"]


def test_longbenchs_scorer_was_recorded_for_every_metric():
    assert {case["task"] for case in OFFICIAL["scorer"]} >= WITHOUT_CHAT_TEMPLATE
    scorers = {yaml_of(case["task"], functions=False)["process_results"] for case in OFFICIAL["scorer"]}
    assert scorers == {yaml_of(task, functions=False)["process_results"] for task in TASKS}


@pytest.mark.parametrize("case", OFFICIAL["scorer_e"], ids=lambda case: case["task"])
def test_longbench_e_is_scored_by_length_as_by_its_scorer(case: dict[str, Any], tmp_path: Path):
    task = case["task"]
    rows = [
        {"context": "c", "input": "q", "answers": answers, "length": length, "all_classes": case["all_classes"]}
        for answers, length in zip(case["answers"], case["lengths"], strict=True)
    ]
    put(tmp_path / f"{task}_e.jsonl", rows)
    score = yaml_of(f"{task}_e")["process_results"]
    found: dict[str, list[float]] = {}
    for doc, prediction in zip(load(f"{task}_e", data=str(tmp_path)), case["predictions"], strict=True):
        for name, value in score(doc, [prediction]).items():
            found.setdefault(name, []).append(value)
    expected = {name: value for name, value in case["scores"].items() if value is not None}
    assert {name: round(100 * fmean(values), 2) for name, values in found.items()} == expected


def test_the_group_means_are_the_averages_printed_in_longbenchs_readme():
    published = OFFICIAL["published"]
    for group, printed in (("longbench_en", published["english"]), ("longbench_zh", published["chinese"])):
        tasks = [task.removeprefix("refine_") for task in our_groups()[f"refine_{group}"]]
        parts = [Estimate(published["tasks"][task.removeprefix("longbench_")], 0.0) for task in tasks]
        weights = category_weights(tasks, longbench.categories(group, tasks))
        # Printed from scores of two places, and rounded again: 44.45 became 44.5.
        assert combined(parts, weights).value == pytest.approx(printed, abs=0.06)
        assert combined(parts).value != pytest.approx(printed, abs=0.06), "a mean over tasks is something else"
    assert longbench.categories("longbench_paper", ["longbench_lcc"]) == {}


# A whole run of lm-eval


class RightHalfTheTime(LM):
    """Answers rightly where an example's index is even."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise AssertionError("no task of LongBench asks for this")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("no task of LongBench asks for this")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [request.doc["answers"][0] if request.doc["index"] % 2 == 0 else "" for request in requests]


@pytest.fixture(scope="module")
def by_length(data: str) -> tuple[dict[str, Any], list[Any]]:
    resolved = resolve(["longbench_e"], Evaluation(data=data), "unused")
    results = resolved.evaluate(RightHalfTheTime(), bootstrap_iters=0)
    return results, extract_scores(results, resolved)


def test_longbench_e_gives_a_score_for_each_task_and_length(by_length: tuple[dict[str, Any], list[Any]]):
    _, scores = by_length
    single = {(score.task, score.metric): score for score in scores if score.kind == "task"}
    assert set(single) == {(f"longbench_{task}_e", bucket) for task in E_TASKS for bucket in BUCKETS}
    assert {score.n for score in single.values()} == {2}
    assert {round(score.value, 4) for score in single.values()} == {50.0}


def test_longbench_e_is_averaged_over_tasks_per_length(by_length: tuple[dict[str, Any], list[Any]]):
    results, _ = by_length
    group = results["groups"]["refine_longbench_e"]
    assert [group[f"{bucket},none"] for bucket in BUCKETS] == [pytest.approx(0.5)] * 3


def test_all_21_tasks_run_through_lm_eval(data: str):
    resolved = resolve(["longbench"], Evaluation(data=data, limit=2), "unused")
    scores = extract_scores(resolved.evaluate(RightHalfTheTime(), bootstrap_iters=0), resolved)
    single = {score.task.removeprefix("longbench_"): score for score in scores if score.kind == "task"}
    assert list(single) == TASKS
    assert {round(score.value, 4) for score in single.values()} == {50.0}
    assert single["lcc"].metric == "code_similarity_difflib", "a record says which ratio was taken"


def test_a_limit_counts_for_each_length_and_takes_the_first_rows(data: str):
    docs = load("qasper_e", data=data, limit=1)
    assert [(doc["index"], doc["bucket"]) for doc in docs] == [(0, "0-4k"), (2, "4-8k"), (4, "8k+")]
    assert [doc["index"] for doc in load("qasper", data=data, limit=1)] == [0]


# Data


LAYOUTS = [
    "longbench/{task}.parquet",
    "{task}.parquet",
    "longbench/{task}.jsonl",
    "{task}.jsonl",
    "longbench/data/{task}.jsonl",
    "data/{task}.jsonl",
    "{task}/test-00000-of-00001.parquet",
    "longbench/{task}/test-00000-of-00001.parquet",
    "{task}/test/0000.parquet",
    "longbench/{task}/test/0000.parquet",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", ["passage_retrieval_zh", "repobench-p_e"])
def test_data_is_found_in_every_layout(task: str, layout: str, tmp_path: Path):
    put(tmp_path / layout.format(task=task), rows_of(task.removesuffix("_e")))
    docs = load(task, data=str(tmp_path))
    name = task.removesuffix("_e")
    assert [doc["prompt"] for doc in docs] == [
        template(name).replace("{context}", f"Some text {i} of {name}.").replace("{input}", f"question {i}")
        for i in range(6)
    ]
    assert docs[0]["answers"] == [ANSWERS.get(name, "Ann")]


@pytest.mark.parametrize("place", ["data.zip", "longbench/data.zip"])
@pytest.mark.parametrize("member", ["data/{task}.jsonl", "{task}.jsonl"])
def test_the_hubs_archive_is_read_in_place(place: str, member: str, tmp_path: Path):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    names = [*TASKS, *(f"{task}_e" for task in E_TASKS)]
    path.write_bytes(archive({member.format(task=n): jsonl(rows_of(n.removesuffix("_e"))) for n in names}))
    for task in ("lsht", "qasper_e"):
        assert [doc["index"] for doc in load(task, data=str(tmp_path))] == list(range(6))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["data.zip"], "nothing is unpacked"
    assert longbench.missing([*TASKS, "nq"], tmp_path) == ["nq"]


def test_names_in_an_archive_are_compared_and_never_followed(tmp_path: Path):
    rows = jsonl(rows_of("lcc"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lcc.jsonl").write_text(rows, encoding="utf-8")
    folder = tmp_path / "data"
    folder.mkdir()
    names = [
        "../outside/lcc.jsonl",
        str(outside / "lcc.jsonl"),
        "data/../../lcc.jsonl",
        "data/lcc.jsonl/",
        "x/lcc.jsonl",
    ]
    (folder / "data.zip").write_bytes(archive(dict.fromkeys(names, rows)))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TaskError, match="refine_longbench_lcc found none of its files"):
        load("lcc", data=str(folder))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_beside_the_archive_comes_first_and_an_archive_without_the_task_is_passed_over(tmp_path: Path):
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench" / "data.zip").write_bytes(archive({"data/qmsum.jsonl": jsonl(rows_of("qmsum"))}))
    (tmp_path / "data.zip").write_bytes(archive({"data/lcc.jsonl": jsonl(rows_of("lcc"))}))
    assert len(load("lcc", data=str(tmp_path))) == 6
    put(tmp_path / "lcc.jsonl", rows_of("lcc", lengths=(1, 2)))
    assert len(load("lcc", data=str(tmp_path))) == 2


def test_pieces_of_parquet_are_read_in_order(tmp_path: Path):
    rows = rows_of("qasper")
    put(tmp_path / "qasper" / "test-00001-of-00002.parquet", rows[4:])
    put(tmp_path / "qasper" / "test-00000-of-00002.parquet", rows[:4])
    assert [doc["prompt"].count(f"Some text {i} ") for i, doc in enumerate(load("qasper", data=str(tmp_path)))] == [
        1
    ] * 6


def test_the_hubs_copy_calls_the_input_question(tmp_path: Path):
    rows = [{("question" if key == "input" else key): value for key, value in row.items()} for row in rows_of("qasper")]
    put(tmp_path / "qasper.parquet", rows)
    assert "Question: question 0\n\nAnswer:" in load("qasper", data=str(tmp_path))[0]["prompt"]


def test_without_a_folder_the_hubs_archive_is_read_and_its_copy_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[Any, ...]] = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((*arguments, options["repo_type"]))
        (tmp_path / "data.zip").write_bytes(archive({"data/lcc.jsonl": jsonl(rows_of("lcc"))}))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(load("lcc")) == 6
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]

    def offline(*arguments: Any, **options: Any) -> str:
        raise OSError("no network")

    def copy(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((*arguments, options["split"]))
        return rows_of("lcc", lengths=(1,))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setattr("datasets.load_dataset", copy)
    assert len(load("lcc")) == 1
    assert asked[-1] == ("Xnhyacinth/LongBench", "lcc", "test")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        TaskError, match=r"could not be read from the hub \(no network\), nor its copy .*Give --data DIR"
    ):
        load("lcc")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("lcc.jsonl", b'{"context": "a"', "lcc.jsonl cannot be read"),
        ("lcc.jsonl", b'["context"]\n', r"lcc\.jsonl, row 1 is no row but \['context'\]"),
        ("lcc.jsonl", b"", "holds no row"),
        ("lcc.parquet", b"PAR1", "lcc.parquet cannot be read"),
        ("data.zip", b"PK", "data.zip cannot be read"),
        ("data.zip", archive({"data/lcc.jsonl": "{"}), "data.zip cannot be read"),
        ("data.zip", archive({"data/lcc.jsonl": jsonl(rows_of("lcc"))})[:-30], "data.zip cannot be read"),
        ("data.zip", archive({"data/lcc.jsonl": '{"a": 1}'}), r"data\.zip, data/lcc\.jsonl, row 1 has a; expected"),
    ],
)
def test_broken_data_is_one_sentence(name: str, content: bytes, sentence: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=sentence):
        load("lcc", data=str(tmp_path))


def test_bytes_changed_within_an_archive_are_noticed(tmp_path: Path):
    blob = bytearray(archive({"data/lcc.jsonl": jsonl(rows_of("lcc") * 50)}))
    blob[60] ^= 0xFF
    (tmp_path / "data.zip").write_bytes(blob)
    with pytest.raises(TaskError, match=r"data\.zip cannot be read"):
        load("lcc", data=str(tmp_path))


@pytest.mark.parametrize(
    ("task", "change", "sentence"),
    [
        ("lsht", {"all_classes": None}, "row 1 has no all_classes"),
        ("passage_retrieval_en", {"answers": ["3"]}, "row 1 has the answer '3'; expected one like Paragraph 7"),
        ("passage_retrieval_zh", {"answers": ["Paragraph 3"]}, "expected one like 段落7"),
        ("qasper_e", {"length": None}, "row 1 has the length None, by which LongBench-E is scored"),
        ("qasper", {"answers": []}, "row 1 has no answers"),
        ("qasper", {"input": None}, "expected context, input and answers"),
    ],
)
def test_a_row_that_cannot_be_scored_is_refused(task: str, change: dict[str, Any], sentence: str, tmp_path: Path):
    if change == {"input": None}:
        rows = [{"context": "a", "answers": ["b"]}]
    else:
        rows = [{**row, **change} for row in rows_of(task.removesuffix("_e"))]
    put(tmp_path / f"{task}.jsonl", rows)
    with pytest.raises(TaskError, match=sentence):
        load(task, data=str(tmp_path))


def test_a_chinese_task_without_jieba_says_so_before_anything_is_read(data: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(longbench, "find_spec", lambda name: None)
    for task in ("multifieldqa_zh", "dureader", "vcsum"):
        with pytest.raises(TaskError, match=rf"refine_longbench_{task} is scored on Chinese words.*pip install jieba"):
            load(task, data=data)
    for task in ("lsht", "passage_retrieval_zh", "qasper"):  # scored by names and numbers
        assert load(task, data=data)


# Where lm-eval 0.4.13's stock tasks differ from the benchmark, in the order of its list: each with what shows it


def stock_prompt(task: str, context: str, question: str) -> str:
    return stock_yaml(task)["doc_to_text"].replace("{{context}}", context).replace("{{question}}", question)


MISSING = {
    **dict.fromkeys(("triviaqa", "samsum"), "\n"),
    **dict.fromkeys(("lcc", "repobench-p"), "\n"),
    **dict.fromkeys(("passage_count", "passage_retrieval_en"), " "),
}
"""Task -> the one character that the stock prompt lacks."""


@pytest.mark.parametrize("task", [*TASKS, *(f"{task}_e" for task in E_TASKS)])
def test_difference_1_prompts_have_the_characters_that_stock_ones_lack(task: str, data: str):
    name = task.removesuffix("_e")
    ours = load(task, data=data)[0]["prompt"]
    stock = stock_prompt(task, f"Some text 0 of {name}.", "question 0")
    if name not in MISSING:
        assert ours == stock
    elif name in ("triviaqa", "samsum"):
        assert ours == stock.replace("\nquestion 0", "\n\nquestion 0")
    else:
        assert ours == stock + MISSING[name]


@pytest.mark.parametrize("task", ["trec", "triviaqa", "samsum", "lsht"])
def test_difference_2_the_first_line_is_taken_at_scoring_not_by_a_stop(task: str):
    reference = ANSWERS.get(task, "Ann")
    answer = f"\n{reference}\nQuestion: next"
    tree = yaml_of(task)
    doc = {"answers": [reference], "all_classes": ["Date", "体育", "Food"]}
    assert tree["generation_kwargs"]["until"] == []
    assert tree["process_results"](doc, [answer])["score"] == pytest.approx(1.0)
    stopped = answer.partition(stock_yaml(task)["generation_kwargs"]["until"][0])[0]
    assert stopped == "", "what stock scores"
    assert tree["process_results"](doc, [stopped])["score"] == 0.0


def test_difference_3_an_empty_line_is_the_first_line_of_code():
    answer = "# c\n\nreturn x"
    assert yaml_of("lcc")["process_results"]({"answers": ["return x"]}, [answer]) == {"score": 0.0}
    without = "\n".join(line for line in answer.split("\n") if line.strip())
    assert code_similarity(without, "return x") == 1.0, "stock passes over empty lines"


def test_difference_4_the_ratio_of_code_is_difflibs_and_the_record_says_so():
    # python-Levenshtein, if installed beside fuzzywuzzy, gives 0.65.
    assert code_similarity("self.total += value", "self.count += 1") == 0.59
    for task in ("lcc", "repobench-p"):
        assert yaml_of(task)["metadata"]["scorer"] == "code_similarity_difflib"


TEXT = "The harbour master counted 40 boats before noon and wrote each name in a blue book. "


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer model with random weights, and its tokenizer."""
    from refine_harness.data.tokenizer import train_tokenizer
    from refine_harness.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    train_tokenizer([TEXT], 300, path)
    torch.manual_seed(0)
    config = DeltaNetConfig(
        hidden_size=32, num_heads=2, num_hidden_layers=2, vocab_size=300, pad_token_id=0, initializer_range=0.3
    )
    DeltaNetForCausalLM(config).save_pretrained(path)
    return path


def model(folder: Path, **settings: Any) -> RefineLM:
    return RefineLM(folder, device="cpu", dtype="float64", progress=lambda done, total: None, **settings)


def asked(prompt: str, tokens: int = 12) -> Instance:
    settings = {"do_sample": False, "until": [], "max_gen_toks": tokens}
    return Instance("generate_until", {}, (prompt, settings), 0, ("refine_longbench_qasper", 0, 1))


def halves(lm: RefineLM, text: str, room: int) -> str:
    """LongBench's rule: the first and the last half of so many tokens, as text."""
    tokens = lm.tok_encode(text, add_special_tokens=False)
    assert len(tokens) > room
    return lm.tok_decode(tokens[: room // 2]) + lm.tok_decode(tokens[-(room // 2) :])


def test_difference_5_long_prompts_lose_their_middle(model_folder: Path):
    prompt = "Q: " + TEXT * 6 + "\nA:"
    free = model(model_folder)
    room = 40
    cut = halves(free, prompt, room)
    assert len(free.tok_encode(cut, add_special_tokens=False)) == room
    bound = model(model_folder, max_length=room + 12)
    assert bound.generate_until([asked(prompt)]) == free.generate_until([asked(cut)])
    assert bound.truncated == {"refine_longbench_qasper": 1}
    tokens = free.tok_encode(prompt, add_special_tokens=False)
    end = free.tok_decode(tokens[-room:])  # what lm-eval's hf keeps
    assert free.generate_until([asked(end)]) != free.generate_until([asked(cut)])


def test_difference_5_a_chat_templates_two_ends_survive_the_cut(model_folder: Path):
    # LongBench cuts before it applies the template, so that the template is whole; so it is here.
    free, bound = model(model_folder), model(model_folder, max_length=52)
    for lm in (free, bound):
        lm.tokenizer.chat_template = "[u]{{ messages[0]['content'] }}[/u][a]"
    prompt = bound.apply_chat_template([{"role": "user", "content": TEXT * 6}])
    cut = halves(free, prompt, 40)
    assert cut.startswith("[u]The") and cut.endswith("[/u][a]")
    assert bound.generate_until([asked(prompt)]) == free.generate_until([asked(cut)])


def test_difference_6_six_tasks_skip_the_chat_template(data: str):
    def chat(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages)

    manager = TaskManager(include_path=str(resource("tasks")), include_defaults=False, metadata={"data": data})
    loaded = manager.load(["refine_longbench", "refine_longbench_e"])["tasks"]
    plain = set()
    for name, task in loaded.items():
        task.build_all_requests(
            limit=1,
            rank=0,
            world_size=1,
            system_instruction="Be brief.",
            apply_chat_template=True,
            chat_template=chat,
            tokenizer_name="x",
        )
        prompt = task.eval_docs[0]["prompt"]
        sent = task.instances[0].args[0]
        if sent == prompt:
            plain.add(name.removeprefix("refine_longbench_"))
        else:
            assert sent == f"[system]Be brief.[user]{prompt}"
    assert plain == WITHOUT_CHAT_TEMPLATE | {f"{task}_e" for task in WITHOUT_CHAT_TEMPLATE & set(E_TASKS)}


def test_difference_7_samsum_never_answers_with_nothing_and_ends_at_a_newline():
    settings = yaml_of("samsum")["generation_kwargs"]
    assert parse_generation(settings, "samsum").min_tokens == 1, "the first token may not end the answer"
    assert all("min_new_tokens" not in yaml_of(task)["generation_kwargs"] for task in TASKS if task != "samsum")
    doc = {"answers": ["Tom is late."], "all_classes": []}
    score = yaml_of("samsum")["process_results"]
    assert score(doc, ["Tom is late.\nDialogue: more"]) == score(doc, ["Tom is late."])


def test_difference_8_longbench_e_has_lengths_summaries_and_synthetic_tasks(data: str):
    stock = load_yaml(STOCK / "_longbench_e.yaml", resolve_func=False)["task"]
    assert not {"longbench_summarization_e", "longbench_synthetic_e"} & set(stock)
    missing = {"gov_report_e", "multi_news_e", "passage_count_e", "passage_retrieval_en_e"}
    assert missing <= {task.removeprefix("refine_longbench_") for task in our_groups()["refine_longbench_e"]}
    assert [m["metric"] for m in stock_yaml("qasper_e")["metric_list"]] == ["score", "qa_f1_score"]
    buckets = [doc["bucket"] for doc in load("qasper_e", data=data)]
    assert buckets == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+", "8k+"], "3999 is below 4k, 7999 below 8k"


def test_difference_9_what_is_the_same_stays_the_same():
    best = yaml_of("hotpotqa")["process_results"]({"answers": ["Bob", "Ann Lee"]}, ["Ann Lee"])
    assert best == {"score": 1.0}, "the best of several right answers"
    types = {"answers": ["a b c"], "all_classes": ["a b", "b c", "a b c"]}
    assert yaml_of("trec")["process_results"](types, ["a b c"]) == {"score": 0.5}, "names dropped while walking"


def test_difference_10_answers_are_scored_unstripped():
    # The space after the last full stop is an empty word to the package `rouge`; stock strips it away.
    doc = {"answers": ["The report is short."]}
    score = yaml_of("gov_report")["process_results"]
    as_given, stripped = (score(doc, [answer])["score"] for answer in ("The report is short. ", "The report is short."))
    assert as_given == pytest.approx(8 / 9)
    assert stripped == pytest.approx(1.0)
