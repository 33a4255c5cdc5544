"""Which rows go through the backbone at once, where several courses share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from deltaprompt.features import Encoded

Part = tuple[int, list[Encoded], float]  # a course's number, rows of it, and the share of their mean loss in its loss
Pass = list[Part]
Batches = Sequence[tuple[list[Encoded], float]]  # of one course in a step, with their shares

ENOUGH = {"cpu": 256, "cuda": 8192}  # tokens that keep a machine busy: products of matrices gain little from more


def common(each: Sequence[Batches]) -> list[Pass]:
    """The first batch of every course together, then the second of each that has one, and so on."""
    together = zip_longest(*each)
    return [[(n, *batch) for n, batch in enumerate(batches) if batch is not None] for batches in together]


def apart(whole: Pass, sorts: Sequence[object]) -> list[Pass]:
    """A pass in one for each sort of courses, in the order in which they come; `sorts` are those of the courses."""
    return [[part for part in whole if sorts[part[0]] == sort] for sort in dict.fromkeys(sorts[n] for n, _, _ in whole)]


def by_length(whole: Pass, enough: int) -> Iterator[Pass]:
    """A pass in several, of rows of about one length: less padding, and each of them with `enough` tokens.

    The last may have fewer, where taking its rows in before would add half as many tokens of padding.
    """
    rows = [(row, n, share / len(own)) for n, own, share in whole for row in own]
    rows.sort(key=lambda one: -one[0].length)
    left, start = sum(row.length for row, _, _ in rows), 0
    while start < len(rows):
        longest, end, taken = rows[start][0].length, start, 0
        while end < len(rows) and (taken < enough or longest * (len(rows) - end) - left < enough // 2):
            taken, left, end = taken + longest, left - rows[end][0].length, end + 1
        yield _parts(rows[start:end])
        start = end


def _parts(rows: Sequence[tuple[Encoded, int, float]]) -> Pass:
    """Rows, each with its weight in its course's loss, course by course."""
    own: dict[int, list[tuple[Encoded, float]]] = {}
    for row, course, weight in rows:
        own.setdefault(course, []).append((row, weight))
    return [(n, [row for row, _ in some], sum(weight for _, weight in some)) for n, some in sorted(own.items())]
