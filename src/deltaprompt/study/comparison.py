"""What a study comes to: a figure for every method, data set and number of shots, and a total for every method."""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from deltaprompt.study.bootstrap import DRAWS, Difference, Floats, Metric, Pair, drawn, seen
from deltaprompt.study.cells import Cell
from deltaprompt.study.data import DataSet, Shots

Place = tuple[str, str, Shots, int]  # of a cell: method, data set, shots, seed
Found = Mapping[Place, Cell | str]  # a text: why it failed
Range = tuple[int, int]  # the least and the most


@dataclass(frozen=True)
class Figure:
    """What a method came to on a data set after so many shots."""

    method: str
    data: str
    shots: Shots
    metric: Metric
    cells: tuple[Cell, ...]  # of the seeds that came to their end
    failed: Mapping[int, str]  # seed -> why
    difference: Difference | None = None  # to the baseline
    best: bool = False  # of all methods there
    near: bool = False  # within one standard error of the best

    @property
    def each(self) -> list[float]:
        """The metric of every seed."""
        return [cell.accuracy if self.metric == "accuracy" else cell.macro_f1 for cell in self.cells]

    @property
    def mean(self) -> float | None:
        """Over seeds; none where no seed came to its end."""
        return statistics.fmean(self.each) if self.cells else None

    @property
    def std(self) -> float:
        """The sample standard deviation over seeds; 0 of one."""
        return statistics.stdev(self.each) if len(self.cells) > 1 else 0.0

    @property
    def error(self) -> float:
        """The standard error of the mean over seeds."""
        return self.std / math.sqrt(max(len(self.cells), 1))

    @property
    def whole(self) -> bool:
        """Whether every seed came to its end."""
        return bool(self.cells) and not self.failed

    @property
    def aurocs(self) -> list[float]:
        """How well texts outside are told from the test rows, of every seed that says so."""
        return [cell.auroc for cell in self.cells if cell.auroc is not None]


@dataclass(frozen=True)
class Total:
    """What a method came to over all data sets and shots."""

    method: str
    mean: float | None  # of the figures that it has
    error: float  # the standard error of that mean
    figures: int  # that it has whole
    asked: int  # that there are
    difference: Difference | None  # mean over the figures that the baseline has too
    compared: int  # how many these are
    cpu_seconds: float | None  # of training one adaptation, mean over cells
    trainable: Range | None
    bytes: Range | None
    best: bool = False
    near: bool = False

    @property
    def whole(self) -> bool:
        """Whether it has a figure everywhere."""
        return self.figures == self.asked


@dataclass(frozen=True)
class Comparison:
    """The figures of all methods, in the order of data sets, shots and methods, and the totals."""

    metric: Metric
    baseline: str | None
    seeds: tuple[int, ...]
    test_rows: Mapping[str, int]  # by data set
    columns: tuple[tuple[str, Shots], ...]
    figures: tuple[Figure, ...]
    totals: tuple[Total, ...]
    outside: Mapping[str, int] = field(default_factory=dict)  # texts that belong to no label, by data set that has some

    def at(self, method: str, data: str, shots: Shots) -> Figure:
        """One figure."""
        return next(f for f in self.figures if (f.method, f.data, f.shots) == (method, data, shots))


def comparison(
    found: Found,
    datasets: Sequence[DataSet],
    methods: Sequence[str],
    shots: Sequence[Shots],
    seeds: Sequence[int],
    metric: Metric = "accuracy",
    baseline: str | None = None,
    draws: int = DRAWS,
) -> Comparison:
    """The figures of what was found; the draws of a data set are the same for all methods and shots."""
    figures, made = list[Figure](), dict[str, list[Floats]]()  # by method, the draws of its differences
    for data in datasets:
        own = [_figure(found, name, data.name, k, seeds, metric) for k in shots for name in methods]
        told = _differences(own, data, metric, baseline, draws)
        for i, (difference, each) in told.items():
            own[i] = replace(own[i], difference=difference)
            made.setdefault(own[i].method, []).append(each)
        figures += _marked(own, len(methods))
    totals = [_total(name, [f for f in figures if f.method == name], made.get(name, [])) for name in methods]
    totals = [replace(t, best=b, near=n) for t, (b, n) in zip(totals, marks(totals), strict=True)]
    columns = tuple((data.name, k) for data in datasets for k in shots)
    rows = {data.name: len(data.test) for data in datasets}
    outside = {data.name: len(data.outside) for data in datasets if data.outside}
    return Comparison(metric, baseline, tuple(seeds), rows, columns, tuple(figures), tuple(totals), outside)


