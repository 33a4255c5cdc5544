"""How well queries of episodes are answered: accuracy and its interval, counts of spans and their pooled F1."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltaprompt.features import Encoded
from deltaprompt.model import span_metrics
from deltaprompt.model.span_metrics import Counts, Spans
from deltaprompt.model.tagging import Tagging
from deltaprompt.model.transitions import paths_of

NORMAL: Final = 1.96  # standard errors of a mean to either end of its 95 % interval


class Answered(NamedTuple):
    """What an episode's queries were given, on the CPU."""

    scores: Tensor  # [n, c]
    classes: Tensor  # [n] the right ones

    @property
    def accuracy(self) -> float:
        """The share of queries whose best class is right."""
        return float((self.scores.argmax(-1) == self.classes).float().mean())


def means(each: Sequence[Answered]) -> dict[str, float]:
    """`{"accuracy", "loss"}`, means over episodes."""
    losses = [float(cross_entropy(one.scores, one.classes)) for one in each]
    return {"accuracy": statistics.fmean(one.accuracy for one in each), "loss": statistics.fmean(losses)}


def with_interval(each: Sequence[Answered]) -> dict[str, float]:
    """The mean accuracy of episodes and the ends `low` and `high` of its 95 % interval."""
    right = [one.accuracy for one in each]
    mean, several = statistics.fmean(right), len(right) > 1
    wide = NORMAL * statistics.stdev(right) / math.sqrt(len(right)) if several else math.inf
    return {"accuracy": mean, "low": max(mean - wide, 0.0), "high": min(mean + wide, 1.0)}


def counts_of(episode: Encoded, answered: Answered, tagging: Tagging) -> Counts:
    """The counts of an episode's spans, those of windows of one text apart."""
    lengths = [len(row.at) for row in episode.variants[episode.support :]]
    paths = paths_of(answered.scores, lengths, tagging.transitions)
    gold, found = ([tagging.spans(own.tolist()) for own in side] for side in (answered.classes.split(lengths), paths))
    return span_metrics.count(gold, found, lengths)


def spans_of(
    scores: Tensor, windows: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], tagging: Tagging
) -> Spans:
    """The spans of each text, in words.

    Args:
        scores: of the words that are read [n, c], window by window.
        windows: of each text; the numbers of the words that are read in each of them. Others are outside.
        lengths: how many words each text has.
        tagging: what is looked for.
    """
    places, first = list[int](), 0
    for own, length in zip(windows, lengths, strict=True):
        places += [first + number for words in own for number in words]
        first += length
    every = torch.full((first, scores.shape[1]), -math.inf)
    every[:, 0] = 0.0
    every[places] = scores.log_softmax(-1)
    some = [n for n in lengths if n]
    paths = iter(paths_of(every, some, tagging.transitions) if some else ())
    return [tagging.spans(next(paths).tolist()) if n else [] for n in lengths]


def span_measures(
    gold: Sequence[Spans], found: Sequence[Spans], lengths: Sequence[Sequence[int]], legacy: bool
) -> dict[str, float]:
    """The measures of spans pooled over episodes, with the interval of their F1 (`low`, `high`)."""
    counts = [span_metrics.count(a, b, n, legacy) for a, b, n in zip(gold, found, lengths, strict=True)]
    low, high = span_metrics.interval(counts)
    right, said = ([text for own in side for text in own] for side in (gold, found))
    told = span_metrics.measures(right, said, [n for own in lengths for n in own], legacy)
    pooled = span_metrics.pooled(counts)
    return {**told, "precision": pooled.precision, "recall": pooled.recall, "f1": pooled.f1, "low": low, "high": high}
