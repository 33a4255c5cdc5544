"""Adaptations with the same deltas, of whatever width: one stack of tensors, a slot each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta, Padded
from deltaprompt.errors import StoreError
from deltaprompt.registry import describe


def sort_of(deltas: Sequence[Delta]) -> str:
    """What adaptations of one group have in common: their deltas, but for the options that may differ there."""
    return json.dumps([{n: v for n, v in describe("deltas", d).items() if n not in _free(d)} for d in deltas])


def _free(delta: Delta) -> tuple[str, ...]:
    return (delta.width, *delta.free) if isinstance(delta, Padded) else ()


class Group:
    """A stack of adaptations on a backbone, which rests but where a pass says which rows are whose."""

    def __init__(self, backbone: Backbone, deltas: Sequence[Delta], slots: int) -> None:
        self.deltas = tuple(deltas)
        self.adapted = Adapted(backbone, deltas).eval()
        self._free = [0]
        try:
            self.adapted.routing.rest()
            self.adapted.tell_layouts()
            self.parts = dict(self.adapted.parts())
            self.make_room(slots)
        except BaseException:  # memory that runs out, for one
            self.remove()
            raise

    @classmethod
    def of(cls, backbone: Backbone, wanted: Sequence[Sequence[Delta]], before: Group | None = None) -> Group:
        """A group for these adaptations and those of a narrower one, as wide as the widest."""
        sorts = [*wanted, before.deltas] if before is not None else wanted
        deltas = [_widest([each[number] for each in sorts]) for number in range(len(sorts[0]))]
        return cls(backbone, deltas, len(wanted) + (before.used if before is not None else 0))

    @property
    def used(self) -> int:
        """Slots that hold an adaptation."""
        return self.adapted.slots - len(self._free)

    def holds(self, wanted: Sequence[Sequence[Delta]]) -> bool:
        """Whether the group is as wide as all of these."""
        return all(_width(own) >= _width(d) for each in wanted for own, d in zip(self.deltas, each, strict=True))

    def make_room(self, slots: int) -> None:
        """That many free slots, at least; one more costs the same on average, however many there are."""
        if (more := slots - len(self._free)) > 0:
            first = self.adapted.slots
            self.adapted.grow(more)
            self._free = [*range(first + more - 1, first - 1, -1), *self._free]

    @torch.no_grad()
    def take(self, deltas: Sequence[Delta], saved: Mapping[str, Tensor]) -> int:
        """Writes an adaptation's tensors into a free slot; which one that is."""
        if saved.keys() != self.parts.keys():
            odd = sorted(saved.keys() ^ self.parts.keys())
            raise StoreError(f"the saved tensors are not those of its deltas ({odd[0]!r} and {len(odd) - 1} more)")
        wide = self._as_wide(deltas, saved)
        for name, tensor in wide.items():
            if not self._fits(deltas, name, tensor):
                raise StoreError(f"the saved tensor {name!r} has shape {list(tensor.shape)}, which does not fit")
        slot = self._free.pop()
        for name, tensor in wide.items():
            place = self.parts[name][slot]
            if place.shape == tensor.shape:
                place.copy_(tensor)
            else:
                short = [of - n for n, of in zip(tensor.shape, place.shape, strict=True)]
                place.copy_(functional.pad(tensor, [side for n in reversed(short) for side in (0, n)]))
        return slot

    def _fits(self, deltas: Sequence[Delta], name: str, tensor: Tensor) -> bool:
        """Whether a tensor has the shape of its place, but where a delta is narrower than the group's."""
        number, place = int(name.partition(".")[0]), self.parts[name].shape[1:]
        narrow, wide = _width(deltas[number]), _width(self.deltas[number])
        return tensor.ndim == len(place) and all(
            n == of or (n, of) == (narrow, wide) for n, of in zip(tensor.shape, place, strict=True)
        )

    def _as_wide(self, deltas: Sequence[Delta], saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors as the group's own, wider deltas need them."""
        found = dict(saved)
        for number, (own, wide) in enumerate(zip(deltas, self.deltas, strict=True)):
            if own == wide or not isinstance(own, Padded):
                continue
            for site, tensors in _by_site(saved, number).items():
                found |= {f"{site}.{n}": t for n, t in own.as_wide(cast(Any, wide), tensors).items()}
        return found

    def take_over(self, other: Group, slot: int) -> int:
        """An adaptation of a narrower group comes here; its slot."""
        return self.take(other.deltas, {name: t[slot] for name, t in other.parts.items()})

    @torch.no_grad()
    def give_back(self, slot: int) -> None:
        """A slot is free again, and empty."""
        for tensor in self.parts.values():
            tensor[slot].zero_()
        self._free.append(slot)

    def remove(self) -> None:
        """Takes the group's deltas off the backbone."""
        self.adapted.remove()


def _by_site(saved: Mapping[str, Tensor], number: int) -> Mapping[str, Mapping[str, Tensor]]:
    """Of a delta's stored tensors, those of each site by their own names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        if name.startswith(f"{number}."):
            site, _, own = name.rpartition(".")
            found.setdefault(site, {})[own] = tensor
    return found


def _width(delta: Delta) -> int:
    return int(vars(delta)[delta.width]) if isinstance(delta, Padded) else 0


def _widest(deltas: Sequence[Delta]) -> Delta:
    """The widest of deltas of one sort, without what only training asks for."""
    widest = max(deltas, key=_width)
    return replace(widest, dropout=0.0) if "dropout" in _free(widest) else widest  # type: ignore[call-arg]