def _figure(found: Found, method: str, data: str, shots: Shots, seeds: Sequence[int], metric: Metric) -> Figure:
    each = {seed: found.get((method, data, shots, seed)) for seed in seeds}
    cells = tuple(cell for cell in each.values() if isinstance(cell, Cell))
    return Figure(method, data, shots, metric, cells, {s: why for s, why in each.items() if isinstance(why, str)})


# Differences


def _pair(ours: Figure, theirs: Figure) -> Pair | None:
    """What both found from the seeds that both have; none where there are none."""
    a, b = ({cell.key.seed: cell.classes for cell in figure.cells} for figure in (ours, theirs))
    common = [seed for seed in a if seed in b]
    return (np.stack([a[s] for s in common]), np.stack([b[s] for s in common])) if common else None


def _differences(
    figures: Sequence[Figure], data: DataSet, metric: Metric, baseline: str | None, draws: int
) -> dict[int, tuple[Difference, Floats]]:
    """The differences of one data set's figures to the baseline's after as many shots, by place, and their draws."""
    theirs = {f.shots: f for f in figures if f.method == baseline}
    paired = {i: _pair(f, theirs[f.shots]) for i, f in enumerate(figures) if theirs and f.method != baseline}
    pairs = {i: pair for i, pair in paired.items() if pair is not None}
    asked = (list(pairs.values()), data.gold, len(data.labels), metric)
    seed = zlib.crc32(data.name.encode())  # data sets are drawn from independently
    each = zip(seen(*asked), drawn(*asked, draws, seed), strict=True) if pairs else ()
    return {i: (Difference.of(one, many), many) for i, (one, many) in zip(pairs, each, strict=True)}


# The best


class Ranked(Protocol):
    """What has a mean."""

    @property
    def mean(self) -> float | None: ...
    @property
    def error(self) -> float: ...
    @property
    def whole(self) -> bool: ...


def marks(each: Sequence[Ranked]) -> list[tuple[bool, bool]]:
    """Which is the best of those that are whole, and which of them are within one standard error of it."""
    means = [one.mean if one.whole else None for one in each]
    known = [(mean, one.error) for mean, one in zip(means, each, strict=True) if mean is not None]
    if not known:
        return [(False, False)] * len(each)
    best, error = max(known)
    return [(mean == best, mean is not None and best - error <= mean < best) for mean in means]


def _marked(figures: Sequence[Figure], methods: int) -> list[Figure]:
    """The figures of a data set, so many methods after each number of shots, with the best of each marked."""
    columns = [figures[i : i + methods] for i in range(0, len(figures), methods)]
    return [
        replace(f, best=best, near=near)
        for column in columns
        for f, (best, near) in zip(column, marks(column), strict=True)
    ]


# Totals


def _total(method: str, figures: Sequence[Figure], drawn_for: Sequence[Floats]) -> Total:
    has, whole = [f for f in figures if f.cells], [f for f in figures if f.whole]
    means = [f.mean for f in has if f.mean is not None]
    cells = [cell for f in has for cell in f.cells]
    differences = [f.difference.mean for f in has if f.difference is not None]
    return Total(
        method,
        statistics.fmean(means) if means else None,
        _error(has),
        len(whole),
        len(figures),
        Difference.of(statistics.fmean(differences), np.mean(drawn_for, axis=0)) if differences else None,
        len(differences),
        statistics.fmean(cell.cpu_seconds for cell in cells) if cells else None,
        _range([cell.trainable for cell in cells]),
        _range([cell.bytes for cell in cells]),
    )


def _error(figures: Sequence[Figure]) -> float:
    """The standard error of the mean of figures.

    Those of one data set share rows, fewer shots being among more: of each seed their mean is one draw. Data sets are
    independent.
    """
    variances = list[float]()
    for data in dict.fromkeys(f.data for f in figures):
        several = [f for f in figures if f.data == data and len(f.cells) > 1]  # of 0 shots there is one seed
        each = [dict(zip((cell.key.seed for cell in f.cells), f.each, strict=True)) for f in several]
        common = set.intersection(*(set(own) for own in each)) if each else ()
        sums = [math.fsum(own[seed] for own in each) for seed in common]
        known = statistics.variance(sums) / len(sums) if len(sums) > 1 else math.fsum(f.error**2 for f in several)
        variances.append(known)
    return math.sqrt(math.fsum(variances)) / max(len(figures), 1)


def _range(each: Sequence[int | None]) -> Range | None:
    known = [one for one in each if one is not None]
    return (min(known), max(known)) if known else None
