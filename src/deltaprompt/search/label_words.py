"""Label words found by a masked model itself (LM-BFF: Gao, Fisch & Chen 2021, arXiv 2012.15723, section 5.1).

For each class the k words with the largest Σ_x log p(word at the mask | x) over its training rows x; of all assignments
of one such word a class the n with the best accuracy on the training rows, unless that is tuned first; dev chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.heads import Head
from deltaprompt.errors import BackboneError, ConfigError
from deltaprompt.model import Task
from deltaprompt.model.showing import shows
from deltaprompt.search._null import best_of, permuted
from deltaprompt.search._result import SearchResult, Table, Test, settled
from deltaprompt.search._session import Score, Session, Tuning, begin, check_counts
from deltaprompt.types import Example

MOST: Final = 2_000_000  # assignments: half a minute on one core for 64 rows of 4 classes
NUMBERS: Final = 1 << 24  # scores that are formed at once: 64 MB
ROWS: Final = 64  # rows whose scores of the whole vocabulary are formed at once


@dataclass(frozen=True)
class WordSearch:
    """One word a class.

    Args:
        words: k, the likeliest words of each class that are tried.
        beam: None tries every assignment; a number gives the classes their words one after another, and keeps that
            many of the best partial assignments, for tasks of many classes.
        shortlist: n, the best assignments on the training rows, among which dev rows choose.
        ensemble: the best of these, whose probabilities are averaged.
        permutations: new orders of the labels that all is compared with.
        together: assignments that are scored in common passes.
        batch_size: rows in one pass.
    """

    words: int = 30
    beam: int | None = None
    shortlist: int = 100
    ensemble: int = 1
    permutations: int = 3
    together: int = 50
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_counts(self, words=1, shortlist=1, ensemble=1, permutations=1, together=1, batch_size=1)
        if self.beam is not None:
            check_counts(self, beam=1)


def label_words(
    backbone: Backbone,
    task: Task,
    train: Sequence[Example],
    dev: Sequence[Example],
    test: Test | None = None,
    *,
    options: WordSearch = WordSearch(),
    seed: int = 0,
    tuning: Tuning | None = None,
    out: str | Path | None = None,
    resume: bool = False,
) -> SearchResult:
    """Finds a word for each class.

    Args:
        backbone: a language model, to which nothing is attached.
        task: whose template all assignments have, and whose own label words are the baseline.
        train: labelled rows, of which the words are the likeliest answers.
        dev: other labelled rows, which choose among the best assignments.
        test: rows, or what reads them when everything is chosen; `result.measured(test)` does it later.
        options: how many words and assignments.
        seed: of the permutations.
        tuning: trains for each of the shortlist before dev rows choose.
        out: a folder for the journal, from which a search that was killed goes on.
        resume: goes on with the search that was broken off in `out`, to the result that it would have had.

    Raises:
        ConfigError: no label words to begin with, too many assignments, impossible options, another search in `out`.
        DataError: no rows, or labels that the task does not have.
    """
    began = monotonic()
    s = begin("label_words", backbone, task, train, dev, options, seed, out, resume, tuning)
    s.words()
    if shows(task):
        raise ConfigError(
            "demonstrations show label words, which are what is searched; leave {demos} out of the template"
        )
    _check_count(options, s.labels)
    known, classes = s.frozen.whole_words(task), s.classes(s.train)
    if len(known) < options.words:
        raise ConfigError(f"words = {options.words}, and the vocabulary has {len(known)} whole words; take fewer")
    head, states = _head(backbone), s.frozen.states(task, s.train)
    rows = _Rows(head, states, torch.tensor(list(known)), _log_likelihoods(head, states))
    found = _Found.of(s.journal.once("assignments", lambda: rows.best(classes, options).told()))
    tasks = [
        s.worded({name: (known[i],) for name, i in zip(task.names, ids, strict=True)}) for ids in found.ids.tolist()
    ]
    scores = [Score.of(p, classes) for p in s.probabilities("train", tasks, s.train)]
    orders = permuted(classes, options.permutations, seed)
    others = s.journal.once("permuted", lambda: [rows.best(order, options).accuracy for order in orders])
    controls = {
        "candidates": found.tried,
        "best": found.accuracy,
        "null": best_of(s.labels, len(classes), found.tried),
        "permuted": mean(others),
        "permutations": options.permutations,
    }
    result = settled(s, tasks, scores, controls, [_likeliest(s, known, found.likeliest)], began)
    return result if test is None else result.measured(test)


@dataclass(frozen=True, eq=False)
class _Found:
    """The best assignments [a, c] of tokens, the best accuracy, how many were tried, and each class's words [c, k]."""

    ids: Tensor
    accuracy: float
    tried: int
    likeliest: Tensor

    def told(self) -> dict[str, Any]:
        """The same as JSON."""
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in vars(self).items()}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> _Found:
        """What was told."""
        return cls(torch.tensor(told["ids"]), told["accuracy"], told["tried"], torch.tensor(told["likeliest"]))


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is known of the training rows: their states [n, d] and log p of every vocabulary row [n, v]."""

    head: Head
    states: Tensor
    words: Tensor  # ids of the tokens that are words
    log_p: Tensor

    def best(self, classes: Tensor, options: WordSearch) -> _Found:
        """The best assignments where the rows have these classes."""
        sums = torch.zeros(int(classes.max()) + 1, self.log_p.shape[1], dtype=torch.float64)
        sums.index_add_(0, classes, self.log_p.double())  # Σ over the rows of a class: [c, v]
        ids = self.words[sums[:, self.words].topk(options.words, dim=-1).indices]  # [c, k]
        scores = self.log_p[:, ids.flatten()].unflatten(1, ids.shape)  # [n, c, k]
        chosen, tried = assignments(scores, classes, ids, options.shortlist, options.beam)
        right, _ = _fit(scores, classes, chosen[:1])
        return _Found(ids[torch.arange(len(ids)), chosen], float(right[0]) / len(classes), tried, ids)


def assignments(scores: Tensor, classes: Tensor, ids: Tensor, keep: int, beam: int | None = None) -> tuple[Tensor, int]:
    """The best assignments [keep, c] of a word's place a class, no word twice, and how many whole ones were tried.

    Args:
        scores: log p of each class's words in each row, [n, c, k].
        classes: of the rows, [n].
        ids: the words' tokens, [c, k].
        keep: how many; by accuracy, and of equal ones by the mean log-likelihood of the right class.
        beam: partial assignments that are kept, judged by the rows of the classes that have a word; all where None.
    """
    partial, labels = torch.zeros(1, 0, dtype=torch.long), scores.shape[1]
    for c in range(labels):
        partial = _longer(partial, c, ids)
        if not len(partial):
            raise ConfigError(f"words = {ids.shape[1]}: the classes have the same likeliest words; take more")
        if beam is not None and c + 1 < labels:
            seen = classes <= c
            partial = partial[_first(scores[seen], classes[seen], partial, beam)]
    return partial[_first(scores, classes, partial, keep)], len(partial)


def _longer(partial: Tensor, c: int, ids: Tensor) -> Tensor:
    """Assignments [a, c] with each word of one more class, but for words that they have: [a', c + 1]."""
    words = ids.shape[1]
    own = torch.arange(words).repeat(len(partial))
    longer = torch.cat([partial.repeat_interleave(words, 0), own[:, None]], dim=1)
    taken = ids[torch.arange(c), longer[:, :c]] == ids[c, own][:, None]  # [a', c]
    return longer[~taken.any(1)]


def _first(scores: Tensor, classes: Tensor, partial: Tensor, keep: int) -> Tensor:
    """The numbers of the best assignments, the best first and of equal ones the earlier."""
    right, likely = _fit(scores, classes, partial)
    order = np.lexsort((-likely.numpy(), -right.numpy()))
    return torch.from_numpy(order[:keep].copy())


def _fit(scores: Tensor, classes: Tensor, partial: Tensor) -> tuple[Tensor, Tensor]:
    """Of each assignment [a, c]: the rows that it has right, and the sum of log p of their classes."""
    rows, width = len(scores), partial.shape[1]
    each = []
    for some in partial.split(max(1, NUMBERS // (rows * width))):
        own = scores[:, torch.arange(width), some]  # [n, a, c]
        log_p = own.log_softmax(-1)
        right = (own.argmax(-1) == classes[:, None]).sum(0)
        each.append((right, log_p.gather(-1, classes[:, None, None].expand(-1, len(some), 1)).double().sum((0, 2))))
    return torch.cat([right for right, _ in each]), torch.cat([likely for _, likely in each])


def _log_likelihoods(head: Head, states: Tensor) -> Tensor:
    """log p of every vocabulary row at states [n, d]: [n, v], on the CPU."""
    with torch.inference_mode():
        return torch.cat([head.logits(some).float().log_softmax(-1).cpu() for some in states.split(ROWS)])


def _head(backbone: Backbone) -> Head:
    if backbone.head is None:
        raise BackboneError("a plain encoder has no head to ask for words; load it with kind='masked' if it has one")
    return backbone.head


def _check_count(options: WordSearch, labels: int) -> None:
    if options.beam is None and options.words**labels > MOST:
        fits = int(MOST ** (1 / labels))
        raise ConfigError(
            f"{options.words} words for each of {labels} classes are {options.words**labels:,} assignments, and "
            f"{MOST:,} at most are tried; take words = {fits}, or beam = 1000"
        )


def _likeliest(s: Session, known: Mapping[int, str], likeliest: Tensor) -> Table:
    rows = [
        (name, ", ".join(known[i] for i in ids[:20]))
        for name, ids in zip(s.task.names, likeliest.tolist(), strict=True)
    ]
    return Table("The likeliest words at the mask", ("label", "words"), tuple(rows))
