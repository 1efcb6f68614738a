"""In what portions an evaluation is answered: fixed by the requests alone.

A batch's shape can change the last bit of an answer. So a portion is what is read together, kept together and given
to one process; and which texts make a portion depends neither on how many processes there are nor on what has been
answered before. That is why an evaluation that was interrupted, or shared, ends with the scores of one that was not.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from refine_harness.evaluation.prefixes import Tokens, families


def portions(
    texts: Sequence[Tokens], costs: Sequence[int], kinds: Sequence[Hashable], *, rows: int, tokens: int | None = None
) -> list[list[int]]:
    """The texts, by index, in portions.

    Texts that begin alike come together, and beside them texts of similar length. The costliest portion comes first,
    so that what does not fit in memory fails at once; the others come in no order, so that the pace so far tells the
    time left.

    Args:
        costs: tokens that each text costs, its continuations included.
        kinds: texts of different kinds never share a portion.
        rows: most texts of a portion.
        tokens: most tokens of a portion of more than one text; None for no bound.
    """
    found: list[list[int]] = []
    for kind in dict.fromkeys(kinds):
        same = [i for i, other in enumerate(kinds) if other == kind]
        portion: list[int] = []
        for family in families([texts[i] for i in same]):
            for i in (same[j] for j in family):
                spent = sum(costs[j] for j in portion) + costs[i]
                if portion and (len(portion) == rows or (tokens is not None and spent > tokens)):
                    found.append(portion)
                    portion = []
                portion.append(i)
        if portion:
            found.append(portion)
    found.sort(key=lambda portion: (-sum(costs[i] for i in portion), portion))
    rest = found[1:]
    random.Random(0).shuffle(rest)
    return found[:1] + rest


def shares(costs: Sequence[int], processes: int) -> list[list[int]]:
    """Portions, by index, for each process: about as much for each, in the order given."""
    loads = [0] * processes
    found: list[list[int]] = [[] for _ in range(processes)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        process = loads.index(min(loads))
        loads[process] += costs[i]
        found[process].append(i)
    return [sorted(share) for share in found]
