"""A data set as every method of a study sees it: the same support rows by shots and seed, the same test rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from deltaprompt.calibrations._base import spread
from deltaprompt.data import labels_of
from deltaprompt.data.samplers import dealt
from deltaprompt.errors import ConfigError, DataError, nearest
from deltaprompt.model.starting import unlabelled_of
from deltaprompt.trainer.plan import told
from deltaprompt.types import Example

Shots = int | Literal["all"]
Sets = tuple[Sequence[Example], Sequence[Example] | None]
Classes = npt.NDArray[np.int64]  # of test rows, by their place among the labels; -1 for what is none of them
NONE = -1


@dataclass(frozen=True)
class DataSet:
    """Labelled rows of one task.

    Args:
        name: its own.
        train: what support rows are drawn from.
        test: what is measured on.
        dev: rows to choose by; where there are none, others of the training rows are drawn.
        unlabelled: texts, for what needs no labels.
        labels: all there are; those of the training rows where not given.
        hold_out: whether training rows may be drawn to choose by.
        outside: texts that belong to none of the labels, from which methods tell the test rows; labels that they have
            are taken off.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    dev: Sequence[Example] | None = None
    unlabelled: Sequence[Example] = ()
    labels: tuple[str, ...] = ()
    hold_out: bool = True
    outside: Sequence[Example] = ()

    def __post_init__(self) -> None:
        if not self.test:
            raise DataError(f"{self.name}: there are no test rows; a comparison needs some")
        if not self.train:
            raise DataError(
                f"{self.name}: there are no training rows; give some, also where 0 shots alone are asked for"
            )
        if not self.labels:
            object.__setattr__(self, "labels", labels_of(self.train))
        if len(self.labels) < 2:
            raise DataError(f"{self.name}: all rows have the label {self.labels[0]!r}; give rows of two labels or more")
        object.__setattr__(self, "outside", tuple(unlabelled_of(self.outside)))
        for role, rows in (("training", self.train), ("test", self.test), ("dev", self.dev or ())):
            self._check(role, rows)

    def _check(self, role: str, rows: Sequence[Example]) -> None:
        """Every row has one label, which is known."""
        for number, row in enumerate(rows, 1):
            if row.labels:
                raise ConfigError(f"{self.name}: rows have several labels, and methods are compared by one label a row")
            if row.label not in self.labels:
                raise DataError(
                    f"{self.name}: {role} row {number} has the label {row.label!r}, which is not among the "
                    f"{len(self.labels)} of the training rows{nearest(str(row.label), self.labels)}"
                )

    @cached_property
    def digest(self) -> str:
        """12 hex digits of all rows, labels and what is drawn from."""
        parts = [told(rows) for rows in (self.train, self.test, self.dev or (), self.unlabelled)]
        others = [f"outside: {told(self.outside)}"] if self.outside else []
        return digest_of([*parts, *self.labels, str(self.hold_out), *others])

    @cached_property
    def gold(self) -> Classes:
        """The right class of every test row [n]."""
        return self.classes([str(row.label) for row in self.test])

    def classes(self, labels: Sequence[str]) -> Classes:
        """The classes of labels."""
        place = {label: i for i, label in enumerate(self.labels)}
        return np.array([place.get(label, NONE) for label in labels], dtype=np.int64)

    def limited(self, test_rows: int | None) -> DataSet:
        """The same with at most so many test rows, and so many texts outside, evenly spaced."""
        if test_rows is None:
            return self
        return replace(self, test=spread(self.test, test_rows), outside=spread(self.outside, test_rows))

    def draw(self, shots: Shots, seed: int, dev: bool) -> Sets:
        """Rows to train on and, with `dev`, rows to choose by; the first do not depend on whether there are others.

        Of 0 shots none. Of "all" a tenth of the rows is held out where there is no dev set, also from methods that do
        not look at it.
        """
        if shots == 0:
            return [], None
        count = None if shots == "all" else shots
        train, found = dealt(self.train, self.dev, count, seed, self.hold_out and (dev or count is None))
        return train, (found or None) if dev else None


def digest_of(parts: Sequence[str]) -> str:
    """12 hex digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def called(shots: Shots) -> str:
    """Shots as a person reads them."""
    return "all rows" if shots == "all" else f"{shots} shot{'s' * (shots != 1)}"
