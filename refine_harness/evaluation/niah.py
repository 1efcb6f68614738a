"""The needle tasks for lm-eval: examples from synthetic/needles.py, RULER's score.

What a YAML of tasks/niah names: `load` builds the examples, `process_results` scores one. Haystack and words are
those in tasks/niah/data, or a text of the user's in their place: metadata `essays=FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_harness.errors import TaskError, suggest
from refine_harness.evaluation.generation import Doc, GeneratorSettings, by_length, doc, first_line
from refine_harness.evaluation.scorers import string_match_all
from refine_harness.resources import resource
from refine_harness.synthetic.fitting import CountTokens
from refine_harness.synthetic.needles import (
    ANSWER_TOKENS,
    SPECS,
    Haystack,
    NiahExample,
    make_niah,
    split_sentences,
)

if TYPE_CHECKING:
    from datasets import Dataset


def load(*, spec: str, essays: str | None = None, **metadata: Any) -> dict[str, Dataset]:
    """Examples of one of RULER's needle tasks, the same whatever else is loaded.

    Args:
        spec: RULER's name of the task, such as niah_multikey_2.
        essays: a UTF-8 text file to hide needles in, in place of the packaged essays. (RULER's own, Paul Graham's,
            cannot be packaged; who has them can name them here.)
        metadata: lm-eval's mapping, read by `GeneratorSettings`.

    Columns: index, length (as asked), prompt, answers, tokens (prompt and room for the answer), depths.
    Raises TaskError: unknown spec, no tokenizer, a length that is too small, an unreadable text.
    """
    if spec not in SPECS:
        raise TaskError(f"{spec} is not a needle task; known are {', '.join(SPECS)}.{suggest(spec, SPECS)}")
    settings = GeneratorSettings.read(metadata)
    counter = settings.token_counter(f"refine_{spec}")
    hidden_in = haystack(essays)

    def examples(length: int) -> Iterator[Doc]:
        def make(index: int, count_tokens: CountTokens) -> NiahExample:
            seed = settings.seed_of(spec, length, index)
            return make_niah(SPECS[spec], tokens=length, count_tokens=count_tokens, seed=seed, haystack=hidden_in)

        makers = (partial(make, index) for index in range(settings.count))
        for index, example in enumerate(counter.fitted(makers, ANSWER_TOKENS)):
            yield doc(example, index, length, depths=list(example.depths))

    return by_length(f"refine_{spec}", settings.lengths, examples)


def process_results(example: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of the answers found, under the name of the example's length."""
    return {str(example["length"]): string_match_all(results[0], example["answers"])}


@lru_cache(maxsize=2)
def haystack(essays: str | None = None) -> Haystack:
    """The packaged words, and the packaged essays or the text at `essays`. Raises TaskError."""
    folder = resource("tasks") / "niah" / "data"
    words = word_lists()
    text = _packaged_essays(folder) if essays is None else _text(essays)
    sentences = split_sentences(text)
    if not sentences:
        raise TaskError(f"{essays} holds no text to hide needles in. Name a UTF-8 text file with some prose.")
    return Haystack(tuple(sentences), tuple(words["nouns"]), tuple(words["adjectives"]))


def word_lists() -> dict[str, list[str]]:
    """The packaged nouns, adjectives and verbs."""
    return json.loads((resource("tasks") / "niah" / "data" / "words.json").read_text(encoding="utf-8"))


def _packaged_essays(folder: Path) -> str:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(folder / "essays.parquet", columns=["text"])
    return "\n\n".join(rows["text"].to_pylist())


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"essays={path} cannot be read ({first_line(error)}). Name a UTF-8 text file.") from None
