"""LongBench and LongBench-E for lm-eval (THUDM/LongBench, arXiv 2308.14508): data, prompts, answer lengths, scores.

What a YAML of tasks/longbench and tasks/longbench_e names: `load` reads the examples, the `score_...` functions score
one. The prompt template stands in the YAML. Examples of a task (of LongBench-E: TASK_e) come from the first of these
under the folder the user gives (`--data DIR`, or metadata `data=DIR`), each looked for in DIR/longbench first:

    TASK.parquet, TASK.jsonl                     plain files
    data/TASK.jsonl                              the hub's archive, unpacked
    TASK/test-*.parquet, TASK/test/*.parquet     the hub's parquet layouts, all pieces in the order of their names
    data.zip                                     the hub's archive as it is, read in place

or, without a folder, from the hub: the benchmark's own archive, else the copy that lm-eval's stock tasks read. A row
has `context`, `input` (or `question`), `answers`, perhaps `all_classes`, and for LongBench-E `length`; or a
ready-made `prompt` and `answers`.

Where these tasks and lm-eval's stock ones differ, these follow the benchmark: prompts to the last newline and space,
first lines of answers taken at scoring, code similarity by difflib over the first line whether empty or not, answers
scored unstripped, LongBench-E by length, no chat template for six tasks (plain_prompt.py). The middle of over-long
prompts is left out by the model, not here.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_harness.errors import TaskError
from refine_harness.evaluation.generation import Doc, GeneratorSettings, as_dataset, first_line
from refine_harness.evaluation.longqa import read_rows
from refine_harness.evaluation.scorers import (
    classification,
    code_similarity,
    count,
    qa_f1,
    qa_f1_zh,
    retrieval,
    retrieval_zh,
    rouge_l,
    rouge_l_zh,
)
from refine_harness.evaluation.scorers import first_line as first_answer_line

if TYPE_CHECKING:
    from datasets import Dataset

CATEGORIES: dict[str, tuple[str, ...]] = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code completion": ("lcc", "repobench-p"),
}
"""LongBench's 21 tasks by what they ask, in the benchmark's order."""

E_TASKS = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec"),
    *("triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
"""The 13 of them that LongBench-E samples anew, evenly by length; there called TASK_e."""

WITHOUT_CHAT_TEMPLATE = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
"""Tasks whose prompts the benchmark gives even to chat models as they are: examples to continue, and code."""

BUCKETS = ("0-4k", "4-8k", "8k+")
"""LongBench-E's lengths, in the data's `length` (words in English, as the benchmark counted them)."""

FILES = (
    *("longbench/{task}.parquet", "{task}.parquet"),
    *("longbench/{task}.jsonl", "{task}.jsonl"),
    *("longbench/data/{task}.jsonl", "data/{task}.jsonl"),
    *("longbench/{task}/test-*.parquet", "{task}/test-*.parquet"),
    *("longbench/{task}/test/*.parquet", "{task}/test/*.parquet"),
    *("longbench/data.zip", "data.zip"),
)
"""Names looked for under the data folder, in this order."""

HUB_ARCHIVE = ("THUDM/LongBench", "data.zip")
HUB_COPY = "Xnhyacinth/LongBench"

_IN_CHINESE_WORDS = frozenset({"multifieldqa_zh", "dureader", "vcsum"})
_PARAGRAPH = {"passage_retrieval_en": re.compile(r"Paragraph \d"), "passage_retrieval_zh": re.compile(r"段落\d")}

TREC_CLASSES = (
    "Food",
    "Date",
    "Order, rank",
    "Speed",
    "Disease and medicine",
    "Word with a special property",
    "Abbreviation",
    "Language",
    "Letter like a-z",
    "Other entity",
    "Animal",
    "Expression abbreviated",
    "Price",
    "Techniques and method",
    "Musical instrument",
    "Mountain",
    "Currency name",
    "Event",
    "Product",
    "State",
    "Individual",
    "Organ of body",
    "Reason",
    "Manner of an action",
    "City",
    "Religion",
    "Invention, book and other creative piece",
    "Distance, linear measure",
    "Temperature",
    "Postcode or other code",
    "Size, area and volume",
    "Sport",
    "Country",
    "Other location",
    "Lasting time of somethin",
    "Equivalent term",
    "Description of something",
    "Weight",
    "Vehicle",
    "Color",
    "Other number",
    "Definition of something",
    "Element and substance",
    "Description of a person",
    "Symbols and sign",
    "Number of something",
    "Plant",
    "Percent, fraction",
    "Group or organization of person",
    "Title of a person",
)
"""trec's classes in LongBench's order and spelling, for rows that come without `all_classes`."""


def load(*, subset: str, template: str, by_length: bool = False, **metadata: Any) -> dict[str, Dataset]:
    """Examples of one task, in the data's order.

    Args:
        subset: LongBench's name of the task, such as repobench-p.
        template: its prompt, with {context} and perhaps {input}.
        by_length: LongBench-E: its rows (repobench-p_e) are read instead, which have lengths, and scores go by them.
        metadata: lm-eval's mapping, of which `data` and `limit` count. By length, `limit` counts for each of `BUCKETS`.

    Columns: index (of the row), prompt, answers, all_classes (empty but for trec and lsht); by length also bucket, the
    name of the metric that the example's score goes to.

    Raises TaskError: no data, unreadable data, a row that is no LongBench row, a Chinese task without jieba.
    """
    if subset in _IN_CHINESE_WORDS and find_spec("jieba") is None:
        raise TaskError(
            f"refine_longbench_{subset} is scored on Chinese words, which the package jieba cuts, and it is not "
            "installed. Run pip install jieba==0.42.1, or ask for the group longbench_en."
        )
    settings = GeneratorSettings.read(metadata)
    rows, where = _rows(f"{subset}_e" if by_length else subset, settings.data)
    docs: list[Doc] = []
    room = dict.fromkeys(BUCKETS if by_length else ("",), settings.limit or math.inf)
    for index, row in enumerate(rows):
        if not any(room.values()):
            break
        doc = _doc(index, row, subset, template, f"{where}, row {index + 1}")
        if by_length:
            doc["bucket"] = _bucket(row, f"{where}, row {index + 1}")
        if room[doc.get("bucket", "")]:
            room[doc.get("bucket", "")] -= 1
            docs.append(doc)
    if not docs:
        raise TaskError(f"{where} holds no row. Name another data folder.")
    return as_dataset(docs)


def missing(tasks: Sequence[str], folder: str | Path) -> list[str]:
    """Those of `tasks` (LongBench's names) for which there is no file under `folder`."""
    return [task for task in tasks if not _files(task, Path(folder))]


def _rows(subset: str, folder: str | None) -> tuple[Iterator[Any], str]:
    """The task's rows and where they are from."""
    if folder is None:
        return _hub_rows(subset)
    if files := _files(subset, Path(folder)):
        if files[0].suffix == ".zip":
            return _zipped_rows(files[0], subset), f"{files[0]}, data/{subset}.jsonl"
        where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        return (row for path in files for row in read_rows(path)), where
    what = "folder" if Path(folder).is_dir() else "folder (there is no such folder)"
    raise TaskError(
        f"refine_longbench_{subset} found none of its files under the data {what} {folder}; looked for "
        f"{', '.join(name.format(task=subset) for name in FILES)}. Put one there, name another folder with --data, or "
        "name the tasks that are there one by one."
    )


def _files(task: str, folder: Path) -> list[Path]:
    """The files of the first of `FILES` that is there; the archive only if it has the task."""
    for name in FILES:
        found = sorted(path for path in folder.glob(name.format(task=task)) if path.is_file())
        if found and (found[0].suffix != ".zip" or _member(found[0], task) is not None):
            return found
    return []


def _member(archive: Path, task: str) -> zipfile.ZipInfo | None:
    """A task's file in the hub's archive, by its exact name. Raises TaskError for a file that is no archive."""
    try:
        with zipfile.ZipFile(archive) as opened:
            names = {info.filename: info for info in opened.infolist() if not info.is_dir()}
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(archive, error) from None
    return next((names[name] for name in (f"data/{task}.jsonl", f"{task}.jsonl") if name in names), None)


def _zipped_rows(archive: Path, task: str) -> Iterator[Any]:
    """Rows of a task's file in the archive, which is read as a stream: no name in it ever becomes a path."""
    member = _member(archive, task)
    if member is None:
        raise TaskError(f"{archive} holds no data/{task}.jsonl. Download LongBench's data.zip again.")
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(member) as raw,
            io.TextIOWrapper(raw, encoding="utf-8") as lines,
        ):
            for line in lines:
                if line.strip():
                    yield json.loads(line)
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(archive, error) from None


