"""`deltaprompt fit`: adapt a backbone to a task from a recipe, from options, or from both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from deltaprompt.cli import console, entities, options, results, tagging, writing
from deltaprompt.cli.seeds import called, deltas_of, fit_recipe
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deltaprompt.backbone import Backbone
    from deltaprompt.cli.recipe import Recipe
    from deltaprompt.deltas._base import Delta
    from deltaprompt.model import Model, Task
    from deltaprompt.model.with_masks import WithMasks
    from deltaprompt.trainer import GridResult, SeedsResult
    from deltaprompt.types import Example


def fit(
    context: typer.Context,
    recipe: options.RecipeFile = None,
    data: options.Train = None,
    test: options.Test = None,
    test_share: options.TestShare = None,
    dev: options.Dev = None,
    unlabelled: options.Unlabelled = None,
    text: options.Text = None,
    label: options.Label = None,
    field: options.Fields = None,
    shots: options.Shots = None,
    no_dev: options.NoDev = False,
    drop_empty: options.DropEmpty = False,
    template: options.Template = None,
    describe: options.Describe = None,
    order: options.Order = None,
    verbalizer: options.VerbalizerOption = None,
    calibration: options.CalibrationOption = None,
    generate: options.Generate = None,
    target: options.Target = None,
    chat: options.ChatFlag = False,
    find_spans: options.TaggingFlag = False,
    max_length: options.MaxLength = None,
    several: options.Several = False,
    backbone: options.BackboneName = None,
    delta: options.Deltas = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seeds: options.Seeds = None,
    grid: options.Grid = None,
    together: options.Together = None,
    epochs: options.Epochs = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    learning_rate: options.LearningRate = None,
    precision: options.Precision = None,
    checkpointing: options.Checkpointing = False,
    out: options.Out = None,
    resume: options.Resume = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Adapt a backbone to a task, from a recipe, from options, or both (options win)."""
    from deltaprompt.trainer.accelerated import is_main

    chosen = _chosen(recipe, context.params)
    with console.resumable(chosen.out, resume):
        result = _run(chosen, resume)
    if not is_main():  # of several processes (torchrun) one speaks
        return
    _report(chosen, result, as_json)


def _chosen(path: Path | None, given: dict[str, Any]) -> Recipe:
    """The recipe of a file, if there is one, and of options, which win."""
    from deltaprompt.cli.recipe import build, overlaid, read_toml

    tables = {} if path is None else read_toml(path)
    return build(overlaid(tables, _tables(given, tables)))


def _report(chosen: Recipe, result: SeedsResult | GridResult, as_json: bool) -> None:
    """Prints what it came to."""
    from deltaprompt.cli.grid import show as show_grid
    from deltaprompt.trainer import GridResult

    if isinstance(result, GridResult):
        console.print_json(result.as_json()) if as_json else show_grid(result, chosen.grid.axes)
    elif as_json:
        console.print_json(result.as_json() | {"test": result.test or None})
    elif chosen.generation is not None:
        results.show(result, writing.called(result.test), "loss", digits=2)
    elif chosen.tagging is not None:
        results.show(result, tagging.METRICS, "f1")
    else:
        results.show(result, entities.shown_of(result.test))


