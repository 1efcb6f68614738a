"""LongBench's English tasks for lm-eval (THUDM/LongBench, arXiv 2308.14508): its prompts, answer lengths and scores.

What a YAML of tasks/longbench names: `load` reads the examples, the `score_...` functions score one. The prompt
template stands in the YAML. Examples come from the first of these under the folder the user gives (`--data DIR`, or
metadata `data=DIR`):

    DIR/longbench/TASK.parquet, DIR/TASK.parquet, DIR/longbench/TASK.jsonl, DIR/TASK.jsonl,
    DIR/longbench/data/TASK.jsonl, DIR/data/TASK.jsonl (the hub's archive, unpacked)

or, without a folder, from the hub (Xnhyacinth/LongBench, the copy that lm-eval's stock tasks read). A row has
`context`, `input` (or `question`), `answers` and perhaps `all_classes`; or a ready-made `prompt` and `answers`.

Where these tasks and lm-eval's stock ones differ, these follow the benchmark: prompts to the last newline, first lines
of answers taken at scoring, code_sim. The middle of over-long prompts is left out by the model, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_harness.errors import TaskError
from refine_harness.evaluation.generation import Doc, GeneratorSettings, as_dataset, first_line
from refine_harness.evaluation.longqa import read_rows
from refine_harness.evaluation.scorers import classification, code_similarity, qa_f1, rouge_l
from refine_harness.evaluation.scorers import first_line as first_answer_line

if TYPE_CHECKING:
    from datasets import Dataset

FILES = (
    "longbench/{task}.parquet",
    "{task}.parquet",
    "longbench/{task}.jsonl",
    "{task}.jsonl",
    "longbench/data/{task}.jsonl",
    "data/{task}.jsonl",
)
"""Names looked for under the data folder, in this order."""

HUB = "Xnhyacinth/LongBench"

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


def load(*, subset: str, template: str, **metadata: Any) -> dict[str, Dataset]:
    """Examples of one task, in the data's order.

    Args:
        subset: LongBench's name of the task, such as repobench-p.
        template: its prompt, with {context} and perhaps {input}.
        metadata: lm-eval's mapping, of which `data` and `limit` count.

    Columns: index, prompt, answers, all_classes (empty but for trec).
    Raises TaskError: no data, unreadable data, a row that is no LongBench row.
    """
    settings = GeneratorSettings.read(metadata)
    rows, where = _rows(subset, settings.data)
    docs: list[Doc] = []
    for index, row in enumerate(rows):
        if settings.limit is not None and index == settings.limit:
            break
        docs.append(_doc(index, row, subset, template, where))
    if not docs:
        raise TaskError(f"{where} holds no row. Name another data folder.")
    return as_dataset(docs)


def _rows(subset: str, folder: str | None) -> tuple[Iterator[Mapping[str, Any]], str]:
    """The task's rows and where they are from."""
    if folder is None:
        return _hub_rows(subset), f"the hub's {HUB}, {subset}"
    for name in FILES:
        path = Path(folder) / name.format(task=subset)
        if path.is_file():
            return read_rows(path), str(path)
    what = "folder" if Path(folder).is_dir() else "folder (there is no such folder)"
    looked_for = ", ".join(name.format(task=subset) for name in FILES)
    raise TaskError(
        f"refine_longbench_{subset} found none of its files under the data {what} {folder}; looked for {looked_for}. "
        "Put one there, or name another folder with --data."
    )


def _hub_rows(subset: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(HUB, subset, split="test")
    except Exception as error:  # the hub client raises many kinds: offline, not found, no room
        raise TaskError(
            f"refine_longbench_{subset} was given no data folder, and {HUB} could not be read from the hub "
            f"({first_line(error)}). "
            f"Give --data DIR with {FILES[0].format(task=subset)} or {FILES[-1].format(task=subset)}."
        ) from None
    for row in rows:
        yield dict(row)


def _doc(index: int, row: Mapping[str, Any], subset: str, template: str, where: str) -> Doc:
    answers = row.get("answers")
    answers = [answers] if isinstance(answers, str) else [str(answer) for answer in answers or ()]
    head, _, rest = template.partition("{context}")
    middle, asks, tail = rest.partition("{input}")
    question = row.get("input", row.get("question")) if asks else ""
    if "prompt" in row:
        prompt = _completed(str(row["prompt"]), template, f"{where}, row {index + 1}")
    elif "context" in row and question is not None:
        prompt = f"{head}{row['context']}{middle}{question}{tail}"
    else:
        raise TaskError(
            f"{where}, row {index + 1} has {', '.join(row)}; expected context, input and answers, or prompt and "
            "answers. Take LongBench's files, or name another data folder."
        )
    if not answers:
        raise TaskError(
            f"{where}, row {index + 1} has no answers. Take LongBench's files, or name another data folder."
        )
    classes = row.get("all_classes") or (TREC_CLASSES if subset == "trec" else ())
    return {"index": index, "prompt": prompt, "answers": answers, "all_classes": [str(name) for name in classes]}


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


def score_qa_f1(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(qa_f1, results[0], doc)


def score_first_line_qa_f1(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(qa_f1, first_answer_line(results[0]), doc)


def score_rouge_l(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(rouge_l, results[0], doc)


def score_first_line_rouge_l(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(rouge_l, first_answer_line(results[0]), doc)


def score_code_similarity(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _best(code_similarity, results[0], doc)


def score_first_line_classification(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    def score(prediction: str, reference: str) -> float:
        return classification(prediction, reference, doc["all_classes"])

    return _best(score, first_answer_line(results[0]), doc)


def _best(score: Callable[[str, str], float], prediction: str, doc: Mapping[str, Any]) -> dict[str, float]:
    """The best score against any right answer."""
    return {"score": max(score(prediction, answer) for answer in doc["answers"])}
