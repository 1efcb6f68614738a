"""Stories and questions in the manner of bAbI's first five tasks (Weston et al., arXiv 1502.05698), hidden in prose.

The world is bAbI's: its people, places and things, its verbs and its kinds of questions. The stories are made here,
so they are not bAbI's, and prompts made of them are in BABILong's manner (arXiv 2406.10149) without being BABILong.
Every question has one answer, and the story before it decides it. Pure: prose comes as an argument, chance from the
caller's seed.

Left out: BABILong's own rows, prompts' wording and scores (evaluation/babilong.py), tokenizers, files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
"""The people of the fifth task."""

_MOVED = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
_TOOK = ("got", "grabbed", "picked up", "took")
_LEFT = ("discarded", "dropped", "left", "put down")
_GAVE = ("gave", "handed", "passed")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True)
class Story:
    facts: tuple[str, ...]
    """Sentences in the order of what happens."""
    question: str
    answer: str


class _World:
    """Who is where and has what; every change is told as a fact."""

    def __init__(self, rng: random.Random, people: Sequence[str]) -> None:
        self.rng = rng
        self.people = people
        self.facts: list[str] = []
        self.where: dict[str, str] = {}
        """A person's place, once told."""
        self.holder: dict[str, str] = {}
        self.seen: dict[str, list[str]] = {}
        """The places a thing has been in since its place is known, each followed by another."""

    def move(self, person: str) -> None:
        place = self.rng.choice([place for place in PLACES if place != self.where.get(person)])
        self.where[person] = place
        self.facts.append(f"{person} {self.rng.choice(_MOVED)} the {place}.")
        for thing, holder in self.holder.items():
            if holder == person:
                self._at(thing, place)

    def take(self, person: str, thing: str) -> None:
        self.holder[thing] = person
        self.facts.append(f"{person} {self.rng.choice(_TOOK)} the {thing}{self._there()}.")
        self._at(thing, self.where[person])

    def leave(self, thing: str) -> None:
        person = self.holder.pop(thing)
        self.facts.append(f"{person} {self.rng.choice(_LEFT)} the {thing}{self._there()}.")

    def give(self, thing: str, person: str) -> tuple[str, str, str]:
        giver, self.holder[thing] = self.holder[thing], person
        self.facts.append(f"{giver} {self.rng.choice(_GAVE)} the {thing} to {person}.")
        return giver, thing, person

    def reachable(self, person: str) -> list[str]:
        """Things that `person` can take: nobody has them, and they are here or nobody has said where they are."""
        here = self.where.get(person)
        free = [thing for thing in THINGS if thing not in self.holder]
        return [thing for thing in free if here and self.seen.get(thing, [here])[-1] == here]

    def step(self) -> None:
        """Somebody takes, leaves or moves."""
        person = self.rng.choice(self.people)
        held = [thing for thing, holder in self.holder.items() if holder == person]
        kind = self.rng.random()
        if kind < 0.3 and (things := self.reachable(person)):
            self.take(person, self.rng.choice(things))
        elif kind < 0.45 and held:
            self.leave(self.rng.choice(held))
        else:
            self.move(person)

    def _at(self, thing: str, place: str) -> None:
        places = self.seen.setdefault(thing, [])
        if not places or places[-1] != place:
            places.append(place)

    def _there(self) -> str:
        return self.rng.choice(("", " there"))


def make_story(task: str, seed: int | str) -> Story:
    """A story, its question and its answer, for a task of `TASKS`."""
    rng = random.Random(seed)
    while True:
        if (story := TASKS[task](rng)) is not None:
            return story


def _where_is_a_person(rng: random.Random) -> Story | None:
    world = _World(rng, PEOPLE)
    for _ in range(rng.randint(2, 10)):
        world.move(rng.choice(PEOPLE))
    person = rng.choice(sorted(world.where))
    return Story(tuple(world.facts), f"Where is {person}?", world.where[person])


