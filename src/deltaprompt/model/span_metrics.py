"""How well spans are found: precision, recall and F1 of counts that are pooled over texts and episodes, F1 taken once.

A span is right where its start, end and label are. Few-NERD's analysis of errors (Ding et al. 2021) is of words (FP:
found where nothing is, FN: missed) and of spans with both ends right (Within: the right coarse label and the wrong fine
one, Outer: the wrong coarse one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby

import numpy as np

from deltaprompt.data.tags import OUTSIDE, tags_of
from deltaprompt.errors import ConfigError
from deltaprompt.hierarchy import way
from deltaprompt.types import Span

Spans = Sequence[Sequence[Span]]  # of each text


@dataclass(frozen=True, slots=True)
class Counts:
    """Spans that are right both in label and place, all that were found, and all that there are."""

    right: int = 0
    found: int = 0
    gold: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.right + other.right, self.found + other.found, self.gold + other.gold)

    @property
    def precision(self) -> float:
        """The share of the found ones that are right; 0 where none was found."""
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """The share of those there are that were found; 0 where there are none."""
        return self.right / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """2 · right / (found + gold), the harmonic mean of both."""
        return 2 * self.right / (self.found + self.gold) if self.found + self.gold else 0.0


@dataclass(frozen=True, slots=True)
class Errors:
    """Few-NERD's analysis, in counts: of words, and of spans whose start and end are right."""

    false_positive: int = 0  # words found in a span that are in none
    false_negative: int = 0
    words: int = 0
    within: int = 0
    outer: int = 0
    placed: int = 0  # spans with both ends right, whatever their label

    def __add__(self, other: Errors) -> Errors:
        return Errors(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def rates(self) -> dict[str, float]:
        """`{"fp", "fn"}`, shares of all words, and `{"within", "outer"}`, shares of the spans with both ends right."""
        words, placed = max(self.words, 1), max(self.placed, 1)
        return {
            "fp": self.false_positive / words,
            "fn": self.false_negative / words,
            "within": self.within / placed,
            "outer": self.outer / placed,
        }


def measures(gold: Spans, found: Spans, lengths: Sequence[int], legacy: bool = False) -> dict[str, float]:
    """`precision`, `recall` and `f1` of all spans, `macro_f1` over labels, and the rates of `Errors`.

    Args:
        gold: the right spans of each text, in words (`deltaprompt.data.tagged.in_words`).
        found: those that a model found.
        lengths: how many words each text has.
        legacy: whether to count as Few-NERD's code does; see `flattened`.
    """
    counts, each = count(gold, found, lengths, legacy), by_label(gold, found, lengths, legacy)
    macro = sum(own.f1 for own in each.values()) / max(len(each), 1)
    told = {"precision": counts.precision, "recall": counts.recall, "f1": counts.f1, "macro_f1": macro}
    return told | errors(gold, found, lengths, legacy).rates


def count(gold: Spans, found: Spans, lengths: Sequence[int], legacy: bool = False) -> Counts:
    """The counts of these texts; of an episode's queries, to be added to those of others."""
    pairs = _pairs(gold, found, lengths, legacy)
    return pooled(Counts(len(right & said), len(said), len(right)) for right, said, _ in pairs)


def by_label(gold: Spans, found: Spans, lengths: Sequence[int], legacy: bool = False) -> dict[str, Counts]:
    """The counts of each label that is right or found somewhere, sorted."""
    each: dict[str, Counts] = {}
    for right, said, _ in _pairs(gold, found, lengths, legacy):
        for span in right | said:
            own = Counts(int(span in right and span in said), int(span in said), int(span in right))
            each[span.label] = each.get(span.label, Counts()) + own
    return dict(sorted(each.items()))


def errors(gold: Spans, found: Spans, lengths: Sequence[int], legacy: bool = False) -> Errors:
    """Few-NERD's analysis of errors; coarse is "person" of "person-actor", and a label of no path itself."""
    told = Errors()
    for right, said, length in _pairs(gold, found, lengths, legacy):
        inside, claimed = ({i for s in spans for i in range(s.start, s.end)} for spans in (right, said))
        labels = {span[:2]: span.label for span in right}
        placed = [(labels[span[:2]], span.label) for span in said if span[:2] in labels]
        wrong = [way(is_)[0] == way(was)[0] for is_, was in placed if is_ != was]
        told += Errors(
            len(claimed - inside), len(inside - claimed), length, sum(wrong), len(wrong) - sum(wrong), len(placed)
        )
    return told


def interval(episodes: Sequence[Counts], seed: int = 0, draws: int = 1000, share: float = 0.95) -> tuple[float, float]:
    """The pooled F1's confidence interval: percentiles of as many episodes drawn anew (Efron 1979), `draws` times.

    Args:
        episodes: the counts of each.
        seed: of the draws.
        draws: how often.
        share: of the draws that lie in the interval.
    """
    if not episodes or draws < 1 or not 0 < share < 1:
        raise ConfigError(
            f"got {len(episodes)} episodes, draws={draws}, share={share}; possible: one episode or more, draws >= 1, "
            "share between 0 and 1"
        )
    table = np.array([(own.right, own.found + own.gold) for own in episodes])  # [e, 2]
    n = len(episodes)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)  # [draws, e]
    right, both = (times @ table).T
    low, high = np.quantile(2 * right / np.maximum(both, 1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def pooled(episodes: Iterable[Counts]) -> Counts:
    """The counts of all episodes together, whose F1 is the one to report."""
    return sum(episodes, Counts())


def flattened(spans: Spans, lengths: Sequence[int]) -> list[Span]:
    """The spans of all texts in one sequence of words, as runs of one label.

    Few-NERD's code reads its spans off such a sequence. A span that ends a text and one of the same label that begins
    the next are one there, and so are neighbours of one label within a text.
    """
    tags = [tag for own, length in zip(spans, lengths, strict=True) for tag in tags_of(own, length, "io")]
    found, start = list[Span](), 0
    for label, run in groupby(tags):
        end = start + sum(1 for _ in run)
        if label != OUTSIDE:
            found.append(Span(start, end, label))
        start = end
    return found


def _pairs(
    gold: Spans, found: Spans, lengths: Sequence[int], legacy: bool
) -> list[tuple[frozenset[Span], frozenset[Span], int]]:
    """The right spans, the found ones and the number of words of each text, or of all texts as one."""
    if not len(gold) == len(found) == len(lengths):
        raise ConfigError(
            f"{len(gold)} texts with right spans, {len(found)} with found ones and {len(lengths)} lengths; each text "
            "has one of each"
        )
    if legacy:
        return [(frozenset(flattened(gold, lengths)), frozenset(flattened(found, lengths)), sum(lengths))]
    return [(frozenset(a), frozenset(b), n) for a, b, n in zip(gold, found, lengths, strict=True)]
