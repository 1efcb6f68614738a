"""BABILong's tasks qa1 to qa5 for lm-eval (booydar/babilong, arXiv 2406.10149): facts hidden in the text of books.

What the YAMLs of tasks/babilong name: `load` reads the benchmark's own rows, `make` makes rows of the same kind,
`process_results` scores one. The two never meet: rows of the benchmark are the tasks `babilong_...`, rows made here
are the tasks `babilong_style_...`, in groups, records and on pages. Prompts and score are the benchmark's for both.

`load` takes the first of these under the folder the user gives (`--data DIR`, or metadata `data=DIR`), NAME being
0k, 1k, 2k, ..., 128k:

    DIR/babilong/NAME/qa1-*.parquet, DIR/babilong/NAME/qa1.parquet      (the hub's data set, downloaded)
    DIR/babilong/qa1/NAME.json, DIR/babilong/data/qa1/NAME.json         (what the benchmark's script writes)

also with RMT-team/babilong in place of babilong; or, without a folder, the hub's RMT-team/babilong, of 100 rows a task
and length. A row has `input`, `question` and `target`. The benchmark measures lengths in tokens of GPT-2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_harness.errors import TaskError, suggest
from refine_harness.evaluation.generation import Doc, GeneratorSettings, as_dataset, by_length, doc, first_line
from refine_harness.evaluation.longqa import read_rows
from refine_harness.evaluation.niah import haystack
from refine_harness.synthetic.babi import TASKS, hide, make_story
from refine_harness.synthetic.fitting import CountTokens, Example, largest_fit, too_short
from refine_harness.synthetic.needles import Haystack

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "RMT-team/babilong"

FILES = tuple(
    f"{folder}/{name}"
    for folder in ("babilong", HUB)
    for name in ("{name}/{task}-*.parquet", "{name}/{task}.parquet", "{task}/{name}.json", "data/{task}/{name}.json")
)
"""Names looked for under the data folder, in this order."""

LENGTHS = {1024 * thousands: f"{thousands}k" for thousands in (1, 2, 4, 8, 16, 32, 64, 128)}
"""Tokens as lengths are asked for here -> the benchmark's name of that length."""

ANSWER_TOKENS = 20
"""The benchmark's longest answer."""

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), _PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
}
"""All answers that a task's questions can have."""

_ITEM_RULES = (
    "If a person got an item in the first location and travelled to the second location the item is also in the "
    "second location. If a person dropped an item in the first location and moved to the second location the item "
    "remains in the first location."
)

