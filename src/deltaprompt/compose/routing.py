"""Which slot each row of the running forward pass belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

Index = int | Tensor | None  # one slot for all rows, or a slot for each row [rows]; None is slot 0


class Routing:
    """Which slot each row of the running forward pass belongs to; shared by all patches of an `Adapted`."""

    def __init__(self) -> None:
        self.index: Index = None
        self.each = 1  # rows that one row of `index` may stand for, which follow one another

    @contextmanager
    def at(self, index: Index, each: int = 1) -> Iterator[None]:
        """Within it the rows belong to `index`, in the passes that see every row `each` times too."""
        kept, self.index, self.each = (self.index, self.each), index, each
        try:
            yield
        finally:
            self.index, self.each = kept
