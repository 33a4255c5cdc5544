"""Cells of a study (a method, a data set, shots, a seed), a line each in a file, so that none is computed twice.

A line has all that tells the cell from others and all that it came to. One that a kill cut off is skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deltaprompt.errors import StoreError
from deltaprompt.model.label_metrics import macro_f1
from deltaprompt.study.data import Classes, DataSet, Shots, digest_of
from deltaprompt.study.method import Entry, Outcome

FILE = "cells.jsonl"


@dataclass(frozen=True)
class Key:
    """What tells a cell from any other."""

    method: str
    data: str
    shots: Shots
    seed: int
    settings: str  # a digest of the method's
    rows: str  # a digest of the data set's
    backbone: str  # its fingerprint
    test_rows: int


@dataclass(frozen=True)
class Cell:
    """What a method came to on a data set after so many shots, from one seed."""

    key: Key
    found: tuple[int, ...]  # the class of every test row, by its place among the labels; -1 for none of them
    right: str  # which test rows are right: a bit each, the first the highest of the first byte, in hexadecimal
    accuracy: float
    macro_f1: float
    cpu_seconds: float
    trainable: int | None
    bytes: int | None
    auroc: float | None = None  # lines from before there was one lack it

    @classmethod
    def of(cls, key: Key, data: DataSet, outcome: Outcome) -> Cell:
        """Of an outcome on a data set's test rows."""
        right = outcome.found == data.gold
        cost = (round(outcome.cpu_seconds, 4), outcome.trainable, outcome.bytes)
        return cls(
            key,
            tuple(outcome.found.tolist()),
            np.packbits(right).tobytes().hex(),
            float(right.mean()),
            _macro_f1(data, outcome.found.tolist()),
            *cost,
            outcome.auroc,
        )

    @cached_property
    def classes(self) -> Classes:
        """The class of every test row [n]."""
        return np.array(self.found, dtype=np.int64)


def key_of(method: str, entry: Entry, data: DataSet, shots: Shots, seed: int) -> Key:
    """The key of a cell."""
    settings = digest_of([json.dumps(entry.settings, sort_keys=True, default=str)])
    return Key(method, data.name, shots, seed, settings, data.digest, entry.backbone, len(data.test))


class Kept:
    """The cells in a folder's file, and those of this run; without a folder only these.

    Args:
        folder: is made where it does not exist.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / FILE
        self.cells: dict[Key, Cell] = {}
        self.skipped = 0  # lines that could not be read
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else []
        except OSError as e:
            raise StoreError(f"{self.path.parent} cannot be a folder of results ({e}); give another --out") from e
        for line in filter(None, lines):
            self._take(line)

    def _take(self, line: str) -> None:
        try:
            cell = _cell(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            self.skipped += 1
        else:
            self.cells[cell.key] = cell

    def add(self, cell: Cell) -> None:
        """Keeps a cell; the line is on the disk when this returns."""
        self.cells[cell.key] = cell
        if self.path is None:
            return
        told = asdict(cell)
        line = json.dumps({**told.pop("key"), **told}, ensure_ascii=False).encode()
        with self.path.open("a+b") as file:
            file.seek(max(file.tell() - 1, 0))
            cut = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * cut + line + b"\n")  # a line that was cut off stays one by itself
            file.flush()
            os.fsync(file.fileno())


def _cell(told: Mapping[str, Any]) -> Cell:
    """The cell of a line."""
    key = Key(**{f.name: told[f.name] for f in fields(Key)})
    rest = {f.name: told[f.name] for f in fields(Cell)[2:] if f.name in told or f.name != "auroc"}
    cell = Cell(key, tuple(told["found"]), **rest)
    if len(cell.found) != key.test_rows:
        raise ValueError("it is not of all test rows")
    return cell


def _macro_f1(data: DataSet, found: Sequence[int]) -> float:
    gold = [[c] for c in data.gold.tolist()]
    return macro_f1(len(data.labels), gold, [[c] if c >= 0 else [] for c in found])
