"""Paired bootstrap: by how much a method is better, on test rows and seeds drawn anew (Efron & Tibshirani 1993).

The difference is of the metric on the same test rows, averaged over seeds; rows and seeds are drawn with replacement,
the same ones for both methods. The interval has the middle 95 % of what is then found, and p is the share of draws in
which the method is not better: (1 + how many) / (1 + draws).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from deltaprompt.study.data import Classes

Metric = Literal["accuracy", "macro_f1"]
Floats = npt.NDArray[np.float64]
Pair = tuple[Classes, Classes]  # what a method and the baseline found, from the same seeds: each [s, n]

DRAWS: Final = 10_000
ENTRIES: Final = 2_000_000  # of row weights at once
INSIDE: Final = (2.5, 97.5)  # percentiles
DIGITS: Final = 12  # what is smaller is rounding


@dataclass(frozen=True)
class Difference:
    """By how much a method is better than the baseline."""

    mean: float
    low: float  # the 95 % interval
    high: float
    p: float  # that it is not better

    @classmethod
    def of(cls, seen: float, drawn: Floats) -> Difference:
        """Of what is seen, and what is seen of rows and seeds drawn anew [draws]."""
        low, high = np.percentile(drawn, INSIDE)
        p = (1 + int((drawn <= 0).sum())) / (1 + len(drawn))
        return cls(round(seen, DIGITS), float(low), float(high), p)

    @property
    def sign(self) -> int:
        """1 or −1 where the interval is above or below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def seen(pairs: Sequence[Pair], gold: Classes, classes: int, metric: Metric) -> list[float]:
    """The difference of every pair, as it is."""
    score, once = SCORES[metric], np.ones((1, len(gold)), dtype=np.float32)
    return [float((score(once, a, gold, classes) - score(once, b, gold, classes)).mean()) for a, b in pairs]


def drawn(
    pairs: Sequence[Pair], gold: Classes, classes: int, metric: Metric, draws: int = DRAWS, seed: int = 0
) -> Floats:
    """The difference of every pair on rows and seeds drawn anew [pairs, draws], the same ones for all pairs.

    Args:
        pairs: what a method and the baseline found on the same test rows, from the same seeds: each [s, n].
        gold: what is right [n].
        classes: how many there are.
        metric: whose difference it is.
        draws: how often.
        seed: of the draws.
    """
    generator, n, score = np.random.default_rng(seed), len(gold), SCORES[metric]
    most = max((len(ours) for ours, _ in pairs), default=0)
    chance, made = generator.random((draws, most)), np.empty((len(pairs), draws))
    for first in range(0, draws, size := max(ENTRIES // n, 1)):
        part = chance[first : first + size]
        weights = _counts(generator.integers(0, n, (len(part), n)), n)
        for number, (ours, theirs) in enumerate(pairs):
            each = score(weights, ours, gold, classes) - score(weights, theirs, gold, classes)  # [part, s]
            chosen = (part[:, : len(ours)] * len(ours)).astype(np.int64)
            made[number, first : first + size] = np.take_along_axis(each, chosen, 1).mean(1)
    return made.round(DIGITS)


def _counts(rows: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.float32]:
    """How often each row was drawn: numbers [b, n] -> [b, n]."""
    shifted = rows + n * np.arange(len(rows))[:, None]
    return np.bincount(shifted.ravel(), minlength=len(rows) * n).reshape(len(rows), n).astype(np.float32)


def accuracy(weights: npt.NDArray[np.float32], found: Classes, gold: Classes, classes: int) -> Floats:
    """Σ w_i [found_i = gold_i] / Σ w_i: weights [b, n], found [s, n] -> [b, s]."""
    right = weights @ (found == gold).T.astype(np.float32)
    return right.astype(np.float64) / weights.sum(1, keepdims=True)


def macro_f1(weights: npt.NDArray[np.float32], found: Classes, gold: Classes, classes: int) -> Floats:
    """The mean over classes of 2 TP / (2 TP + FP + FN), 0 where that is 0 / 0: [b, n], [s, n] -> [b, s]."""
    are = _of_classes(gold, classes)
    truly = weights @ are  # [b, c]
    each = []
    for own in found:
        said = _of_classes(own, classes)
        both = weights @ (said * are)
        each.append((2 * both.astype(np.float64) / np.maximum(weights @ said + truly, 1)).mean(1))
    return np.stack(each, 1)


def _of_classes(own: Classes, classes: int) -> npt.NDArray[np.float32]:
    """[n] -> [n, c], 1 at the class."""
    return (own[:, None] == np.arange(classes)).astype(np.float32)


SCORES: Final[Mapping[Metric, Callable[[npt.NDArray[np.float32], Classes, Classes, int], Floats]]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
}
