"""A calibration takes a prior away: score = log p(answer | text) − log p̂(answer), normalised again.

The prior is measured once on the model, kept with it and saved. Where class scores are made of words' scores it is one
over these words, unless the calibration is about classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError
from deltaprompt.types import Example

T = TypeVar("T")


@dataclass(frozen=True)
class Calibration(ABC):
    """What every calibration has."""

    of_classes: ClassVar[bool]  # whether the prior is over classes also where there are words
    needs_texts: ClassVar[bool]  # whether it needs texts of the task, for which no labels are needed

    @abstractmethod
    def template(self) -> str | None:
        """The template whose answers are the prior; none for the task's own."""

    @abstractmethod
    def inputs(self, fields: Sequence[str], texts: Sequence[Example]) -> Sequence[Example]:
        """What fills the template: of its fields and of texts of the task."""

    @abstractmethod
    def prior(self, log_p: Tensor) -> Tensor:
        """log p̂ [u] from normalised log-probabilities of the answers to each input [n, u]."""


def mean_probability(log_p: Tensor) -> Tensor:
    """log of the mean of p: [n, u] -> [u]."""
    return log_p.logsumexp(0) - torch.tensor(float(len(log_p))).log()


def filled(fields: Sequence[str], text: str) -> Example:
    """One text in every field."""
    found: Mapping[str, str] = dict.fromkeys(fields, text)
    return Example(found)


def some(texts: Sequence[Example], size: int, what: str) -> Sequence[Example]:
    """At most so many of the texts."""
    if not texts:
        raise ConfigError(
            f"{what} calibration needs texts of the task; give model.calibrate(examples) some, labelled or not"
        )
    return spread(texts, size)


def spread(texts: Sequence[T], size: int) -> Sequence[T]:
    """At most so many of the texts, evenly spaced, since those of one label may stand together."""
    return texts if len(texts) <= size else [texts[i * len(texts) // size] for i in range(size)]