def _tables(given: dict[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the command line in the form of a recipe's tables."""
    from deltaprompt.cli.recipe import grid_of, labels_of, pairs
    from deltaprompt.registry import variant_of

    deltas, verbalizer = given["delta"], given["verbalizer"]
    none = deltas == ["none"]
    training = ("epochs", "steps", "batch_size", "learning_rate", "precision")
    instead = {**tagging.tables(given, recipe), **writing.tables(given, recipe)}
    return {
        **instead,
        "backbone": {"name": given["backbone"], "device": given["device"], "dtype": given["dtype"]},
        "task": {
            "template": given["template"],
            "labels": labels_of(given["describe"]) if given["describe"] else None,
            "order": [name.strip() for name in given["order"].split(",")] if given["order"] else None,
            "verbalizer": variant_of("verbalizers", verbalizer) if verbalizer and "tagging" not in instead else None,
            "calibration": variant_of("calibrations", given["calibration"]) if given["calibration"] else None,
            "max_length": None if instead else given["max_length"],
            "several": given["several"] or None,
        },
        "data": {
            "train": given["data"],
            **{name: given[name] for name in ("test", "test_share", "dev", "unlabelled", "text", "label", "target")},
            "fields": pairs(given["field"], "--field") if given["field"] else None,
            "drop_empty": given["drop_empty"] or None,
            "hold_out": False if given["no_dev"] else None,
        },
        "training": {name: given[name] for name in training} | {"checkpointing": given["checkpointing"] or None},
        "grid": grid_of(given["grid"]) if given["grid"] else None,
        "deltas": [] if none else [variant_of("deltas", text) for text in deltas] if deltas else None,
        **{name: given[name] for name in ("seeds", "together", "shots", "out")},
    }


def _run(recipe: Recipe, resume: bool) -> SeedsResult | GridResult:
    """Loads, trains and measures."""
    from deltaprompt.cli.data import Deal, apart, fields_of, names_of, rows, training_file
    from deltaprompt.cli.grid import cells_of
    from deltaprompt.cli.task import loaded, task_for
    from deltaprompt.model import Model
    from deltaprompt.model.starting import unlabelled_of
    from deltaprompt.trainer import fit_grid

    if recipe.generation is not None:
        return writing.run(recipe, recipe.generation, resume)
    if recipe.tagging is not None:
        return tagging.run(recipe, recipe.tagging, resume)
    if recipe.pairs is not None:
        return entities.fit(recipe, recipe.pairs, loaded(recipe.backbone, [recipe.task.template]), resume)
    source = training_file(recipe)
    fields = fields_of(recipe)
    train, test = apart(recipe.data, rows(source, recipe.data, fields, "train"))
    if recipe.data.test is not None:
        test = rows(recipe.data.test, recipe.data, fields, "test")
    dev = None if recipe.data.dev is None else rows(recipe.data.dev, recipe.data, fields, "dev")
    more = recipe.data.unlabelled
    unlabelled = [] if more is None else rows(more, recipe.data, fields, "unlabelled")
    if recipe.shots == 0 and not unlabelled:
        unlabelled = unlabelled_of(train)
    backbone = loaded(recipe.backbone, recipe.grid.template or [recipe.task.template])
    deltas = _deltas(recipe, backbone)
    if recipe.grid.axes:
        cells = cells_of(recipe, backbone, train, dev)
        _check(recipe, cells[0].task.names, test, dev)
        told(recipe, [cell.task for cell in cells], deltas, backbone.kind)
        return fit_grid(
            lambda tasks, seeds: _with_masks(recipe, Model(backbone, tasks, deltas, seeds)),
            cells,
            test,
            seeds=recipe.seeds,
            together=recipe.together,
            out=recipe.out,
            resume=resume,
            unlabelled=unlabelled,
        )
    task, deal = task_for(recipe.task, backbone, names_of(recipe.data, train)), Deal(recipe, train, dev)
    _check(recipe, task.names, test, dev)
    if recipe.shots == 0:
        _check_unlearned(backbone, task)
    told(recipe, [task], deltas, backbone.kind)
    return fit_recipe(
        recipe, lambda seeds: _with_masks(recipe, Model(backbone, task, deltas, seeds)), deal, test, resume, unlabelled
    )


def _check(recipe: Recipe, names: Sequence[str], test: Sequence[Example] | None, dev: Sequence[Example] | None) -> None:
    """Raises where rows to measure on or to choose by have a label that the task has not."""
    from deltaprompt.cli.data import check_labels

    check_labels(test, names, recipe.data.test or recipe.data.train)
    check_labels(dev, names, recipe.data.dev)


def _check_unlearned(backbone: Backbone, task: Task) -> None:
    """Raises where answers without any example would be chance."""
    from deltaprompt.model import Model
    from deltaprompt.model.starting import by_chance

    model = Model(backbone, task, (), (0, 1))
    try:
        name = by_chance(model)
    finally:
        model.adapted.remove()
    if name is not None:
        raise ConfigError(f"{name} begins by chance and needs examples; give shots, or words: --verbalizer label_words")


def _with_masks(recipe: Recipe, model: Model) -> Model | WithMasks:
    """The model; where the recipe asks for it, with a loss of masked tokens beside its own."""
    from deltaprompt.model.with_masks import WithMasks

    return model if recipe.masks is None else WithMasks(model, recipe.masks.weight, recipe.masks.rate)


def _deltas(recipe: Recipe, backbone: Backbone) -> Sequence[Delta]:
    """Those asked for, or the default; with 0 shots nothing is trained."""
    if recipe.shots == 0:
        if recipe.deltas:
            raise ConfigError("with 0 shots nothing is trained, and a delta would do nothing; leave the deltas out")
        return ()
    return deltas_of(recipe, backbone)


def told(recipe: Recipe, tasks: Sequence[Task], deltas: Sequence[Delta], kind: str) -> None:
    """What is about to be done, and which of it was not asked for but chosen."""
    from deltaprompt.cli.grid import note_grid

    templates = list(dict.fromkeys(task.template for task in tasks))
    chosen = not recipe.task.template and not recipe.grid.template
    template = f"template {templates[0]!r}" + (" (the default for that kind)" if chosen else "")
    if len(templates) > 1:
        template = f"{len(templates)} templates"
    verbalizers = " or ".join(dict.fromkeys(type(task.verbalizer).__name__ for task in tasks))
    if recipe.grid.axes:
        note_grid(recipe)
    console.note(
        f"{recipe.backbone.name} ({kind}): {template}, {called(recipe, deltas)}, {verbalizers}, "
        f"{len(tasks[0].names)} labels"
    )
    if recipe.task.labels is None and recipe.grid.labels is None:
        console.note(
            "labels stand for themselves; a sentence or a word for each (--describe label=…) mostly does better"
        )
