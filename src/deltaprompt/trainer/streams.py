"""Chance in a pass that several courses share: each draws its dropout as it would alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deltaprompt.features import Encoded
from deltaprompt.params import drawn_by
from deltaprompt.trainer.order import draw_from

Span = tuple[int, int]  # rows of the pass: the first, and the one behind the last


@dataclass(frozen=True)
class Shares:
    """What of a pass belongs to each course: its rows, and the columns that its batch would have alone."""

    rows: Sequence[Span]
    widths: Sequence[Sequence[int]]  # of the texts and, in an encoder-decoder, of the answers; one a course
    left: bool  # whether rows are padded on the left

    @classmethod
    def of(cls, batches: Sequence[Sequence[Encoded]], left: bool) -> Shares:
        """Of the courses' batches, one behind another."""
        rows, end = list[Span](), 0
        for batch in batches:
            start, end = end, end + sum(len(one.variants) for one in batch)
            rows.append((start, end))
        every = [[row for one in batch for row in one.variants] for batch in batches]
        texts = [max(len(row.ids) for row in own) for own in every]
        answers = [max(len(row.decoder or ()) for row in own) for own in every]
        return cls(rows, (texts, answers), left)

    def inside(self, shape: torch.Size) -> list[tuple[slice, slice]]:
        """Where in a tensor [b, s, …] each course's own numbers lie; rows may stand for several that follow it."""
        each, odd = divmod(shape[0], self.rows[-1][1])
        if odd:
            return [(slice(None), slice(None))]  # what all rows share
        widths = next((own for own in self.widths if each == 1 and max(own) == shape[1]), [shape[1]] * len(self.rows))
        columns = (slice(shape[1] - n, None) if self.left else slice(0, n) for n in widths)
        return [(slice(a * each, b * each), c) for (a, b), c in zip(self.rows, columns, strict=True)]


class Streams:
    """A generator's state for each course of a step, which goes on from pass to pass."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generator = _generator(device)
        self.states = list[Tensor]()
        self.known: dict[int, list[Tensor]] = {}
        for seed in seeds:
            draw_from(seed, device)
            self.states.append(self.generator.get_state())
        draw_from(0, device)  # for what names the draws

    @contextmanager
    def over(self, courses: Sequence[int], shares: Shares) -> Iterator[None]:
        """Within it dropout is drawn for these courses, by number, each for its share."""

        def noise(x: Tensor, p: float) -> Tensor:
            return self._noise(x, p, courses, shares)

        with drawn_by(noise):
            yield

    @torch.no_grad()
    def _noise(self, x: Tensor, p: float, courses: Sequence[int], shares: Shares) -> Tensor:
        """What x is multiplied with; 0 at padding. A layer that is computed again meets what it met before.

        A number from PyTorch's own generator names the draw, since checkpointing puts that generator back.
        """
        name = int(torch.randint(2**62, ()))
        again = name in self.known
        before = self.known.setdefault(name, list(self.states))
        found, own = torch.zeros_like(x), self.generator.get_state()
        for course, where in zip(courses, shares.inside(x.shape), strict=False):
            self.generator.set_state(before[course])
            found[where] = functional.dropout(torch.ones_like(found[where], memory_format=torch.contiguous_format), p)
            if not again:
                self.states[course] = self.generator.get_state()
        self.generator.set_state(own)
        return found


def _generator(device: torch.device) -> torch.Generator:
    """The one that PyTorch's own dropout draws from there."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
