"""RULER's other generated tasks for lm-eval: variable tracking, common words, frequent words.

What a YAML of tasks/ruler names: `load` builds the examples, `process_results` scores one. The group of all 13 tasks
has these three, the eight of niah.py and the two of longqa.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from refine_harness.errors import TaskError, suggest
from refine_harness.evaluation.generation import Doc, GeneratorSettings, by_length, doc
from refine_harness.evaluation.niah import word_lists
from refine_harness.evaluation.scorers import string_match_all
from refine_harness.resources import resource
from refine_harness.synthetic import variables, words
from refine_harness.synthetic.fitting import CountTokens, Example

if TYPE_CHECKING:
    from datasets import Dataset

Make = Callable[[int, CountTokens, str], Example]
"""An example from its length in tokens, a counter and a seed."""


def load(*, spec: str, **metadata: Any) -> dict[str, Dataset]:
    """Examples of one of RULER's tasks vt, cwe or fwe, the same whatever else is loaded.

    Args:
        spec: RULER's name of the task.
        metadata: lm-eval's mapping, read by `GeneratorSettings`.

    Columns: index, length (as asked), prompt, answers (all expected), tokens (prompt and room for the answer).
    Raises TaskError: unknown spec, no tokenizer, a length that is too small.
    """
    if spec not in TASKS:
        raise TaskError(f"{spec} is not a task of RULER made here; known are {', '.join(TASKS)}.{suggest(spec, TASKS)}")
    settings = GeneratorSettings.read(metadata)
    counter = settings.token_counter(f"refine_ruler_{spec}")
    make, answer_tokens = TASKS[spec]

    def examples(length: int) -> Iterator[Doc]:
        seeds = (settings.seed_of(spec, length, index) for index in range(settings.count))
        makers = (lambda count_tokens, seed=seed: make(length, count_tokens, seed) for seed in seeds)
        for index, example in enumerate(counter.fitted(makers, answer_tokens)):
            yield doc(example, index, length)

    return by_length(f"refine_ruler_{spec}", settings.lengths, examples)


def process_results(example: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of the answers found, under the name of the example's length."""
    return {str(example["length"]): string_match_all(results[0], example["answers"])}


def _vt(tokens: int, count_tokens: CountTokens, seed: str) -> Example:
    return variables.make_variable_tracking(tokens=tokens, count_tokens=count_tokens, seed=seed)


def _cwe(tokens: int, count_tokens: CountTokens, seed: str) -> Example:
    common, more = list_words()
    return words.make_common_words(tokens=tokens, count_tokens=count_tokens, seed=seed, words=common, more_words=more)


def _fwe(tokens: int, count_tokens: CountTokens, seed: str) -> Example:
    return words.make_frequent_words(tokens=tokens, count_tokens=count_tokens, seed=seed)


TASKS: dict[str, tuple[Make, int]] = {
    "vt": (_vt, variables.ANSWER_TOKENS),
    "cwe": (_cwe, words.COMMON_ANSWER_TOKENS),
    "fwe": (_fwe, words.FREQUENT_ANSWER_TOKENS),
}
"""RULER's name of a task -> what makes an example, and the room for its answer in tokens."""


@lru_cache(maxsize=1)
def list_words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words for numbered lists: nouns, adjectives and verbs together; and English words, for lists that need more."""
    short = sorted({word for kind in word_lists().values() for word in kind})
    path = resource("tasks") / "ruler" / "data" / "english_words.txt"
    return tuple(short), tuple(path.read_text(encoding="utf-8").split())