def _where_is_a_thing(rng: random.Random) -> Story | None:
    world = _told(rng, rng.randint(4, 24))
    if not world.seen:
        return None
    thing = rng.choice(sorted(world.seen))
    return Story(tuple(world.facts), f"Where is the {thing}?", world.seen[thing][-1])


def _where_was_a_thing(rng: random.Random) -> Story | None:
    world = _told(rng, rng.randint(8, 30))
    # A place that a thing was in once only, so that "before" means one moment.
    asked = [
        (thing, place, before)
        for thing, places in sorted(world.seen.items())
        for before, place in pairwise(places)
        if places.count(place) == 1
    ]
    if not asked:
        return None
    thing, place, before = rng.choice(asked)
    return Story(tuple(world.facts), f"Where was the {thing} before the {place}?", before)


def _told(rng: random.Random, steps: int) -> _World:
    world = _World(rng, PEOPLE)
    for _ in range(steps):
        world.step()
    return world


def _what_lies_where(rng: random.Random) -> Story | None:
    middle, *others = rng.sample(PLACES, 3)
    directions = rng.sample(sorted(_OPPOSITE), 2)
    facts = [
        f"The {other} is {direction} of the {middle}."
        if rng.random() < 0.5
        else f"The {middle} is {_OPPOSITE[direction]} of the {other}."
        for other, direction in zip(others, directions, strict=True)
    ]
    answer, direction = others[0], directions[0]
    rng.shuffle(facts)
    question = rng.choice((f"What is {direction} of the {middle}?", f"What is the {middle} {_OPPOSITE[direction]} of?"))
    return Story(tuple(facts), question, answer)


def _who_gave_what(rng: random.Random) -> Story | None:
    world = _World(rng, GIVERS)
    gifts: list[tuple[str, str, str]] = []
    for person in GIVERS:  # nobody says where they are at first, as in bAbI
        world.where[person] = rng.choice(PLACES)
    for _ in range(rng.randint(3, 24)):
        possible = [
            (thing, person)
            for thing, holder in sorted(world.holder.items())
            for person in GIVERS
            if person != holder and world.where[person] == world.where[holder]
        ]
        if possible and rng.random() < 0.6:
            gifts.append(world.give(*rng.choice(possible)))
        else:
            world.step()
    asked = [
        (question, answer)
        for giver, thing, receiver in gifts
        for question, answer, same in (
            (f"Who gave the {thing} to {receiver}?", giver, lambda gift, t=thing, r=receiver: gift[1:] == (t, r)),
            (f"What did {giver} give to {receiver}?", thing, lambda gift, g=giver, r=receiver: gift[::2] == (g, r)),
            (f"Who did {giver} give the {thing} to?", receiver, lambda gift, g=giver, t=thing: gift[:2] == (g, t)),
            (f"Who gave the {thing}?", giver, lambda gift, t=thing: gift[1] == t),
            (f"Who received the {thing}?", receiver, lambda gift, t=thing: gift[1] == t),
        )
        if sum(map(same, gifts)) == 1  # only one gift can be meant
    ]
    if not asked:
        return None
    question, answer = rng.choice(asked)
    return Story(tuple(world.facts), question, answer)


TASKS: dict[str, Callable[[random.Random], Story | None]] = {
    "qa1": _where_is_a_person,
    "qa2": _where_is_a_thing,
    "qa3": _where_was_a_thing,
    "qa4": _what_lies_where,
    "qa5": _who_gave_what,
}
"""bAbI's number of a task -> a story, or None where chance made one that has nothing to ask."""


def hide(facts: Sequence[str], prose: Sequence[str], seed: int | str) -> str:
    """Prose with the facts, in their order, at places between its sentences that the seed decides."""
    places = sorted(int(share * (len(prose) + 1)) for share in _shares(len(facts), seed))
    pieces = list(prose)
    for i, (place, fact) in enumerate(zip(places, facts, strict=True)):
        pieces.insert(place + i, fact)
    return " ".join(pieces)


def _shares(n: int, seed: int | str) -> list[float]:
    rng = random.Random(seed)
    return [rng.random() for _ in range(n)]
