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
from deltaprompt.model.label_metrics import auroc
from deltaprompt.model.starting import unlabelled_of
from deltaprompt.study import calling
from deltaprompt.study.data import DataSet, Shots
from deltaprompt.study.method import Entry, Method, Outcome
from deltaprompt.types import Example

LAST = 3  # lines of what a process said that are told when it ends badly


@dataclass(frozen=True, eq=False)
class Called(Method):
    """A function `(train, dev, test, labels, seed, options)`, called in a process of its own for every seed.

    It is given lists of `Example`, of which test rows have no labels, `dev` being None where it is not asked for, and
    gives the labels of the test rows; or these and a mapping with any of "trainable", "bytes", "cpu_seconds" (of its
    training alone; where it does not say, all its time counts) and "confidence" (of every test row a number, the
    higher the surer that it belongs to a label).

    With `outside`, the data set's texts that belong to none of the labels stand behind the test rows, and it gives a
    label for each of these too, which is not read. AUROC then comes from the confidences; without these there is none.

    Args:
        name: its own.
        function: `"module:function"`; the process finds modules where this one does, and in the working directory.
        options: what it is given, as JSON.
        dev: whether it is given rows to choose by.
        zero_shot: whether it answers without examples.
        outside: whether it is given the texts outside, where a data set has some.
    """

    name: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dev: bool = False
    zero_shot: bool = False
    outside: bool = False
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
        more = {"outside": True} if self._outside(data) else {}
        return Entry({"kind": "call", **told, **more}, "", self.zero_shot)

    def ready(self) -> None:
        try:
            _answer({"function": self.function})
        except TrainingError as e:
            raise ConfigError(f"method {self.name!r}, function {self.function!r}: {e}") from e

    def run(self, data: DataSet, shots: Shots, seeds: Sequence[int]) -> Sequence[Outcome | str]:
        return [self._one(data, shots, seed) for seed in seeds]

    def _one(self, data: DataSet, shots: Shots, seed: int) -> Outcome:
        train, dev = data.draw(shots, seed, self.dev)
        outside, n = self._outside(data), len(data.test)
        asked = [*data.test, *outside]
        told = _answer(
            {
                "function": self.function,
                "train": _rows(train),
                "dev": None if dev is None else _rows(dev),
                "test": _rows(unlabelled_of(asked)),
                "labels": data.labels,
                "seed": seed,
                "options": dict(self.options),
            }
        )
        found, sure = told["found"], told["confidence"]
        _check(found, sure, data, len(outside))
        area = auroc(sure[:n], sure[n:]) if outside and sure is not None else None
        return Outcome(data.classes(found[:n]), told["cpu_seconds"], told["trainable"], told["bytes"], area)

    def _outside(self, data: DataSet) -> Sequence[Example]:
        """The texts outside that it is given."""
        return data.outside if self.outside else ()


def _rows(examples: Sequence[Example]) -> list[Any]:
    return [[dict(row.fields), row.label] for row in examples]


def _check(found: Sequence[str], sure: Sequence[float] | None, data: DataSet, outside: int) -> None:
    """Raises unless every row has a label, which is the data set's of a test row, and a confidence if any has."""
    n = len(data.test)
    rows = f"{n} test rows" + (f" and {outside} texts outside behind them" if outside else "")
    for what, given in (("labels", found), ("confidences", sure)):
        if given is not None and len(given) != n + outside:
            raise DataError(f"it gave {len(given)} {what} for {rows}; it must give one for each")
    for number, label in enumerate(found[:n], 1):
        if label not in data.labels:
            raise DataError(f"it gave test row {number} the label {label!r}{nearest(str(label), data.labels)}")


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
