"""Examples as token ids: the sequences that the backbone sees, where they are read, and what they are to give."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: its ids, the positions in the states that are read, and an encoder-decoder's start of an answer."""

    ids: list[int]
    at: list[int]
    decoder: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: a sequence for each number of masks that answers need, and the class or the ids to be generated."""

    variants: tuple[Row, ...]
    label: int | None = None
    targets: tuple[int, ...] = ()  # the ids that the states at the one sequence's `at` are to give
    parts: tuple[int, ...] = ()  # of several texts in one sequence: the length of each
    labels: tuple[int, ...] = ()  # the classes, where there may be several
    support: int = 0  # of an episode: the sequences that are learned from; the targets are the classes of all
    answers: tuple[tuple[int, ...], ...] = ()  # of each class the ids of its text in this example

    @property
    def length(self) -> int:
        """The length of the longest sequence."""
        return max(len(row.ids) for row in self.variants)

    @property
    def weight(self) -> int:
        """How much it counts in a mean loss: once, or once for each id to be generated; an episode once."""
        return 1 if self.support else len(self.targets) or 1
