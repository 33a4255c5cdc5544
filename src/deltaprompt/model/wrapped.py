"""A model within another that asks something else of its backbone: what it learns, and how it is kept, stay its own."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from deltaprompt.deltas._base import Delta
from deltaprompt.features import Features
from deltaprompt.model.model import Model
from deltaprompt.model.reader import Reader
from deltaprompt.model.trainable import Trainable
from deltaprompt.types import Batch


class Wrapped(Trainable, ABC):
    """What a model has that another one asks in its own way."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.backbone = model.backbone
        self.adapted = model.adapted

    @property
    def once(self) -> Callable[[Batch], Tensor] | None:  # of the model, whose states are read
        """While it trains: reads states, of which it keeps some."""
        return self.model.once

    @once.setter
    def once(self, reads: Callable[[Batch], Tensor] | None) -> None:
        self.model.once = reads

    @property
    def chosen(self) -> tuple[Delta, ...]:
        """The task's deltas."""
        return self.model.chosen

    @property
    def features(self) -> Features:
        """How texts become token ids."""
        return self.model.features

    def reader(self, slot: int = 0) -> Reader:
        """How an adaptation's texts are read and scored."""
        return self.model.reader(slot)

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable tensor by stored name."""
        return self.model.parts()

    def slot_parts(self, slot: int = 0) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Every tensor that an adaptation has a part of, by stored name, and which part it is."""
        return self.model.slot_parts(slot)

    def stored(self, slot: int = 0) -> dict[str, Tensor]:
        """What is kept of one slot, by stored name."""
        return self.model.stored(slot)