def _unreadable(path: Path, error: Exception) -> TaskError:
    return TaskError(f"{path} cannot be read ({first_line(error)}). Replace it, or name another data folder.")


def _hub_rows(subset: str) -> tuple[Iterator[Any], str]:
    import datasets
    from huggingface_hub import hf_hub_download

    repository, name = HUB_ARCHIVE
    try:
        archive = Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds: offline, not found, no room
        why = first_line(error)
    else:
        return _zipped_rows(archive, subset), f"the hub's {repository}, {subset}"
    try:
        rows = datasets.load_dataset(HUB_COPY, subset, split="test")
    except Exception:  # what went wrong with the first says why
        raise TaskError(
            f"refine_longbench_{subset} was given no data folder, and {repository} could not be read from the hub "
            f"({why}), nor its copy {HUB_COPY}. Give --data DIR with {FILES[0].format(task=subset)} or LongBench's "
            f"{name}."
        ) from None
    return (dict(row) for row in rows), f"the hub's {HUB_COPY}, {subset}"


def _doc(index: int, row: Any, task: str, template: str, where: str) -> Doc:
    if not isinstance(row, Mapping):
        raise TaskError(f"{where} is no row but {row!r:.60}. Take LongBench's files, or name another data folder.")
    answers = row.get("answers")
    answers = [answers] if isinstance(answers, str) else [str(answer) for answer in answers or ()]
    head, _, rest = template.partition("{context}")
    middle, asks, tail = rest.partition("{input}")
    question = row.get("input", row.get("question")) if asks else ""
    if "prompt" in row:
        prompt = _completed(str(row["prompt"]), template, where)
    elif "context" in row and question is not None:
        prompt = f"{head}{row['context']}{middle}{question}{tail}"
    else:
        raise TaskError(
            f"{where} has {', '.join(row)}; expected context, input and answers, or prompt and "
            "answers. Take LongBench's files, or name another data folder."
        )
    if not answers:
        raise TaskError(f"{where} has no answers. Take LongBench's files, or name another data folder.")
    if task in _PARAGRAPH and not all(_PARAGRAPH[task].search(answer) for answer in answers):
        raise TaskError(
            f"{where} has the answer {answers[0]!r:.60}; expected one like {_PARAGRAPH[task].pattern[:-2]}7. "
            "Take LongBench's files, or name another data folder."
        )
    classes = row.get("all_classes") or (TREC_CLASSES if task == "trec" else ())
    if task == "lsht" and not classes:
        raise TaskError(
            f"{where} has no all_classes, the names that answers are compared with. Take LongBench's files, or name "
            "another data folder."
        )
    return {"index": index, "prompt": prompt, "answers": answers, "all_classes": [str(name) for name in classes]}


