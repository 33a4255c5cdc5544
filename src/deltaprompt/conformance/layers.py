"""Which layers of a config's many a tiny model keeps: one of every sort, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Kept:
    """The numbers of the layers that are kept, of a config's `depth`."""

    depth: int
    layers: tuple[int, ...]

    def count(self, first: int) -> int:
        """How many of a model's `first` layers a tiny model has: in proportion, at least one, not all if not all."""
        if first <= 0 or first >= self.depth:
            return min(first, len(self.layers))
        return min(max(round(first * len(self.layers) / self.depth), 1), len(self.layers) - 1)

    def of(self, values: Sequence[Any]) -> list[Any]:
        """A list with one value a layer, or one of layers' numbers, as it is for the kept layers."""
        if len(values) == self.depth and not is_numbers(values, self.depth):
            return [values[i] for i in self.layers]
        return [new for new, old in enumerate(self.layers) if old in values]


def kept_layers(lists: Mapping[str, Sequence[Any]], depth: int, least: int, each: int) -> Kept:
    """The first layer of every sort, as all lists that speak of layers tell it; the last one too if `each` is 2."""
    sorts = [tuple(str(sort) for v in lists.values() for sort in _at(v, i, depth)) for i in range(depth)]
    chosen = set({sort: i for i, sort in reversed(list(enumerate(sorts)))}.values())
    chosen |= set({sort: i for i, sort in enumerate(sorts)}.values()) if each > 1 else set()
    spare = [i for i in range(depth - 1, -1, -1) if i not in chosen]
    return Kept(depth, tuple(sorted(chosen | set(spare[: max(least - len(chosen), 0)]))))


def speaks_of_layers(name: str, values: object, depth: int) -> bool:
    """Whether a list has one value a layer, or holds numbers of layers."""
    if not isinstance(values, list | tuple) or not values or depth < 2:
        return False
    about = any(word in name for word in ("layer", "idx", "ids", "index"))
    return len(values) == depth or (about and is_numbers(values, depth))


def is_numbers(values: Sequence[Any], depth: int) -> bool:
    """Whether these are layers' numbers: whole, rising, below the depth."""
    whole = all(type(v) is int and 0 <= v < depth for v in values)
    return whole and all(a < b for a, b in pairwise(values))


def _at(values: Sequence[Any], layer: int, depth: int) -> list[Any]:
    if is_numbers(values, depth):
        return [layer in values]
    value = values[layer]
    return [] if isinstance(value, float) else [value]
