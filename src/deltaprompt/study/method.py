"""What a study asks of a method: what it is on a data set, and what it answers after so many shots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaprompt.study.data import Classes, DataSet, Shots


@dataclass(frozen=True)
class Entry:
    """A method on a data set."""

    settings: Mapping[str, Any]  # all that its answers depend on beside data, backbone and seed, as JSON
    backbone: str  # the fingerprint; empty where it is none of ours
    zero_shot: bool = False  # whether it answers without examples
    learns: bool = True  # whether it answers otherwise with examples

    def answers(self, shots: Shots) -> bool:
        """Whether it is asked after so many shots."""
        return self.zero_shot if shots == 0 else self.learns


@dataclass(frozen=True)
class Outcome:
    """What a method came to from one seed."""

    found: Classes  # of every test row [n]
    cpu_seconds: float  # of its training
    trainable: int | None  # numbers that were trained; None where nobody knows
    bytes: int | None  # of what is kept of it
    auroc: float | None = None  # how well it tells test rows from texts outside; None where there are none


class Method(ABC):
    """A way to learn from examples and to answer."""

    name: str
    together: int  # seeds that it is given at once

    @abstractmethod
    def entry(self, data: DataSet) -> Entry:
        """What it is on a data set.

        Raises:
            DeltaPromptError: it can never run there: a template without its fields, a delta without a site, ….
        """

    @abstractmethod
    def ready(self) -> None:
        """Raises where it cannot run on this machine. Asked once, when something is to be computed."""

    @abstractmethod
    def run(self, data: DataSet, shots: Shots, seeds: Sequence[int]) -> Sequence[Outcome | str]:
        """What it comes to from each seed, or why a seed failed; `together` seeds at most."""
