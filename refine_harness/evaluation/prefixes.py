"""Which texts begin alike, and how to read them so that a beginning they share is read once.

Texts are token ids; nothing here knows a model. A `Tree` cuts them into stretches: a stretch is read in one row,
on from the state after some part of an earlier stretch. Needle prompts share their haystack up to the first
needle, questions their document, examples their few shots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

AT_LEAST = 64
"""Fewest tokens that are worth a state of their own; shorter common beginnings are read again."""
WORTH = 8
"""Beginnings are shared where that saves at least one in so many tokens: each fork is one pass more."""
CUTS = 2
"""More forks than this in one stretch are taken from a single reading of it, fewer by stopping there."""

Tokens = np.ndarray
"""int32, one dimension."""
Place = tuple[int, int]
"""A stretch, and how many of its tokens have been read."""


@dataclass(frozen=True)
class Stretch:
    """Tokens read in one row."""

    tokens: Tokens
    source: Place | None
    """The place whose state it goes on from; None where a text begins."""
    marks: tuple[int, ...]
    """Where states are wanted, as numbers of its tokens, ascending; the last is all of them."""
    wave: int
    """Stretches of one wave need nothing but earlier waves."""


@dataclass(frozen=True)
class Tree:
    """How to read some texts."""

    stretches: tuple[Stretch, ...]
    """Every stretch comes after its source."""
    ends: tuple[Place, ...]
    """Where each text ends."""

    @cached_property
    def tokens(self) -> int:
        """Tokens that are read in all."""
        return sum(len(stretch.tokens) for stretch in self.stretches)

    @property
    def waves(self) -> Iterator[list[int]]:
        """The stretches of each wave, by index."""
        for wave in range(1 + max(stretch.wave for stretch in self.stretches)):
            yield [i for i, stretch in enumerate(self.stretches) if stretch.wave == wave]


def as_tokens(text: Sequence[int]) -> Tokens:
    """Token ids as an array; of an array of C ints the very same memory."""
    return np.asarray(memoryview(text) if hasattr(text, "typecode") else text, dtype=np.int32)  # pyright: ignore[reportArgumentType]


def alphabetical(texts: Sequence[Tokens]) -> list[int]:
    """The texts' indices, sorted so that those that begin alike are neighbours; equal texts in the order given."""
    keys = [text.astype(">i4").tobytes() for text in texts]
    return sorted(range(len(texts)), key=lambda i: (keys[i], i))


def common(a: Tokens, b: Tokens) -> int:
    """Tokens at the beginning of both."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


def families(texts: Sequence[Tokens], at_least: int = AT_LEAST) -> list[list[int]]:
    """Indices of texts in families, each member beginning as its neighbour does for `at_least` tokens.

    The family with the longest text comes first. Equal texts are always of one family.
    """
    order = alphabetical(texts)
    found: list[list[int]] = []
    for before, i in zip([None, *order], order, strict=False):
        shared = 0 if before is None else common(texts[before], texts[i])
        if before is not None and (shared >= at_least or shared == len(texts[i]) == len(texts[before])):
            found[-1].append(i)
        else:
            found.append([i])
    return sorted(found, key=lambda family: (-max(len(texts[i]) for i in family), min(family)))


def share(texts: Sequence[Tokens], *, at_least: int = AT_LEAST, forks: bool = True, every: int = 1) -> Tree:
    """A tree for texts of at least one token each. Equal texts are one.

    forks: whether several states may be taken from one reading (`marks`); otherwise a stretch has only its end.
    every: beginnings that are so long are shared up to a multiple of it. Rows that go on from such places can be read
        together faster by a model that works in chunks.
    """
    order = alphabetical(texts)
    distinct: list[int] = []
    leaf_of = [0] * len(texts)
    for i in order:
        if not distinct or not np.array_equal(texts[distinct[-1]], texts[i]):
            distinct.append(i)
        leaf_of[i] = len(distinct) - 1
    leaves = [texts[i] for i in distinct]
    root = _nodes(leaves, at_least, every)
    flat = sum(map(len, leaves))
    if (flat - root.cost(leaves)) * WORTH < flat:
        root = _Node(0, 0, leaves=list(range(len(leaves))))
    stretches, ends = _stretches(root, leaves, forks)
    return Tree(tuple(stretches), tuple(ends[leaf] for leaf in leaf_of))


@dataclass
class _Node:
    """A beginning that several leaves share."""

    depth: int
    """Its tokens."""
    first: int
    """A leaf that begins so."""
    children: list[_Node] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)
    """Leaves that are not in a child."""
    height: int = 0
    """Nodes on the longest way down from here."""

    def cost(self, leaves: Sequence[Tokens]) -> int:
        """Tokens read for everything below."""
        total, rest = 0, [self]
        while rest:
            node = rest.pop()
            total += sum(len(leaves[i]) - node.depth for i in node.leaves)
            total += sum(child.depth - node.depth for child in node.children)
            rest += node.children
        return total


def _nodes(leaves: Sequence[Tokens], at_least: int, every: int) -> _Node:
    """The tree of common beginnings of leaves in alphabetical order; a child is `at_least` longer than its parent."""
    shared = [n if n < every else n - n % every for n in (common(a, b) for a, b in pairwise(leaves))]
    root = _Node(0, 0)
    made = [root]
    rest = [(root, 0, len(leaves))]
    while rest:
        node, start, stop = rest.pop()
        first = start
        for last in range(start, stop):
            if last + 1 < stop and shared[last] >= node.depth + at_least:
                continue
            if last == first:
                node.leaves.append(first)
            else:
                child = _Node(min(shared[first:last]), first)
                node.children.append(child)
                made.append(child)
                rest.append((child, first, last + 1))
            first = last + 1
    for node in reversed(made):  # children were made after their parents
        node.height = 1 + max((child.height for child in node.children), default=0)
    return root


def _stretches(root: _Node, leaves: Sequence[Tokens], forks: bool) -> tuple[list[Stretch], list[Place]]:
    """The stretches of a tree, and where each leaf ends."""
    stretches: list[Stretch] = []
    ends: dict[int, Place] = {}

    def add(tokens: Tokens, source: Place | None, marks: tuple[int, ...]) -> int:
        wave = 0 if source is None else stretches[source[0]].wave + 1
        stretches.append(Stretch(tokens, source, marks, wave))
        return len(stretches) - 1

    rest: list[tuple[_Node, Place | None]] = [(root, None)]
    while rest:
        node, place = rest.pop()
        for leaf in node.leaves:
            if place is not None and len(leaves[leaf]) == node.depth:
                ends[leaf] = place
            else:
                tail = leaves[leaf][node.depth :]
                ends[leaf] = (add(tail, place, (len(tail),)), len(tail))
        for child in node.children:
            chain = _chain(child) if forks else [child]
            chain = chain if len(chain) > CUTS else [child]
            marks = tuple(link.depth - node.depth for link in chain)
            stretch = add(leaves[chain[-1].first][node.depth : chain[-1].depth], place, marks)
            for link, below, mark in zip(chain, [*chain[1:], None], marks, strict=True):
                others = [other for other in link.children if other is not below]
                rest.append((_Node(link.depth, link.first, others, link.leaves), (stretch, mark)))
    return stretches, [ends[leaf] for leaf in range(len(leaves))]


def _chain(node: _Node) -> list[_Node]:
    """The longest way down from a node."""
    chain = [node]
    while chain[-1].children:
        chain.append(max(chain[-1].children, key=lambda child: child.height))
    return chain
