"""What texts share is found whole, however it is cut into stretches."""

from __future__ import annotations

import random

import numpy as np
import pytest

from refine_harness.evaluation import prefixes
from refine_harness.evaluation.plan import portions, shares
from refine_harness.evaluation.prefixes import Tree, as_tokens, families, share


def random_texts(seed: int, count: int = 12) -> list[np.ndarray]:
    """Texts that branch off from one another at random places; some equal, some the beginning of others."""
    rng = random.Random(seed)
    texts = [rng.choices(range(3), k=rng.randint(1, 30))]
    while len(texts) < count:
        stem = rng.choice(texts)
        texts.append(stem[: rng.randint(1, len(stem))] + rng.choices(range(3), k=rng.randint(0, 20)))
    rng.shuffle(texts)
    return [as_tokens(text) for text in texts]


def text_at(tree: Tree, place: prefixes.Place | None) -> list[int]:
    """Everything read from the beginning up to a place."""
    if place is None:
        return []
    stretch = tree.stretches[place[0]]
    return [*text_at(tree, stretch.source), *stretch.tokens[: place[1]].tolist()]


@pytest.mark.parametrize("forks", (True, False))
@pytest.mark.parametrize("at_least", (1, 4))
@pytest.mark.parametrize("every", (1, 5))
@pytest.mark.parametrize("seed", range(8))
def test_every_text_is_what_lies_on_the_way_to_its_end(seed, every, at_least, forks, monkeypatch):
    monkeypatch.setattr(prefixes, "WORTH", 10**9)
    texts = random_texts(seed)
    tree = share(texts, at_least=at_least, forks=forks, every=every)
    assert [text_at(tree, end) for end in tree.ends] == [text.tolist() for text in texts]
    wanted = {stretch.source for stretch in tree.stretches} | set(tree.ends)
    for i, stretch in enumerate(tree.stretches):
        assert stretch.marks == tuple(sorted(set(stretch.marks)))
        assert stretch.marks[-1] == len(stretch.tokens) > 0
        assert stretch.wave == (0 if stretch.source is None else tree.stretches[stretch.source[0]].wave + 1)
        assert {(i, mark) for mark in stretch.marks} <= wanted, "no state is taken that nobody wants"
        assert forks or len(stretch.marks) == 1
    assert sorted(i for wave in tree.waves for i in wave) == list(range(len(tree.stretches)))
    distinct = {tuple(text[: n + 1].tolist()) for text in texts for n in range(len(text))}
    flat = sum(len(text) for text in {tuple(text.tolist()) for text in texts})
    assert len(distinct) <= tree.tokens <= flat
    if at_least == every == 1:
        assert tree.tokens == len(distinct), "every token once for every different beginning"


def test_needles_in_one_haystack_share_it_in_a_single_reading():
    hay = list(range(100, 1100))
    texts = [as_tokens([*hay[:depth], 7, i, *hay[depth:]]) for i, depth in enumerate(range(100, 1000, 100))]
    tree = share(texts)
    trunk = [stretch for stretch in tree.stretches if stretch.wave == 0]
    assert [len(stretch.marks) for stretch in trunk] == [8], "the last two part where the eighth needle is"
    assert tree.tokens == 800 + sum(1002 - min(depth, 800) for depth in range(100, 1000, 100))
    assert len(list(tree.waves)) == 2
    assert len(list(share(texts, forks=False).waves)) == 9


def test_long_beginnings_end_where_chunks_do():
    hay = list(range(100, 1100))
    texts = [as_tokens([*hay[:depth], 7, i, *hay[depth:]]) for i, depth in enumerate(range(100, 1000, 100))]
    tree = share(texts, every=256)
    assert {stretch.source and stretch.source[1] for stretch in tree.stretches} == {None, 100, 200, 512, 768}
    assert tree.tokens < sum(map(len, texts))


def test_questions_about_a_document_are_one_wave_after_it():
    preamble, documents = [1] * 90, [[d] * 200 for d in (2, 3, 4)]
    texts = [as_tokens([*preamble, *document, 9, q]) for document in documents for q in range(5)]
    tree = share(texts)
    assert tree.tokens == 90 + 3 * 200 + 15 + 3
    assert [len(wave) for wave in tree.waves] == [1, 3, 15] or tree.tokens == 90 + 3 * 201 + 15


def test_little_that_is_shared_is_read_again():
    texts = [as_tokens([5] * 63 + [i] * 10) for i in range(4)]
    assert {len(stretch.tokens) for stretch in share(texts).stretches} == {73}
    texts = [as_tokens([5] * 64 + [i] * 2000) for i in range(4)]
    assert share(texts).tokens == 4 * 2064, "it would save less than a pass costs"


def test_equal_texts_have_one_end():
    texts = [as_tokens(text) for text in ([1, 2], [3], [1, 2])]
    tree = share(texts)
    assert tree.ends[0] == tree.ends[2] != tree.ends[1]
    assert tree.tokens == 3


@pytest.mark.parametrize("seed", range(4))
def test_families_are_all_that_begin_alike(seed):
    texts = random_texts(seed, 20)
    found = families(texts, at_least=4)
    assert sorted(i for family in found for i in family) == list(range(20))
    of = {i: number for number, family in enumerate(found) for i in family}
    for a in range(20):
        for b in range(20):
            alike = prefixes.common(texts[a], texts[b]) >= 4 or np.array_equal(texts[a], texts[b])
            assert not alike or of[a] == of[b]
    longest = [max(len(texts[i]) for i in family) for family in found]
    assert longest == sorted(longest, reverse=True)


def test_portions_hold_every_text_once_and_keep_to_their_bounds():
    texts = random_texts(1, 40)
    costs = [len(text) for text in texts]
    kinds = [i % 2 for i in range(40)]
    found = portions(texts, costs, kinds, rows=6, tokens=60)
    assert sorted(i for portion in found for i in portion) == list(range(40))
    for portion in found:
        assert len({kinds[i] for i in portion}) == 1
        assert len(portion) == 1 or (len(portion) <= 6 and sum(costs[i] for i in portion) <= 60)
    sums = [sum(costs[i] for i in portion) for portion in found]
    assert sums[0] == max(sums), "what might not fit comes first"
    assert found == portions(texts, costs, kinds, rows=6, tokens=60)
    assert max(len(portion) for portion in portions(texts, costs, kinds, rows=6)) == 6


def test_processes_share_all_portions_about_evenly():
    rng = random.Random(0)
    costs = [rng.randint(1, 100) for _ in range(30)]
    found = shares(costs, 4)
    assert sorted(i for share in found for i in share) == list(range(30))
    loads = [sum(costs[i] for i in share) for share in found]
    assert max(loads) < 1.1 * min(loads)
    assert shares(costs, 1) == [list(range(30))]
    assert shares([3], 3) == [[0], [], []]