def _bucket(row: Mapping[str, Any], where: str) -> str:
    """LongBench-E's name of a row's length. Raises TaskError for a row without one."""
    length = row.get("length")
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise TaskError(
            f"{where} has the length {length!r}, by which LongBench-E is scored; expected a number. Take LongBench's "
            "files, or name another data folder."
        )
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def _completed(prompt: str, template: str, where: str) -> str:
    """A ready-made prompt, with the white space that the template ends with where it was stripped.

    Raises TaskError for a prompt that does not begin and end as the template does, white space aside.
    """
    head = template.partition("{context}")[0]
    tail = template.rpartition("}")[2]
    if not _packed(prompt).startswith(_packed(head)) or not prompt.rstrip().endswith(tail.rstrip()):
        raise TaskError(
            f"{where} has a prompt that is not LongBench's for this task, which begins {head[:60]!r} and ends "
            f"{tail[-30:]!r}. Take LongBench's files, or name another data folder."
        )
    return prompt.rstrip() + tail[len(tail.rstrip()) :] if tail else prompt


def _packed(text: str) -> str:
    return "".join(text[:1000].split())


def categories(group: str, tasks: Sequence[str]) -> dict[str, str]:
    """Category of each task of ours, where `group` is averaged as the benchmark does it; else nothing.

    The published English and Chinese averages are means over categories of each category's mean.
    """
    if group not in ("longbench_en", "longbench_zh"):
        return {}
    category = {task: name for name, of_it in CATEGORIES.items() for task in of_it}
    return {task: category[task.removeprefix("longbench_")] for task in tasks}


# What YAMLs name as process_results


def score_qa_f1(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(qa_f1, results[0], doc)


def score_qa_f1_zh(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(qa_f1_zh, results[0], doc)


def score_first_line_qa_f1(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(qa_f1, first_answer_line(results[0]), doc)


def score_rouge_l(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(rouge_l, results[0], doc)


def score_rouge_l_zh(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(rouge_l_zh, results[0], doc)


def score_first_line_rouge_l(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(rouge_l, first_answer_line(results[0]), doc)


def score_code_similarity(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(code_similarity, results[0], doc)


def score_count(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(count, results[0], doc)


def score_retrieval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(retrieval, results[0], doc)


def score_retrieval_zh(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(retrieval_zh, results[0], doc)


def score_first_line_classification(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    def score(prediction: str, reference: str) -> float:
        return classification(prediction, reference, doc["all_classes"])

    return _best(score, first_answer_line(results[0]), doc)


def _best(score: Callable[[str, str], float], prediction: str, doc: Mapping[str, Any]) -> dict[str, float]:
    """The best score against any right answer, under the metric's name: of LongBench-E, the example's bucket."""
    return {doc.get("bucket", "score"): max(score(prediction, answer) for answer in doc["answers"])}
