"""`deltaprompt compare`: methods × shots × seeds × data sets on one machine, and one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaprompt.cli import console, options
from deltaprompt.errors import ConfigError, DeltaPromptError

if TYPE_CHECKING:
    from deltaprompt.backbone import Backbone
    from deltaprompt.cli.compare_recipe import CompareRecipe, MethodTable, SetTable
    from deltaprompt.cli.recipe import BackboneTable, TaskTable
    from deltaprompt.study import Comparison, DataSet, Method

TABLE, PLOT = "table", "plot.png"  # files of the folder

Recipe_ = Annotated[
    Path, typer.Argument(help="A recipe, TOML. Paths in it are relative to where you are.", metavar="RECIPE.toml")
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        help="The folder that keeps every cell when it is done (run again, the command goes on there), the table as "
        "Markdown and CSV, and a plot.",
        rich_help_panel=options.OUTPUT,
        metavar="DIR",
        show_default=False,
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        help="Such as 0-4 or 0,3,7; default: the recipe's, or 0-4.",
        rich_help_panel=options.TRAINING,
        metavar="SEEDS",
        show_default=False,
    ),
]
TestRows = Annotated[
    int | None,
    typer.Option(
        "--test-rows",
        help="Of each data set at most, evenly spaced; default: all.",
        rich_help_panel=options.DATA,
        metavar="N",
        show_default=False,
    ),
]


def compare(
    recipe: Recipe_,
    seeds: Seeds = None,
    test_rows: TestRows = None,
    device: options.Device = None,
    together: options.Together = None,
    out: Out = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare methods over data sets, shots and seeds: mean ± std, paired bootstrap, CPU-seconds, parameters, bytes."""
    from deltaprompt.cli.compare_recipe import build
    from deltaprompt.cli.recipe import read_toml
    from deltaprompt.study import as_json as told
    from deltaprompt.study import markdown

    tables, over = read_toml(recipe), {"seeds": seeds, "test_rows": test_rows, "together": together, "out": out}
    tables |= {name: value for name, value in over.items() if value is not None}
    if device is not None:
        own = tables.get("backbone", {})
        tables["backbone"] = {**own, "device": device} if isinstance(own, Mapping) else own
    chosen = build(tables)
    with console.resumable(chosen.out, None, "the comparison"):
        found = _run(chosen)
    _keep(chosen.out, found)
    console.print_json(told(found)) if as_json else print(markdown(found), flush=True)


def _run(recipe: CompareRecipe) -> Comparison:
    """Reads and loads everything, then computes what is not there."""
    from deltaprompt.study import compare
    from deltaprompt.study.plot import check_installed
    from deltaprompt.trainer.accelerated import processes

    if processes() > 1:
        raise ConfigError("a comparison runs in one process; start it without torchrun or accelerate")
    if recipe.out is not None:
        check_installed()
    sets = [_data(recipe, table) for table in recipe.datasets]
    return compare(
        sets,
        _methods(recipe, sets),
        shots=recipe.shots,
        seeds=recipe.seeds,
        baseline=recipe.baseline,
        test_rows=recipe.test_rows,
        metric=recipe.metric,
        out=recipe.out,
        say=console.note,
    )


def _data(recipe: CompareRecipe, table: SetTable) -> DataSet:
    """The rows of a data set, with the fields that any method's template has."""
    from deltaprompt.cli.data import apart, names_of, rows
    from deltaprompt.defaults import TEMPLATES
    from deltaprompt.study import DataSet
    from deltaprompt.templates import parse

    asked = table.data
    templates = [m.task_of(table).template for m in recipe.methods if m.kind == "fit"]
    templates += [m.task.get("template") for m in recipe.methods if m.kind == "probe"]
    fields = {name for t in templates or [None] for name in parse(t or TEMPLATES["encoder"]).fields}
    train, test = apart(asked, rows(str(asked.train), asked, fields, "train"))
    if asked.test is not None:
        test = rows(asked.test, asked, fields, "test")
    dev = None if asked.dev is None else rows(asked.dev, asked, fields, "dev")
    unlabelled = [] if asked.unlabelled is None else rows(asked.unlabelled, asked, fields, "unlabelled")
    outside = [] if table.outside is None else rows(table.outside, asked, fields, "outside")
    names = names_of(asked, train)
    return DataSet(table.name, train, test or [], dev, unlabelled, names, asked.hold_out, outside)


def _methods(recipe: CompareRecipe, sets: Sequence[DataSet]) -> list[Method]:
    """The methods, those of one backbone on the same one."""
    known: dict[tuple[BackboneTable, bool], Backbone] = {}
    made: list[Method] = []
    for method in recipe.methods:
        try:
            made.append(_method(recipe, method, sets, known))
        except DeltaPromptError as e:
            raise ConfigError(f"method {method.name!r}: {e}") from e
    return made


def _method(
    recipe: CompareRecipe, m: MethodTable, sets: Sequence[DataSet], known: dict[tuple[BackboneTable, bool], Backbone]
) -> Method:
    from deltaprompt.cli.task import task_for
    from deltaprompt.defaults import deltas_for
    from deltaprompt.study import Called, Probe, Trained
    from deltaprompt.study.probe import TEMPLATE

    if m.kind == "call":
        return Called(m.name, m.function, m.options, m.dev, m.zero_shot, m.outside)
    tables = {table.name: m.task_of(table) for table in recipe.datasets}
    if m.kind == "probe":
        lengths = {name: table.max_length for name, table in tables.items()}
        return Probe(m.name, _backbone(m.backbone, [], known), m.task.get("template") or TEMPLATE, lengths)
    backbone = _backbone(m.backbone, list(tables.values()), known)
    tasks = {data.name: task_for(tables[data.name], backbone, data.labels) for data in sets}
    deltas = deltas_for(backbone) if m.deltas is None else m.deltas
    return Trained(m.name, backbone, tasks, deltas, m.training, m.dev, recipe.together)


def _backbone(
    b: BackboneTable, tables: Sequence[TaskTable], known: dict[tuple[BackboneTable, bool], Backbone]
) -> Backbone:
    """The backbone of a table; what is loaded already is not loaded again."""
    from deltaprompt.backbone.load import DEMO
    from deltaprompt.cli.task import loaded
    from deltaprompt.templates import parse

    templates = [table.template for table in tables]
    masked = any(t is not None and bool(parse(t).masks) for t in templates)
    key = (b, b.name == DEMO and masked)  # which of its two models the demo is, the template says
    if key not in known:
        known[key] = loaded(b, templates)
    return known[key]


def _keep(out: str | None, found: Comparison) -> None:
    """The table and the plot."""
    from deltaprompt.store import write_text
    from deltaprompt.study import csv_of, markdown, plot

    if out is None:
        return
    folder = Path(out)
    write_text(folder / f"{TABLE}.md", markdown(found) + "\n")
    write_text(folder / f"{TABLE}.csv", csv_of(found))
    plot(found, folder / PLOT)
    console.note(f"{folder}: {TABLE}.md, {TABLE}.csv, {PLOT} and every cell")
