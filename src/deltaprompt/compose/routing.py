"""Which slot each row of the running forward pass belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError
from deltaprompt.params import Weights

Index = int | Tensor | None  # one slot for all rows, or a slot for each row [rows]; None is slot 0
Gathered = tuple[Index, int, Weights]  # of that index and so many rows


class Routing:
    """Which slot each row of the running forward pass belongs to; shared by all patches of an `Adapted`."""

    def __init__(self) -> None:
        self.index: Index = None
        self.rows: Tensor | None = None  # those of a batch [m] that `index` [m] speaks of; None for all of them
        self.of = 0  # rows in the batch, where `rows` are given
        self.each = 1  # rows that one row of `index` may stand for, which follow one another
        self.resting = False  # whether no row of the batch belongs here
        self.gathered: dict[object, Gathered] | None = None  # what each patch's maths sees, where rows stay the same

    @contextmanager
    def at(self, index: Index, each: int = 1) -> Iterator[None]:
        """Within it the rows belong to `index`, in the passes that see every row `each` times too."""
        kept = (self.index, self.each, self.rows, self.resting)
        self.index, self.each, self.rows, self.resting = index, each, None, False
        try:
            yield
        finally:
            self.index, self.each, self.rows, self.resting = kept

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Within it the slots of the rows stay as they are from pass to pass: each patch gathers its tensors once."""
        kept, self.gathered = self.gathered, {}
        try:
            yield
        finally:
            self.gathered = kept

    def among(self, of: int, rows: Tensor, index: Tensor) -> None:
        """Of a batch of `of` rows that several `Adapted`s serve, these rows belong here, in these slots."""
        self.of, self.rows, self.index, self.resting = of, None if len(rows) == of else rows, index, False

    def rest(self) -> None:
        """No row of the passes to come belongs here."""
        self.rows, self.index, self.resting = None, None, True


def slots_of(index: Index, rows: Tensor) -> Index:
    """The slot of each of these rows [n] of a batch, or the one of all."""
    return index[rows] if isinstance(index, Tensor) else index


def check_slot(index: Index, slots: int) -> None:
    """An error where `index` names something else than slots that there are."""
    if index is None or torch.compiler.is_compiling():
        return
    if isinstance(index, bool) or not isinstance(index, int | Tensor):
        raise ConfigError(f"adaptation is a number, or a tensor of one a row, and not {index!r}")
    if isinstance(index, int):
        low = high = index
    elif index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool or not len(index):
        kind = str(index.dtype).removeprefix("torch.")
        raise ConfigError(f"one adaptation a row is a tensor of whole numbers [rows]; got {kind} {list(index.shape)}")
    else:
        low, high = (int(end) for end in index.aminmax())
    if low < 0 or high >= slots:
        raise ConfigError(f"adaptation {low if low < 0 else high} was named; 0 to {slots - 1} are possible")
