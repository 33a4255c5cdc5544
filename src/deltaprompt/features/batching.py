"""Sequences of about one length together: `sum of (longest in batch − length)` small, each index exactly once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError, DataError

WINDOW: Final = 50  # batches that are sorted together when shuffled: little padding, and still much chance


def bucketed(lengths: Sequence[int], batch_size: int, seed: int | None = None) -> list[list[int]]:
    """Batches of indices: longest first without a seed; with one shuffled, sorted by length within windows."""
    order = list(range(len(lengths)))
    if seed is None:
        return chunks(_by_length(order, lengths), batch_size)
    chance = random.Random(seed)
    chance.shuffle(order)
    windows = chunks(order, WINDOW * batch_size)
    batches = [batch for window in windows for batch in chunks(_by_length(window, lengths), batch_size)]
    chance.shuffle(batches)
    return batches


def _by_length(order: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(order, key=lambda i: -lengths[i])


def chunks(order: Sequence[int], size: int) -> list[list[int]]:
    """The indices in that order, `size` at a time."""
    if size < 1:
        raise ConfigError(f"a batch has at least one row, got batch_size {size}")
    return [list(order[i : i + size]) for i in range(0, len(order), size)]


def padded(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Lists of ids -> `[rows, longest]`, filled up with `value` at the end or at the start."""
    longest = max((len(row) for row in rows), default=0)
    gaps = [[value] * (longest - len(row)) for row in rows]
    whole = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(whole, dtype=torch.long).reshape(len(rows), longest)


def attended(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """The attention mask of `padded(rows, …)`: 1 on tokens, 0 on padding."""
    return padded([[1] * len(row) for row in rows], 0, left)


def shifted(places: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """Positions in each row -> positions in the padded rows, `[rows, most]`, -1 where a row has fewer."""
    longest = max((len(row) for row in rows), default=0)
    moved = [[p + (longest - len(row) if left else 0) for p in at] for at, row in zip(places, rows, strict=True)]
    return padded(moved, -1)


def answers(texts: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor] | None:
    """Texts of the classes of rows -> ids [b, c, t], filled up with 0, and lengths [b, c]; None where there is none."""
    if not texts or not texts[0]:
        return None
    ids = padded([text for row in texts for text in row], 0)
    return ids.unflatten(0, (len(texts), -1)), torch.tensor([[len(text) for text in row] for row in texts])


def classes(labels: Sequence[int | tuple[int, ...] | None], count: int = 0) -> Tensor | None:
    """The classes of rows [b]; where each has several, which of `count` are right [b, c]. None where no row has one."""
    known = [label for label in labels if label is not None]
    if not known:
        return None
    if len(known) < len(labels):
        bare = len(labels) - len(known)
        raise DataError(f"{bare} of {len(labels)} rows have no label; give every row one, or none")
    if not isinstance(known[0], tuple):
        return torch.tensor(known, dtype=torch.long)
    return torch.stack([torch.zeros(count, dtype=torch.bool).scatter(0, torch.tensor(own), True) for own in known])
