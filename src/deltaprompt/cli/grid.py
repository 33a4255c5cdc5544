"""The grid of a recipe: its cells, what is said of them before, and the table of what they came to."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, cast

from deltaprompt.backbone import Backbone
from deltaprompt.cli import console
from deltaprompt.cli.data import Deal, names_of
from deltaprompt.cli.recipe import NUMBERS, Recipe
from deltaprompt.cli.task import task_for
from deltaprompt.errors import ConfigError
from deltaprompt.trainer import Cell, CellResult, GridResult
from deltaprompt.types import Example

Axes = Mapping[str, Sequence[Any]]
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1"}
OWN = ("words", "descriptions")  # what a verbalizer may itself say of what stands for labels
LEGEND = 160  # characters of what a number stands for


def cells_of(recipe: Recipe, backbone: Backbone, train: Sequence[Example], dev: Sequence[Example] | None) -> list[Cell]:
    """A cell for each combination of what is tried; those with as many shots have the same examples."""
    names = names_of(recipe.data, train)
    axes = _alike(recipe.grid.axes, names)
    _check_labels(recipe)
    deals = {k: Deal(replace(recipe, shots=k), train, dev) for k in axes.get("shots", (recipe.shots,))}

    def cell(values: Sequence[Any]) -> Cell:
        varied = dict(zip(axes, values, strict=True))
        table = replace(recipe.task, **{name: varied[name] for name in ("template", "labels") if name in varied})
        rate = varied.get("learning_rate", recipe.training.learning_rate)
        return Cell(
            "_".join(f"{axis}-{_short(axes, axis, value)}" for axis, value in varied.items()),
            task_for(table, backbone, names),
            deals[varied.get("shots", recipe.shots)],
            replace(recipe.training, learning_rate=rate),
            varied,
        )

    return [cell(values) for values in product(*axes.values())]


def note_grid(recipe: Recipe) -> None:
    """What is about to be tried."""
    axes, seeds = recipe.grid.axes, len(recipe.seeds)
    shape = " × ".join(f"{_title(axis)} ({len(values)})" for axis, values in axes.items())
    cells = math.prod(map(len, axes.values()))
    passes = f"{min(recipe.together, cells * seeds)} at most in one pass"
    console.note(f"a grid of {shape}: {cells} cells × {seeds} seed{'s' * (seeds > 1)}, {passes}")
    if len(axes.get("shots", ())) > 1 and recipe.data.dev is None and recipe.data.hold_out:
        console.note("with each number of shots come as many dev rows; --dev FILE compares all on the same")


def show(result: GridResult, axes: Axes) -> None:
    """A line a cell, what its numbers stand for, and where the best is."""
    screen, dev = console.output(), bool(result.best.dev)
    shown = [f"test {name}" for name in METRICS.values()] if result.best.test else []
    columns = [*map(_title, axes), "dev accuracy", *shown, ""]
    screen.print(console.table(columns, [_line(result, cell, axes) for cell in result.cells]))
    for axis in axes:
        for number, value in enumerate(axes[axis] if axis not in NUMBERS else (), 1):
            screen.print(f"{axis} {number}: {_legend(value)}", markup=False, soft_wrap=True)
    for cell in result.cells:
        if cell.failed:
            screen.print(f"{cell.cell.name} failed: {cell.failed}", markup=False, soft_wrap=True)
    varied = result.best.cell.varied
    best = ", ".join(f"{_title(axis)} {_short(axes, axis, varied[axis])}" for axis in axes)
    why = "" if dev else " (the first: there are no dev rows to choose by)"
    screen.print(f"best: {best}{why}; {_kept(result)}", markup=False, soft_wrap=True)
    if result.best_folder is not None:
        use = f"use it: deltaprompt predict {shlex.quote(str(result.best_folder))} FILE"
        screen.print(use, markup=False, soft_wrap=True)


def _line(result: GridResult, cell: CellResult, axes: Axes) -> list[str]:
    seeds = len(result.seeds)
    dev = "failed" if cell.failed else console.plus_minus(cell.dev["accuracy"], seeds) if cell.dev else "–"
    test = [
        console.plus_minus(cell.test[metric], seeds) if cell.test else "–" for metric in METRICS if result.best.test
    ]
    mark = "← best" if cell is result.best else ""
    return [*(_short(axes, axis, cell.cell.varied[axis]) for axis in axes), dev, *test, mark]


def _kept(result: GridResult) -> str:
    """How large the best adaptations are, and where they are."""
    run, folders = result.best.runs[0], [str(folder) for folder in result.best.folders]
    each = f"{run.trainable:,} trained parameters"
    if not folders:
        return f"{each}, not saved (--out DIR saves all)"
    several = f" … seed-{result.seeds[-1]}" if len(folders) > 1 else ""
    return f"{each}, {console.size(run.bytes)} in {folders[0]}{several}"


def _short(axes: Axes, axis: str, value: object) -> str:
    """A number as it is, anything else by its place among what is tried, from 1."""
    return str(value) if axis in NUMBERS else str(axes[axis].index(value) + 1)


def _title(axis: str) -> str:
    return axis.replace("_", " ")


def _legend(value: object) -> str:
    """A template, or label words, in a line."""
    if isinstance(value, str):
        return repr(value)
    if not isinstance(value, Mapping):
        return ", ".join(cast(Sequence[str], value))
    words = {label: own if isinstance(own, str) else "|".join(own) for label, own in value.items()}
    line = "; ".join(f"{label} = {own}" for label, own in words.items())
    return line if len(line) <= LEGEND else line[: LEGEND - 1] + "…"


def _alike(axes: Axes, names: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The axes, whatever stands for labels in one order, as a model's tasks have it: where files are among them, whose
    labels are the data's, in that of those, else in the first one's.
    """
    made = dict(axes)
    tried = made.get("labels", ((),))
    first = dict.fromkeys(names) if any(isinstance(own, str) for own in tried) else tried[0]
    if isinstance(first, Mapping):
        made["labels"] = [
            {name: own[name] for name in first} if isinstance(own, Mapping) and own.keys() == first.keys() else own
            for own in made["labels"]
        ]
    return made


def _check_labels(recipe: Recipe) -> None:
    given = recipe.task.verbalizer or {}
    if recipe.grid.labels is not None and (own := [name for name in OWN if name in given]):
        raise ConfigError(
            f"the verbalizer is given its own {own[0]}, so the grid's labels would change nothing; leave one of the "
            "two out"
        )
