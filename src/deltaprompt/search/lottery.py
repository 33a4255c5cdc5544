"""Lottery prompts (Chen et al. 2023, arXiv 2305.19500): of many random templates, which make a frozen model right?

For each row, how many must be tried until the model is right, next to 1 − (1 − 1/C)^M, what M guesses reach, and to the
same answers on permuted labels. Over all training rows, which templates are strong; several of these answer
together by the mean of their probabilities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Final

from torch import Tensor

from deltaprompt.backbone import Backbone, Kind
from deltaprompt.model import Task
from deltaprompt.search._lexicon import FOLLOWING, LEADING, LEXICON
from deltaprompt.search._null import calls, first_right, needed, permuted, success, within
from deltaprompt.search._pool import Pool
from deltaprompt.search._result import SearchResult, Table, Test, code, ranked_controls, settled
from deltaprompt.search._session import Score, Session, begin, check_counts
from deltaprompt.types import Example

TRIES: Final = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)


@dataclass(frozen=True)
class Lottery:
    """Templates by the thousand, none of them trained.

    Args:
        size: templates that are drawn from the pool and tried on every training row.
        shapes: templates with `<noun>`, `<verb>`, `<preposition>`, `<adjective>`, `<adverb>` or `<pronoun>` where a
            word of that kind stands; usual ones for the kind of backbone where none are given.
        words: part of speech -> words, in place of the usual ones, or of parts of your own.
        shortlist: the best on the training rows, among which dev rows choose.
        ensemble: the best of these, whose probabilities are averaged.
        permutations: new orders of the labels that all is compared with.
        together: templates that are scored in common passes.
        batch_size: rows in one pass.
    """

    size: int = 1000
    shapes: tuple[str, ...] = ()
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shortlist: int = 30
    ensemble: int = 10
    permutations: int = 100
    together: int = 16
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_counts(self, size=1, shortlist=1, ensemble=1, permutations=1, together=1, batch_size=1)

    def pool(self, kind: Kind) -> Pool:
        """What is drawn from, for that kind of backbone; a left-to-right one answers last."""
        usual = FOLLOWING if kind == "causal" else (*FOLLOWING, *LEADING)
        return Pool(self.shapes or usual, {**LEXICON, **self.words})


def lottery(
    backbone: Backbone,
    task: Task,
    train: Sequence[Example],
    dev: Sequence[Example],
    test: Test | None = None,
    *,
    options: Lottery = Lottery(),
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
) -> SearchResult:
    """Tries templates on a frozen backbone, and keeps the strong ones.

    Args:
        backbone: a language model, to which nothing is attached.
        task: whose label words every template has, and whose own template is the baseline.
        train: labelled rows, on which every template is tried.
        dev: other labelled rows, on which the best of them are.
        test: rows, or what reads them when everything is chosen; `result.measured(test)` does it later.
        options: how many, and of what.
        seed: of the order in which templates are drawn, and of the permutations.
        out: a folder for the journal, from which a search that was killed goes on.
        resume: goes on with the search that was broken off in `out`, to the result that it would have had.

    Raises:
        ConfigError: a plain encoder, answers that have to be trained, impossible options, or another search in `out`.
        DataError: no rows, or labels that the task does not have.
    """
    began = monotonic()
    s = begin("lottery", backbone, task, train, dev, options, seed, out, resume)
    drawn = options.pool(backbone.kind).drawn(options.size, seed)
    tasks = [dataclasses.replace(task, template=template) for template, _ in drawn]
    predicted, scores = s.ranked(tasks)
    tables = (_costs(s, predicted), _shapes([shape for _, shape in drawn], scores))
    result = settled(s, tasks, scores, ranked_controls(s, predicted), tables, began)
    return result if test is None else result.measured(test)


def _costs(s: Session, predicted: Tensor) -> Table:
    """How many rows have a right prompt among the first M, and how many prompts that takes."""
    first, classes = first_right(predicted, s.labels), s.classes(s.train)
    own = needed(first, classes)  # [n]
    anew = needed(first, permuted(classes, s.options.permutations, s.seed))  # [r, n]
    rows, most = len(classes), len(predicted)
    lines = [
        (
            m,
            _share(own, m),
            success(s.labels, m),
            f"± {within(s.labels, m, rows):.3f}",
            _share(anew, m),
            _mean_calls(own, m),
            calls(s.labels, m),
            _mean_calls(anew, m),
        )
        for m in [*(m for m in TRIES if m < most), most]
    ]
    columns = (
        "M",
        "rows with a right one",
        "null",
        "its 95 %",
        "permuted",
        "calls a row",
        "null calls",
        "permuted calls",
    )
    return Table("Prompts tried until the model is right, at most M", columns, tuple(lines))


def _share(first: Tensor, most: int) -> float:
    return float((first <= most).double().mean())


def _mean_calls(first: Tensor, most: int) -> float:
    return float(first.clamp(max=most).double().mean())


def _shapes(shapes: Sequence[str], scores: Sequence[Score]) -> Table:
    """How strong the templates of each shape are."""
    each: dict[str, list[float]] = {}
    for shape, score in zip(shapes, scores, strict=True):
        each.setdefault(shape, []).append(score.accuracy)
    ranked = sorted(each.items(), key=lambda item: -sum(item[1]) / len(item[1]))
    rows = tuple((code(shape), len(a), sum(a) / len(a), max(a)) for shape, a in ranked)
    return Table("Accuracy on the training rows by shape", ("shape", "prompts", "mean", "best"), rows)
