from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from refine_harness.config import PostConfig, build
from refine_harness.data.qa import Examples, PostBatch, posttrain_batches
from refine_harness.errors import ConfigError, DataError

from .conftest import decode, hotpot_rows, prose, squad_rows


def config(path: str | None, *, tokens: int = 500, **settings: object) -> PostConfig:
    tree = {"batch": {"sequences": 4, "steps": 2}, "data": {"path": path, "prompt_tokens": tokens}, **settings}
    return build(PostConfig, tree, where="test")


@pytest.fixture
def questions(tmp_path: Path, write: Callable[[str, list[dict]], str]) -> str:
    """Two layouts in one folder."""
    write("qa/squad.parquet", squad_rows())
    write("qa/hotpot.parquet", hotpot_rows())
    return str(tmp_path / "qa")


def rows(batch: PostBatch) -> list[tuple[list[int], list[int], int]]:
    """Prompt, whole and start of the answer of each example."""
    assert batch.answers.loss_from_B is not None
    return [
        (
            batch.prompts.tokens_BT[row, : batch.prompts.lengths_B[row]].tolist(),
            batch.answers.tokens_BT[row, : batch.answers.lengths_B[row]].tolist(),
            int(batch.answers.loss_from_B[row]),
        )
        for row in range(len(batch))
    ]


def test_the_answer_starts_where_loss_from_says(tokenizer: PreTrainedTokenizerFast, questions: str):
    examples = Examples(config(questions), tokenizer)
    answers = set()
    for number in range(7):
        for prompt, whole, start in rows(examples.batch(number)):
            assert whole[:start] == prompt
            assert prompt[0] == 1
            assert len(prompt) <= 500
            assert decode(tokenizer, prompt).endswith(" Answer:")
            assert whole[-1] == 2
            assert whole[start:-1] == tokenizer(decode(tokenizer, whole[start:-1]))["input_ids"]
            answers.add(decode(tokenizer, whole[start:-1]))
    assert answers == {f" word{a}{c}" for a in range(3) for c in range(4)} | {f" code{r}" for r in range(4)}


def test_built_prompts_hold_what_answers_and_are_filled(tokenizer: PreTrainedTokenizerFast, questions: str):
    lengths = []
    for batch in islice(posttrain_batches(config(questions), tokenizer), 7):
        for prompt, whole, start in rows(batch):
            answer = decode(tokenizer, whole[start:-1]).strip()
            assert answer in decode(tokenizer, prompt)
            lengths.append(len(prompt))
    # A prompt is filled by whole paragraphs, the longest of which have about 110 tokens.
    assert min(lengths) > 500 - 120


def test_given_prompts_are_used_as_they_are(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    prompt = prose(40)
    rows_given = [
        {"prompt": prompt[:60], "answer": "first"},
        {"prompt": f"{prompt[:80]} ", "answer": ["second", "x"]},
    ]
    path = tmp_path / "given.jsonl"
    path.write_text("\n".join(map(json.dumps, rows_given)), encoding="utf-8")
    examples = Examples(config(str(path), batch={"sequences": 2, "steps": 1}), tokenizer)
    texts = {
        (decode(tokenizer, prompt[1:]), decode(tokenizer, whole[start:-1]))
        for prompt, whole, start in rows(examples.batch(0))
    }
    assert texts == {(prompt[:60], " first"), (f"{prompt[:80]} ", "second")}


def test_the_same_seed_resumed_and_shared(tokenizer: PreTrainedTokenizerFast, questions: str):
    settings = config(questions)
    whole = list(islice(posttrain_batches(settings, tokenizer), 5))
    resumed = next(posttrain_batches(settings, tokenizer, start_batch=4))
    assert torch.equal(whole[4].answers.tokens_BT, resumed.answers.tokens_BT)
    shares = [rows(next(posttrain_batches(settings, tokenizer, rank=rank, world_size=2))) for rank in range(2)]
    together = [shares[0][0], shares[1][0], shares[0][1], shares[1][1]]
    assert together == rows(whole[0])
    with pytest.raises(ConfigError, match="2 documents per optimizer step cannot be shared by 4 processes"):
        posttrain_batches(settings, tokenizer, world_size=4)


def test_a_question_meets_other_paragraphs_every_epoch(tokenizer: PreTrainedTokenizerFast, questions: str):
    examples = Examples(config(questions, tokens=300), tokenizer)
    prompts = [tuple(prompt) for number in range(28) for prompt, _, _ in rows(examples.batch(number))]
    assert examples.facts.examples == 28
    assert len(set(prompts)) > 3 * 28


def test_left_out_rows_are_counted_by_reason(tokenizer: PreTrainedTokenizerFast, write):
    given = [
        {"prompt": prose(30), "answer": "fine"},
        {"prompt": prose(30), "answer": ""},
        {"prompt": prose(30), "answer": prose(60)},
        {"prompt": prose(900), "answer": "fine"},
        {"prompt": "Hm", "answer": "fine"},
    ]
    facts = Examples(config(write("given.parquet", given)), tokenizer).facts
    assert (facts.rows, facts.examples, facts.left_out) == (5, 1, 4)
    assert (facts.unanswered, facts.long_answers, facts.long_prompts, facts.short_prompts) == (1, 1, 1, 1)
    built = squad_rows()
    built[0]["answers"], built[1]["answers"], built[2]["context"] = [], [prose(60)], prose(900)
    facts = Examples(config(write("built.parquet", built)), tokenizer).facts
    assert (facts.rows, facts.examples) == (24, 21)
    assert (facts.unanswered, facts.long_answers, facts.long_prompts, facts.short_prompts) == (1, 1, 1, 0)


def test_short_prompts_will_do_where_nothing_is_learned_from_them(tokenizer: PreTrainedTokenizerFast, write):
    path = write("given.parquet", [{"prompt": "Hm", "answer": "fine"}])
    with pytest.raises(DataError, match=r"has no example to train on: of 1 rows 0 .*of 1 shorter than 13 tokens"):
        Examples(config(path), tokenizer)
    assert Examples(config(path, nested=False), tokenizer).facts.examples == 1


def test_what_is_wrong_is_one_sentence(tokenizer: PreTrainedTokenizerFast, write):
    with pytest.raises(ConfigError, match=r"set data\.path"):
        Examples(config(None), tokenizer)
    path = write("q.parquet", squad_rows())
    with pytest.raises(ConfigError) as error:
        Examples(config(path, tokens=12), tokenizer)
    assert str(error.value) == (
        "rollout_length=5 and chunks=8 need at least 13 tokens; data.prompt_tokens is 12. "
        "Raise it, or lower algorithm.chunks or algorithm.rollout_length."
    )
    with pytest.raises(DataError, match="of 24 rows 0 have no answer, 0 have one longer than answer_tokens=32, and"):
        Examples(config(path, tokens=60), tokenizer)
    with pytest.raises(DataError, match="has columns text; expected prompt, answer; or context, question, answers"):
        Examples(config(write("t.parquet", [{"text": "x"}])), tokenizer)
