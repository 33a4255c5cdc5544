"""Demonstrations in context (Brown et al. 2020): which answered examples a template's `{demos:k}` shows beside a text.

"seeded": the same for all texts, as many of each label, so that a causal backbone runs them once a batch. "nearest":
those whose mean state of the frozen backbone has the largest cosine with the text's (KATE, Liu et al. 2022, section 3).
A text is never its own demonstration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltaprompt.errors import ConfigError, DataError
from deltaprompt.templates import Demos
from deltaprompt.templates.filters import text_of
from deltaprompt.types import Example

MOST: Final = 1024  # rows of a pool whose nearest are looked for: all of them are kept with the adaptation
DECIMALS: Final = 6  # of a cosine: what rounding leaves open is settled by the order in which rows were drawn

T = TypeVar("T")
States = Callable[[Sequence[Example]], Tensor]  # examples -> their mean states [n, d]


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """A pool of answered examples, and how it is chosen from.

    Args:
        asked: how many, and by what.
        fields: those that the template uses; an example with the same texts in them is the same.
        words: of each label what stands at each `{mask}` of a demonstration.
        rows: as `drawn` gives them.
        states: what "nearest" compares.
    """

    asked: Demos
    fields: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]
    rows: tuple[Example, ...]
    states: States | None = None

    def as_json(self) -> list[dict[str, Any]]:
        """The rows; no states."""
        return [{"fields": dict(row.fields), "label": row.label} for row in self.rows]

    def seeded(self) -> Demonstrations:
        """The same pool for texts without content, of which none is nearest."""
        return replace(self, asked=replace(self.asked, by="seeded"))

    @torch.no_grad()
    def ranked(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """For each example the numbers of the rows that are shown to it, the one that stands nearest to it first."""
        own = [self._numbers.get(self._key(example)) for example in examples]
        if self.asked.by == "seeded":
            return [self._without(i) for i in own]
        if self.states is None:
            raise ConfigError(
                "demonstrations nearest to a text need a backbone to compare states of; give a model some"
            )
        cosines = normalize(self.states(examples).double(), dim=-1) @ self._normal.T  # [n, rows]
        for cosine, i in zip(cosines, own, strict=True):
            if i is not None:
                cosine[i] = -torch.inf
        order = cosines.round(decimals=DECIMALS).argsort(dim=-1, descending=True, stable=True)
        count = [min(self.asked.count, len(self.rows) - (i is not None)) for i in own]
        return [tuple(row[:n]) for row, n in zip(order.tolist(), count, strict=True)]

    def _without(self, own: int | None) -> tuple[int, ...]:
        """The first rows; in the place of an example's own the next one of its label, where there is one."""
        first = range(self.asked.count)
        if own is None or own not in first:
            return tuple(first)
        other = self._reserve.get(str(self.rows[own].label))
        return tuple(i if i != own else other for i in first if i != own or other is not None)  # type: ignore[misc]

    @cached_property
    def _reserve(self) -> dict[str, int]:
        """Of each label the first row after those that are shown."""
        later = range(len(self.rows) - 1, self.asked.count - 1, -1)
        return {str(self.rows[i].label): i for i in later}

    @cached_property
    def _numbers(self) -> dict[tuple[str, ...], int]:
        return {self._key(row): i for i, row in enumerate(self.rows)}

    @cached_property
    def _normal(self) -> Tensor:
        """The rows' states, each of length 1: [rows, d]."""
        assert self.states is not None
        return normalize(self.states(self.rows).double(), dim=-1)

    def _key(self, example: Example) -> tuple[str, ...]:
        return _texts(example, self.fields)


def drawn(asked: Demos, fields: Sequence[str], examples: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """Distinct examples, one of each label in turn, in an order that the seed draws; the first are those of "seeded".

    Of "seeded" there are, beside those that are shown, one more of each label; of "nearest" MOST, or all.

    Raises:
        ConfigError: fewer examples than the template shows.
        DataError: one has no label.
    """
    rows = _distinct(examples, fields)
    if len(rows) < asked.count:
        raise ConfigError(
            f"the template shows {asked.count} demonstrations, and {len(rows)} labelled examples that differ were "
            f"given; give more of them, or write {{demos:{max(len(rows), 1)}}}"
        )
    order = [rows[i] for i in _in_turn([str(row.label) for row in rows], seed)]
    if asked.by == "nearest":
        return tuple(order[:MOST])
    return (*order[: asked.count], *{row.label: row for row in reversed(order[asked.count :])}.values())


def from_json(rows: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    """The rows that `as_json` gave."""
    return tuple(Example(row["fields"], row["label"]) for row in rows)


def _texts(example: Example, fields: Sequence[str]) -> tuple[str, ...]:
    return tuple(text_of(example.fields, name) for name in fields)


def _distinct(examples: Sequence[Example], fields: Sequence[str]) -> list[Example]:
    """Each text once, with the label that it has first, and nothing but the fields that are used."""
    found: dict[tuple[str, ...], Example] = {}
    for i, example in enumerate(examples, 1):
        if len(example.gold) != 1:
            got = "several labels" if example.gold else "no label"
            raise DataError(f"example {i} has {got}, and a demonstration shows one; give examples with one label each")
        texts = _texts(example, fields)
        found.setdefault(texts, Example(dict(zip(fields, texts, strict=True)), example.gold[0]))
    return list(found.values())


def _in_turn(labels: Sequence[str], seed: int) -> list[int]:
    """Numbers of all, one of each label a round, in an order of its own each; labels that are used up are left out."""
    chance = Random(seed)
    queues = {
        label: _shuffled([i for i, other in enumerate(labels) if other == label], chance)
        for label in sorted(set(labels))
    }
    order = list[int]()
    while queues:
        order += [queues[label].pop() for label in _shuffled(list(queues), chance)]
        queues = {label: queue for label, queue in queues.items() if queue}
    return order


def _shuffled(items: Sequence[T], chance: Random) -> list[T]:
    """In an order drawn by `random()` alone, whose sequence Python keeps across versions."""
    return [item for _, _, item in sorted((chance.random(), i, item) for i, item in enumerate(items))]
