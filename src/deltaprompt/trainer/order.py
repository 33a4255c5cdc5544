"""Chance: which rows a step sees, and what its dropout draws, are functions of the seed and of the step's number alone.

So a run that was killed goes on as if it had not been, wherever it starts again, and no generator's state is kept.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import numpy
import torch

from deltaprompt.errors import ConfigError
from deltaprompt.features.batching import bucketed, chunks

FEW = 4096  # rows up to which batches are drawn without regard to length: padding costs little, variety is worth more


def mixed(*numbers: int) -> int:
    """One number of 56 bits from several."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


class Order:
    """The rows of every optimizer step, in the batches that go through the backbone at once."""

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        accumulate: int,
        seed: int,
        classes: Sequence[int | None] = (),
        per_class: int | None = None,
    ) -> None:
        if per_class is not None and (not classes or None in classes):
            raise ConfigError(
                f"per_class = {per_class}: rows of one class stand together where each has one; leave it out"
            )
        self.lengths = lengths
        self.batch_size = batch_size
        self.rows = batch_size * accumulate
        self.seed = seed
        self.classes, self.per_class = classes, per_class
        self.epoch = -(-len(lengths) // self.rows)  # steps of one pass
        self._drawn: tuple[int, list[list[int]]] = (-1, [])

    def batches(self, step: int) -> list[list[int]]:
        """The batches of the step of that number, from 0."""
        number, at = divmod(step, self.epoch)
        if self._drawn[0] != number:
            self._drawn = (number, self._draw(mixed(self.seed, number)))
        return chunks(self._drawn[1][at], self.batch_size)

    def _draw(self, seed: int) -> list[list[int]]:
        if self.per_class is not None:
            return chunks(together(self.classes, self.per_class, seed), self.rows)
        if len(self.lengths) > FEW:
            return bucketed(self.lengths, self.rows, seed)
        order = list(range(len(self.lengths)))
        random.Random(seed).shuffle(order)
        return chunks(order, self.rows)


def together(classes: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """All rows in an order where so many of one class follow one another, in time that grows with their number.

    A class's last group has what is left. So a batch of b rows has about b / count classes, and pairs of each.
    """
    chance, of_class = random.Random(seed), dict[Hashable, list[int]]()
    for row, own in enumerate(classes):
        of_class.setdefault(own, []).append(row)
    for rows in of_class.values():
        chance.shuffle(rows)
    groups = [group for rows in of_class.values() for group in chunks(rows, count)]
    chance.shuffle(groups)
    return [row for group in groups for row in group]


def draw_from(seed: int, device: torch.device) -> None:
    """PyTorch's own generators on the CPU and on the device start from that seed."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def chance_kept(device: torch.device) -> Iterator[None]:
    """After it the caller's generators (torch's, numpy's, Python's) are where they were."""
    python, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(of_numpy)
