"""Ours beside a peer's. What is timed takes turns within one process, so a machine's drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A peer's time (size) over ours, round by round: above 1 we are faster (smaller)."""

    name: str
    ours: float  # median
    peer: float
    ratio: float  # median of the rounds' ratios
    low: float
    high: float
    unit: str = "ms"

    @classmethod
    def of_sizes(cls, name: str, ours: float, peer: float, unit: str = "MB") -> Pair:
        """Two sizes, which are the same in every round."""
        return cls(name, ours, peer, *[peer / ours] * 3, unit=unit)

    def as_json(self) -> dict[str, object]:
        """The entry of results.json."""
        return {
            "ours": self.ours,
            "peer": self.peer,
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "unit": self.unit,
        }


def turns(runs: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Milliseconds of every run in every round; the order within a round turns about.

    What a run returns is called, untimed, where it can be: it clears up.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        names = list(runs) if number % 2 else list(reversed(runs))
        for name in names:
            start = time.perf_counter()
            left = runs[name]()
            took = (time.perf_counter() - start) * 1000
            if callable(left):
                left()
            if number >= warm_up:
                times[name].append(took)
    return times


def pair(name: str, ours: list[float], peer: list[float]) -> Pair:
    """The pair of two lists of times from the same rounds."""
    ratios = sorted(p / o for o, p in zip(ours, peer, strict=True))
    middle = statistics.median
    return Pair(name, middle(ours), middle(peer), middle(ratios), ratios[0], ratios[-1])
