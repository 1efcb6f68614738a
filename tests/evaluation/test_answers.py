"""Forked, batched, in pieces: always the answers and scores of one text read alone. Every model, float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from refine_harness.evaluation import answers
from refine_harness.evaluation.answers import Answerer, Decoding

from ..models.tiny import VOCABULARY, build

KINDS = ("delta_net", "delta_net_hybrid", "gated_deltanet", "lact_muon", "lact_prenorm")
GREEDY = Decoding(max_tokens=4)


class Letters:
    """A tokenizer that has nothing to say."""

    eos_token_id = None
    all_special_ids: tuple[int, ...] = ()

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) % VOCABULARY for letter in text]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


def words(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=n)


def haystacks() -> list[list[int]]:
    """Needles at several depths of one text, two questions about another, one text alone, and one twice."""
    hay, document, alone = words(300, 0), words(150, 1), words(20, 2)
    needles = [[*hay[:depth], *words(3, depth), *hay[depth:]] for depth in (70, 140, 215, 290)]
    return [*needles, [*document, 4, 5], [*document, 6], alone, needles[0], hay[:140]]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    model = build(request.param).eval()
    model.config.eos_token_id = None
    return model


def answerer(model: Any, **settings: Any) -> Answerer:
    return Answerer(model, Letters(), **{"piece": 128, **settings})


def plain(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logprobs = model.logits(model.read(torch.tensor([context + continuation])).hidden[0]).log_softmax(-1)
    at = logprobs[len(context) - 1 : -1]
    labels = torch.tensor(continuation)
    return float(at.gather(-1, labels[:, None]).sum()), bool((at.argmax(-1) == labels).all())


def test_what_prompts_share_is_read_once_and_their_answers_are_those_of_each_alone(model):
    prompts = haystacks()
    together = answerer(model)
    found = together.generate(prompts, [GREEDY] * len(prompts))
    alone = [answerer(model).generate([prompt], [GREEDY])[0] for prompt in prompts]
    assert found == alone
    assert len({answer.text for answer in found}) > 3
    assert together.reads == 8
    assert together.tokens.asked == sum(map(len, prompts))
    if model.fixed_state:
        assert together.tokens.read < 0.6 * together.tokens.asked


@pytest.mark.parametrize("settings", ({}, {"rows": 2}, {"piece": 16}, {"budget": 64}))
def test_forked_continuations_score_as_texts_read_alone(model, settings):
    contexts = haystacks()[2:7]
    few = words(6, 9)
    continuations = [[few, few[:1], [*few[:3], 8], words(40, i)] for i in range(4)] + [[[], few]]
    ours = answerer(model, **settings)
    scores = ours.score(contexts, continuations)
    for context, group, results in zip(contexts, continuations, scores, strict=True):
        for continuation, result in zip(group, results, strict=True):
            expected = plain(model, context, continuation) if continuation else (0.0, True)
            assert result == (pytest.approx(expected[0], abs=1e-9), expected[1])
    alone = sum(len(c) + len(t) - 1 for c, group in zip(contexts, continuations, strict=True) for t in group if t)
    assert ours.tokens.asked == alone + len(contexts[-1])
    assert ours.tokens.read < 0.5 * ours.tokens.asked


def test_rows_of_different_length_waste_little_on_padding(model):
    """Batches are of similar length once they are large enough to matter."""
    ours = answerer(model, budget=4096, piece=1024)
    lengths = [*range(10, 400, 30), *range(400, 20, -25)]
    batches = ours._batches([length * 20 for length in lengths])
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[i] * 20 for i in batch]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) * min(sizes[0], 1024) <= 4096
        assert sum(sizes) >= 0.75 * len(sizes) * sizes[0] or len(sizes) * sizes[0] <= answers.FREE
    assert len(ours._batches([5, 300, 40])) == 1, "small ones are read at once, whatever their lengths"


def test_long_prompts_are_read_in_pieces_within_the_budget(model, monkeypatch):
    shapes = []
    read = type(model).read
    monkeypatch.setattr(
        type(model),
        "read",
        lambda self, tokens, *a, **k: shapes.append(tuple(tokens.shape)) or read(self, tokens, *a, **k),
    )
    ours = answerer(model, budget=200, piece=96)
    prompts = [words(n, n) for n in (500, 480, 460, 30, 20)]
    ours.generate(prompts, [Decoding(max_tokens=1)] * 5)
    assert max(rows * width for rows, width in shapes) <= 200
    assert (2, 100) in shapes and (2, 101) not in shapes, "two rows share the budget"
    ours.generate(prompts[:1], [Decoding(max_tokens=1)])
    assert (1, 200) in shapes, "one has it alone"


def test_the_head_is_applied_where_something_is_scored_or_picked_only(model, monkeypatch):
    applied = []
    logits = type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda self, x: applied.append(x[..., 0].numel()) or logits(self, x))
    ours = answerer(model)
    ours.score([words(90, 1), words(60, 2)], [[words(5, 3), words(1, 4)], [words(3, 5)]])
    assert sum(applied) == 2 + (5 - 1) + (3 - 1)
    applied.clear()
    ours.generate([words(90, 1), words(60, 2)], [GREEDY] * 2)
    assert sum(applied) == 2 * GREEDY.max_tokens


def test_states_take_no_more_rows_than_their_memory_allows(model, monkeypatch):
    with torch.no_grad():
        size = model.read(torch.zeros(1, 1, dtype=torch.int64)).state.nbytes
    monkeypatch.setattr(answers, "CPU_STATE_BYTES", 5 * size)
    assert answerer(model).rows == (5 if model.fixed_state else 8)
    assert answerer(model, rows=3).rows == 3
    monkeypatch.setattr(answers, "CPU_STATE_BYTES", 0)
    assert answerer(model).rows == (1 if model.fixed_state else 8)