PROMPTS: dict[str, tuple[str, str, str]] = {
    "qa1": (
        "I will give you context with the facts about positions of different persons hidden in some random text and a "
        "question. You need to answer the question based only on the information from the facts. If a person was in "
        "different locations, use the latest location to answer the question.",
        "<example>\nCharlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. Where "
        "is Charlie?\nAnswer: The most recent location of Charlie is balcony.\n</example>\n\n"
        "<example>\nAlan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to "
        "balcony. Where is Alan?\nAnswer: The most recent location of Alan is shop.\n</example>",
        "Always return your answer in the following format: The most recent location of \u2019person\u2019 is "
        "\u2019location\u2019. Do not write anything else after that.",
    ),
    "qa2": (
        "I give you context with the facts about locations and actions of different persons hidden in some random "
        "text and a question.You need to answer the question based only on the information from the facts.\n"
        + _ITEM_RULES,
        "<example>\nCharlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. Where is the "
        "bottle?\nAnswer: The bottle is in the balcony.\n</example>\n"
        "<example>\nAlan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where is the screw "
        "driver?\nAnswer: The screw driver is in the kitchen.\n</example>",
        "Always return your answer in the following format: The \u2019item\u2019 is in \u2019location\u2019. Do not "
        "write anything else after that.",
    ),
    "qa3": (
        "I give you context with the facts about locations and actions of different persons hidden in some random "
        "text and a question. You need to answer the question based only on the information from the facts.\n"
        + _ITEM_RULES,
        "<example>\nJohn journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. Daniel "
        "journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. Where was the apple "
        "before the kitchen?\nAnswer: Before the kitchen the apple was in the bathroom.\n</example>\n"
        "<example>\nJohn went back to the bedroom. John went back to the garden. John went back to the kitchen. "
        "Sandra took the football. Sandra travelled to the garden. Sandra journeyed to the bedroom. Where was the "
        "football before the bedroom?\nAnswer: Before the bedroom the football was in the garden.\n</example>",
        "Always return your answer in the following format: Before the $location_1$ the $item$ was in the "
        "$location_2$. Do not write anything else after that.",
    ),
    "qa4": (
        "I will give you context with the facts about different people, their location and actions, hidden in some "
        "random text and a question. You need to answer the question based only on the information from the facts.",
        "<example>\nThe hallway is south of the kitchen. The bedroom is north of the kitchen. What is the kitchen "
        "south of?\nAnswer: bedroom\n</example>\n"
        "<example>\nThe garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the "
        "bedroom?\nAnswer: garden\n</example>",
        "Your answer should contain only one word - location. Do not write anything else after that.",
    ),
    "qa5": (
        "I will give you context with the facts about locations and their relations hidden in some random text and a "
        "question. You need to answer the question based only on the information from the facts.",
        "<example>\nMary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. Bill took "
        "the milk there. Who did Mary give the apple to?\nAnswer: Fred\n</example>\n"
        "<example>\nJeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. Bill "
        "travelled to the bedroom. Who gave the football?\nAnswer: Jeff\n</example>\n"
        "<example>\nFred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. "
        "Jeff went back to the garden. What did Fred give to Bill?\nAnswer: apple\n</example>",
        "Your answer should contain only one word. Do not write anything else after that. Do not explain your answer.",
    ),
}
"""Task -> instruction, examples and what is said after them, as the benchmark has them (commit ffa075f)."""


def prompt(task: str, context: str, question: str) -> str:
    """The benchmark's prompt, with instruction, examples and post-prompt."""
    head = "\n\n".join(PROMPTS[task])
    return f"{head}\n\n<context>\n{context.strip()}\n</context>\n\nQuestion: {question}".strip()


def only_label(answer: str, target: str, question: str, labels: Iterable[str]) -> float:
    """The benchmark's score: 1 if, of all labels, the first sentence of the answer has the target and no other.

    Labels that the question has do not count. All in lower case; "sentence" ends at the first full stop. lm-eval's
    stock tasks take an answer for right that has the target anywhere, whatever else it says.
    """
    said = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    found = {label.lower() for label in labels if label.lower() in said and label.lower() not in question.lower()}
    return float(found == {target.lower()})


