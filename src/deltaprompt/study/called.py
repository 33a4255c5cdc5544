"""Another library's way: a function that is given the examples, in a process of its own, and gives labels back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaprompt.errors import ConfigError, DataError, TrainingError, nearest
from deltaprompt.study import calling
from deltaprompt.study.data import DataSet, Shots
from deltaprompt.study.method import Entry, Method, Outcome
from deltaprompt.types import Example

LAST = 3  # lines of what a process said that are told when it ends badly


@dataclass(frozen=True, eq=False)
class Called(Method):
    """A function `(train, dev, test, labels, seed, options)`, called in a process of its own for every seed.

    It is given lists of `Example`, of which test rows have no labels, `dev` being None where it is not asked for, and
    gives the labels of the test rows; or these and a mapping with any of "trainable", "bytes" and "cpu_seconds" (of its
    training alone; where it does not say, all its time counts).

    Args:
        name: its own.
        function: `"module:function"`; the process finds modules where this one does, and in the working directory.
        options: what it is given, as JSON.
        dev: whether it is given rows to choose by.
        zero_shot: whether it answers without examples.
    """

    name: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dev: bool = False
    zero_shot: bool = False
    together: int = 1

    def __post_init__(self) -> None:
        module, colon, function = self.function.partition(":")
        if not colon or not all(part.isidentifier() for part in (*module.split("."), function)):
            raise ConfigError(f"method {self.name!r}: function = {self.function!r}; write module:function")
        try:
            json.dumps(dict(self.options))
        except (TypeError, ValueError) as e:
            raise ConfigError(f"method {self.name!r}: its options cannot be written as JSON: {e}") from e

    def entry(self, data: DataSet) -> Entry:
        told = {"function": self.function, "options": dict(self.options), "dev": self.dev}
        return Entry({"kind": "call", **told}, "", self.zero_shot)

    def ready(self) -> None:
        try:
            _answer({"function": self.function})
        except TrainingError as e:
            raise ConfigError(f"method {self.name!r}, function {self.function!r}: {e}") from e

    def run(self, data: DataSet, shots: Shots, seeds: Sequence[int]) -> Sequence[Outcome | str]:
        return [self._one(data, shots, seed) for seed in seeds]

    def _one(self, data: DataSet, shots: Shots, seed: int) -> Outcome:
        train, dev = data.draw(shots, seed, self.dev)
        told = _answer(
            {
                "function": self.function,
                "train": _rows(train),
                "dev": None if dev is None else _rows(dev),
                "test": [[dict(row.fields), None] for row in data.test],
                "labels": data.labels,
                "seed": seed,
                "options": dict(self.options),
            }
        )
        found = _checked(told["found"], data)
        return Outcome(data.classes(found), told["cpu_seconds"], told["trainable"], told["bytes"])


def _rows(examples: Sequence[Example]) -> list[Any]:
    return [[dict(row.fields), row.label] for row in examples]


def _checked(found: Sequence[str], data: DataSet) -> Sequence[str]:
    """A label of the data set for every test row, or an error."""
    if len(found) != len(data.test):
        raise DataError(f"it gave {len(found)} labels for {len(data.test)} test rows; it must give one for each")
    for number, label in enumerate(found, 1):
        if label not in data.labels:
            raise DataError(f"it gave test row {number} the label {label!r}{nearest(str(label), data.labels)}")
    return found


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a process made of a request; what it prints is not shown."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, said = (Path(folder) / name for name in ("asked.json", "answered.json", "said.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        path = [str(Path(place).resolve()) for place in ("", *sys.path)]  # "" is the working directory
        with said.open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-P", str(calling.__file__), str(asked), str(answered)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if not answered.exists():
            last = " / ".join(said.read_text(encoding="utf-8", errors="replace").split("\n")[-LAST - 1 :]).strip(" /")
            raise TrainingError(f"its process ended with exit code {done.returncode}{': ' if last else ''}{last}")
        found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    if "failed" in found:
        raise TrainingError(str(found["failed"]))
    return found
