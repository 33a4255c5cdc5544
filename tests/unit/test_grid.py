"""A grid as recipes and options give it, what may not be said of one, and how its best is found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deltaprompt.cli.grid import cells_of
from deltaprompt.cli.recipe import build, grid_of, overlaid
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError
from deltaprompt.model import Model, Task
from deltaprompt.trainer import Cell, CellResult, GridResult, Run, fit_grid
from deltaprompt.trainer.seeds import told, told_of
from deltaprompt.types import Example
from tests import backbones_zoo as zoo

ROWS = [Example({"text": text}, "a" if "good" in text else "b") for text in ("good", "bad", "so good", "so bad")]


def test_the_small_language_of_the_option(tmp_path: Path) -> None:
    words = tmp_path / "words.toml"
    words.write_text('a = "good"\nb = ["bad", "awful"]\n')
    given = ["learning_rate=1e-4, 5e-4", "template={text} is = {mask}", f"labels={words}", "learning-rate=1e-3"]
    assert grid_of(given) == {
        "learning_rate": ["1e-4", "5e-4", "1e-3"],
        "template": ["{text} is = {mask}"],
        "labels": [{"a": "good", "b": ["bad", "awful"]}],
    }
    made = build({"grid": grid_of([*given, "shots=4,16"])}).grid
    assert list(made.axes) == ["shots", "template", "labels", "learning_rate"]
    assert made.axes["shots"] == (4, 16)
    assert made.axes["learning_rate"] == (1e-4, 5e-4, 1e-3)
    assert made.axes["labels"] == ({"a": "good", "b": ("bad", "awful")},)
    assert build({}).grid.axes == {}


@pytest.mark.parametrize("given", ["shots", "shots=", "=4", "template= "])
def test_an_option_that_gives_no_value(given: str) -> None:
    with pytest.raises(ConfigError, match="this names no value; write --grid learning_rate=1e-4,5e-4"):
        grid_of([given])


def test_label_words_are_files() -> None:
    with pytest.raises(ConfigError, match="--grid labels=a=good: label words are tried from a .toml or .json file"):
        grid_of(["labels=a=good"])
    with pytest.raises(ConfigError, match="there is no file of labels 'nowhere.toml'"):
        grid_of(["labels=nowhere.toml"])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"grid": {"shots": []}}, "[grid] shots has no values; give one or more, or leave it out"),
        ({"grid": {"shots": [4, "4"]}}, "[grid] shots: 4 is there twice; give it once"),
        ({"grid": {"learning_rate": [1e-4, "0.0001"]}}, "[grid] learning_rate: 0.0001 is there twice"),
        ({"grid": {"labels": [{"a": "x", "b": "y"}, {"b": "y", "a": "x"}]}}, "is there twice; give it once"),
        ({"grid": {"shots": [4, 0]}}, "[grid] shots: got 0; it is a number above 0"),
        ({"grid": {"learning_rate": ["-1e-4"]}}, "[grid] learning_rate: got -0.0001; it is a number above 0"),
        ({"grid": {"learning_rate": [math.nan]}}, "[grid] learning_rate: got nan; it is a number above 0"),
        ({"grid": {"shots": ["4", "x"]}}, "[grid] shots: got 'x'"),
        ({"grid": {"shots": 4}}, "[grid] shots is a list of what is tried; got 4; write shots = […]"),
        ({"grid": {"learning_rat": [1]}}, "unknown key 'learning_rat' in [grid]; did you mean 'learning_rate'?"),
        ({"grid": {"epochs": [1]}}, "unknown key 'epochs' in [grid]; it belongs in [training]"),
        ({"grid": []}, "[grid] is a table of names and values; got []"),
        (
            {"grid": {"shots": [4]}, "shots": 3},
            "shots is an axis of the grid, and is also given by itself (--shots, or shots outside [grid]); leave one",
        ),
        (
            {"grid": {"labels": [["a", "b"]]}, "task": {"labels": {"a": "x"}}},
            "labels is an axis of the grid, and is also given by itself (--describe, or labels in [task]); leave one",
        ),
    ],
)
def test_what_a_grid_may_not_say(tables: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build(tables)
    assert message in str(raised.value)


def test_options_override_a_recipe_axis_by_axis() -> None:
    under = {"shots": 8, "task": {"template": "{text}", "max_length": 9}, "grid": {"learning_rate": [1.0]}}
    over = {"shots": None, "task": {"template": None}, "grid": {"shots": ["4"], "learning_rate": ["2"]}}
    assert overlaid(under, over) == {
        "task": {"template": "{text}", "max_length": 9},
        "grid": {"learning_rate": ["2"], "shots": ["4"]},
    }
    both = overlaid({"grid": {"shots": [4, 8]}}, {"shots": 2})
    with pytest.raises(ConfigError, match="shots is an axis of the grid, and is also given by itself"):
        build(both)


def test_the_cells_of_a_recipe() -> None:
    labels = [{"a": "good", "b": "bad"}, {"b": "two", "a": "one"}]
    recipe = build(
        {"grid": {"learning_rate": [1e-4, 1e-3], "labels": labels}, "shots": 1, "task": {"template": "{text} {mask}"}}
    )
    cells = cells_of(recipe, zoo.build("bert"), ROWS, None)
    assert [cell.name for cell in cells] == [
        f"labels-{number}_learning_rate-{rate}" for number in (1, 2) for rate in ("0.0001", "0.001")
    ]
    assert cells[3].varied == {"labels": {"a": "one", "b": "two"}, "learning_rate": 1e-3}
    assert cells[3].training.learning_rate == 1e-3
    assert {cell.task.names for cell in cells} == {("a", "b")}  # in one order
    assert len({cell.sets for cell in cells}) == 1
    words = {"kind": "label_words", "words": {"a": ["good"], "b": ["bad"]}}
    told = build({"grid": {"labels": labels}, "task": {"verbalizer": words}})
    with pytest.raises(ConfigError, match="its own words, so the grid's labels would change nothing; leave one"):
        cells_of(told, zoo.build("bert"), ROWS, None)


def test_cells_have_names_of_their_own() -> None:
    backbone, task = zoo.build("bert"), Task("{text} {mask}", {"a": "good", "b": "bad"})

    def model(tasks: Any, seeds: Any) -> Model:
        return Model(backbone, tasks, [LoRA(2)], seeds)

    cell = Cell("one", task, lambda seed: (ROWS, None))
    for cells, got in (([], "none"), ([cell, cell], "'one' twice")):
        with pytest.raises(ConfigError, match=f"one cell or more, each with a name of its own; got {got}"):
            fit_grid(model, cells)
    with pytest.raises(ConfigError, match="there is one or more, and each once"):
        fit_grid(model, [cell], seeds=[1, 1])


def result(*each: list[tuple[float, float | None]]) -> GridResult:
    """Of cells that have these accuracies and losses on dev, by seed."""
    cells = []
    for number, pairs in enumerate(each):
        runs = [Run(1, 1.0, 1, {"accuracy": a, "loss": b}, [], 1.0, "done", 1) for a, b in pairs]
        best = [{"accuracy": a, "loss": math.inf if b is None else b} for a, b in pairs]
        cell = Cell(str(number), Task("{text}", ("a", "b")), lambda seed: (ROWS, None))
        cells.append(CellResult(cell, tuple(runs), told_of(best), {}, ()))
    return GridResult(tuple(range(len(each[0]))), tuple(cells), 1.0, None)


def test_the_best_cell_and_its_best_seed() -> None:
    found = result([(0.5, 0.1), (1.0, 0.1)], [(0.75, 0.3), (0.75, 0.2)], [(0.75, 0.2), (0.75, 0.2)])
    assert (found.best.cell.name, found.best_seed) == ("0", 1)  # of equal accuracy, the lowest loss
    infinite = result([(0.5, None), (0.5, 1.0)], [(0.5, 9.0), (0.5, 8.0)])  # a loss that a record leaves out
    assert (infinite.best.cell.name, infinite.best_seed) == ("1", 1)
    assert infinite.as_json()["grid"][0]["dev"]["loss"] == {"mean": None, "std": None, "each": [None, 1.0]}
    assert told([1.0, 3.0])["mean"] == 2.0