def process_results(example: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`only_label` under the name of the example's length, or of `score` where facts stand alone."""
    right = only_label(results[0], example["answers"][0], example["question"], LABELS[example["task"]])
    return {str(example["length"] or "score"): right}


def load(*, task: str, facts_only: bool = False, **metadata: Any) -> dict[str, Dataset]:
    """The benchmark's own rows, in their order.

    Args:
        task: qa1 to qa5.
        facts_only: the rows without any background (0k), whatever lengths are asked for.
        metadata: lm-eval's mapping, of which lengths, samples, limit and data count.

    Columns: index, length (as asked; 0 with `facts_only`), prompt, answers (one), question, task, data.
    Raises TaskError: an unknown task or length, no data, unreadable data.
    """
    _known(task)
    settings = GeneratorSettings.read(metadata)

    def examples(length: int) -> Iterator[Doc]:
        rows, where = _rows(task, _name(task, length), settings.data)
        for index, row in enumerate(islice(rows, settings.count)):
            if missing := [key for key in ("input", "question", "target") if not isinstance(row.get(key), str)]:
                raise TaskError(
                    f"{where}, row {index + 1} has no {' and no '.join(missing)}; it has {', '.join(row) or 'nothing'}"
                    ". Take the benchmark's own files."
                )
            yield {
                "index": index,
                "length": length,
                "prompt": prompt(task, row["input"], row["question"]),
                "answers": [row["target"]],
                "question": row["question"],
                "task": task,
                "data": HUB,
            }

    if facts_only:
        return as_dataset(list(examples(0)))
    return by_length(f"refine_babilong_{task}", settings.lengths, examples)


def make(*, task: str, facts_only: bool = False, **metadata: Any) -> dict[str, Dataset]:
    """Rows in the benchmark's manner: stories of synthetic/babi.py in the needle tasks' essays.

    Args:
        task: qa1 to qa5.
        facts_only: the stories alone, whatever lengths are asked for.
        metadata: lm-eval's mapping, read by `GeneratorSettings`.

    Columns as of `load`, and tokens (prompt and room for the answer, in the model's tokens).
    Raises TaskError: an unknown task, no tokenizer, a length that is too small.
    """
    _known(task)
    settings = GeneratorSettings.read(metadata)
    counter = settings.token_counter(f"refine_babilong_style_{task}")
    prose = haystack()

    def examples(length: int) -> Iterator[Doc]:
        seeds = [settings.seed_of(f"babilong-style/{task}", length, index) for index in range(settings.count)]
        makers = (lambda count_tokens, seed=seed: _example(task, seed, length, count_tokens, prose) for seed in seeds)
        for index, (seed, made) in enumerate(zip(seeds, counter.fitted(makers, ANSWER_TOKENS), strict=True)):
            question = make_story(task, seed).question
            yield doc(made, index, length, question=question, task=task, data="made here, in the manner of BABILong")

    if facts_only:
        return as_dataset(list(examples(0)))
    return by_length(f"refine_babilong_style_{task}", settings.lengths, examples)


def _example(task: str, seed: str, length: int, count_tokens: CountTokens, prose: Haystack) -> Example:
    """A story among as many words of prose as `length` leaves room for; by itself where that is 0."""
    story = make_story(task, seed)
    passage = prose.starting_anywhere(seed)

    def render(words: int) -> str:
        return prompt(task, hide(story.facts, passage.first_words(words), seed), story.question)

    def cost(words: int) -> int:
        return count_tokens(render(words)) + ANSWER_TOKENS

    size = largest_fit(cost, length, lowest=0) if length else 0
    if size is None:
        raise too_short(f"babilong_style_{task}", length, ANSWER_TOKENS, cost(0))
    return Example(render(size), "", (story.answer,), cost(size), size)


def _known(task: str) -> None:
    if task not in TASKS:
        raise TaskError(f"{task} is not a task of BABILong here; known are {', '.join(TASKS)}.{suggest(task, TASKS)}")


def _name(task: str, length: int) -> str:
    if length == 0:
        return "0k"
    if length not in LENGTHS:
        raise TaskError(
            f"BABILong has no rows of {length} tokens; its lengths are {', '.join(map(str, LENGTHS))}. "
            f"Ask for these, or for babilong_style_{task}, which is made at any length."
        )
    return LENGTHS[length]


def _rows(task: str, name: str, folder: str | None) -> tuple[Iterator[Mapping[str, Any]], str]:
    """A task's rows at one of the benchmark's lengths, and where they are from."""
    if folder is None:
        return _hub_rows(task, name), f"the hub's {HUB}, {name}, {task}"
    patterns = [pattern.format(task=task, name=name) for pattern in FILES]
    for pattern in patterns:
        if found := sorted(path for path in Path(folder).glob(pattern) if path.is_file()):
            return _file_rows(found), str(found[0])
    what = "folder" if Path(folder).is_dir() else "folder (there is no such folder)"
    raise TaskError(
        f"refine_babilong_{task} found no rows of length {name} under the data {what} {folder}; looked for "
        f"{', '.join(patterns)}. Put the benchmark's data there, or ask for babilong_style, which needs none."
    )


def _file_rows(paths: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    for path in paths:
        if path.suffix == ".parquet":
            yield from read_rows(path)
            continue
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TaskError(f"{path} cannot be read ({first_line(error)}). Take the benchmark's own file.") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TaskError(f"{path} is no list of rows. Take the benchmark's own file.")
        yield from rows


def _hub_rows(task: str, name: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(HUB, name, split=task)
    except Exception as error:  # the hub client raises many kinds: offline, not found, no room
        raise TaskError(
            f"refine_babilong_{task} was given no data folder, and {HUB} could not be read from the hub "
            f"({first_line(error)}). Give --data DIR with the data set, or ask for babilong_style, which needs none."
        ) from None
    for row in rows:
        yield dict(row)
