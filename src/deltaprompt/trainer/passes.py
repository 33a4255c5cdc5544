"""Which rows go through the backbone at once, where several courses share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest

import numpy as np

from deltaprompt.features import Encoded

Part = tuple[int, list[Encoded], float]  # a course's number, rows of it, and the share of their mean loss in its loss
Pass = list[Part]
Batches = Sequence[tuple[list[Encoded], float]]  # of one course in a step, with their shares

MOST = {"cpu": 1024, "cuda": 8192}  # tokens that keep a machine busy; more of them only take memory
COSTS = {"cpu": (3.5e6, 10), "cuda": (1.7e9, 512)}  # what a pass's calls cost, in tokens × width², and the least


def common(each: Sequence[Batches]) -> list[Pass]:
    """The first batch of every course together, then the second of each that has one, and so on."""
    together = zip_longest(*each)
    return [[(n, *batch) for n, batch in enumerate(batches) if batch is not None] for batches in together]


def apart(whole: Pass, sorts: Sequence[object]) -> list[Pass]:
    """A pass in one for each sort of courses, in the order in which they come; `sorts` are those of the courses."""
    return [[part for part in whole if sorts[part[0]] == sort] for sort in dict.fromkeys(sorts[n] for n, _, _ in whole)]


def by_length(whole: Pass, cost: float, most: int) -> Iterator[Pass]:
    """A pass in several, of rows of about one length: the split with the smallest Σ (cost + longest × rows).

    Found exactly: of rows in the order of their lengths, the best split of the first i ends with the best of some first
    j and one pass of the rows from j to i, which has `most` tokens at most.
    """
    rows = [(row, n, share * row.weight / weight_of(own)) for n, own, share in whole for row in own]
    rows.sort(key=lambda one: -one[0].length)
    longest, best, start = np.array([row.length for row, _, _ in rows]), np.zeros(len(rows) + 1), [0]
    for i in range(1, len(rows) + 1):
        tokens = longest[:i] * np.arange(i, 0, -1)  # of a pass of the rows from each j to i
        totals = best[:i] + cost + np.where(tokens > most, np.inf, tokens)
        totals[-1] = best[i - 1] + cost + tokens[-1]  # a row alone is a pass, however long
        start.append(int(totals.argmin()))
        best[i] = totals[start[-1]]
    cuts = [len(rows)]
    while cuts[-1]:
        cuts.append(start[cuts[-1]])
    for first, end in pairwise(reversed(cuts)):
        yield _parts(rows[first:end])


def weight_of(rows: Sequence[Encoded]) -> int:
    """What a mean loss over rows is divided by: their number, or that of their targets' ids."""
    return sum(row.weight for row in rows)


def cost_of(width: int, device: str) -> float:
    """What a pass costs beside its tokens, in tokens of a model of that width.

    Measured on two CPU cores at widths 256 and 768. A token's own part grows with the square of the width.
    """
    calls, least = COSTS.get(device, COSTS["cuda"])
    return least + calls / width**2


def _parts(rows: Sequence[tuple[Encoded, int, float]]) -> Pass:
    """Rows, each with its weight in its course's loss, course by course."""
    own: dict[int, list[tuple[Encoded, float]]] = {}
    for row, course, weight in rows:
        own.setdefault(course, []).append((row, weight))
    return [(n, [row for row, _ in some], sum(weight for _, weight in some)) for n, some in sorted(own.items())]
