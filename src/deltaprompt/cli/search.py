"""`deltaprompt search`: lottery prompts, label words and templates, each from a recipe with a table `[search]`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaprompt.cli import console, options
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from deltaprompt.backbone import Backbone
    from deltaprompt.cli.recipe import Recipe
    from deltaprompt.model import Task
    from deltaprompt.search import Draws, SearchResult, Tuning
    from deltaprompt.types import Example

OWN = ("search", "generator")  # tables that only these recipes have
RESULT, CHOSEN = "result", "chosen"

Recipe_ = Annotated[
    Path,
    typer.Argument(help="A recipe, TOML, with a table for the search; options override it.", metavar="RECIPE.toml"),
]
Generator = Annotated[
    str | None,
    typer.Option(
        "--generator",
        help="What writes templates: an encoder-decoder with sentinels, a folder or a name on the hub.",
        rich_help_panel=options.MODEL,
        metavar="NAME",
        show_default=False,
    ),
]


def search(
    context: typer.Context,
    recipe: Recipe_,
    data: options.Train = None,
    test: options.Test = None,
    shots: options.Shots = None,
    backbone: options.BackboneName = None,
    generator: Generator = None,
    device: options.Device = None,
    seeds: options.Seeds = None,
    out: options.Out = None,
    resume: options.Resume = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Search for prompts that suit a model: lottery prompts, label words, templates; compared with chance."""
    from deltaprompt.cli.recipe import build, overlaid, read_toml

    tables = read_toml(recipe)
    own = {name: tables.pop(name) for name in OWN if name in tables}
    if generator is not None:
        table = own.get("generator")
        own["generator"] = {**(table if isinstance(table, Mapping) else {}), "name": generator}
    over = {
        "backbone": {"name": backbone, "device": device},
        "data": {"train": data, "test": test},
        **{"shots": shots, "seeds": seeds, "out": out},
    }
    chosen = build(overlaid(tables, over))
    with console.resumable(chosen.out, resume, "the search"):
        found = _run(chosen, own, "training" in tables, resume)
    console.print_json(found.as_json()) if as_json else print(found.markdown(), flush=True)


def _run(recipe: Recipe, own: Mapping[str, Any], trains: bool, resume: bool) -> Draws:
    """Searches on every seed's rows, and only then reads the test rows."""
    from deltaprompt.cli.data import Deal, apart, fields_of, names_of, refuse, refuse_tables, rows, training_file
    from deltaprompt.cli.task import loaded, task_for
    from deltaprompt.data.formats import HUB
    from deltaprompt.search import Draws

    kind, options = _search_of(own, recipe, trains)
    refuse(recipe.data, ("unlabelled", "seen"), "a search")
    refuse_tables(recipe, ("tagging", "masks"), "a search")
    source, fields, test = training_file(recipe), fields_of(recipe), recipe.data.test
    if test is not None and not test.startswith(HUB) and not Path(test).is_file():
        raise ConfigError(f"there is no file of test rows {test!r}; mend test in [data], or leave it out")
    train, held = apart(recipe.data, rows(source, recipe.data, fields, "train"))
    dev = None if recipe.data.dev is None else rows(recipe.data.dev, recipe.data, fields, "dev")
    backbone = loaded(recipe.backbone)
    generator = _generator(own, recipe.backbone.device) if kind == "templates" else None
    task, deal = task_for(recipe.task, backbone, names_of(recipe.data, train)), Deal(recipe, train, dev)
    out, found = None if recipe.out is None else Path(recipe.out), []
    for seed in recipe.seeds:
        draw = deal(seed)
        folder = None if out is None else out / f"seed-{seed}"
        console.note(
            f"{kind} on {backbone.name}, seed {seed}: {len(draw[0])} training rows, {len(draw[1] or [])} dev rows"
        )
        tuning = _tuning(recipe, backbone, seed)
        found.append(_searched(kind, options, backbone, generator, task, draw, seed, tuning, folder, resume))
        _write(folder, found[-1])
        _keep(folder, found[-1])
    if test is not None:
        held = rows(test, recipe.data, fields, "test")
    if held is not None:
        found = [_measured(result, held, out) for result in found]
    draws = Draws(tuple(found))
    _write(out, draws)
    return draws


def _search_of(own: Mapping[str, Any], recipe: Recipe, trains: bool) -> tuple[str, Any]:
    """The name of the search and its options, checked against the rest of the recipe."""
    from deltaprompt import registry

    table = own.get("search")
    if not isinstance(table, Mapping):
        known = ", ".join(registry.variants("search"))
        raise ConfigError(f"the recipe has no table [search]; give one, with kind = one of {known}")
    options, kind = registry.from_description("search", table), str(table["kind"])
    if recipe.grid.axes or recipe.generation is not None or recipe.pairs is not None:
        raise ConfigError("a search is of one [task]'s prompts; leave [grid], [generation], [chat] and [pairs] out")
    if kind == "lottery" and recipe.deltas:
        raise ConfigError("lottery prompts are tried on a frozen model; leave [[deltas]] out, or search label_words")
    if trains and not recipe.deltas:
        raise ConfigError("[training] says how candidates are tuned, and no [[deltas]] say what trains; give some")
    if "generator" in own and kind != "templates":
        raise ConfigError(f"[generator] writes templates, and this search is {kind}; leave it out")
    return kind, options


def _generator(own: Mapping[str, Any], device: str | None) -> Backbone:
    from deltaprompt.cli.recipe import BackboneTable, build
    from deltaprompt.cli.task import loaded

    table = own.get("generator")
    if not isinstance(table, Mapping) or "name" not in table:
        raise ConfigError(
            "templates are written by an encoder-decoder with sentinels; name it with "
            "--generator, or in the recipe's [generator]; such as t5-small, or a folder"
        )
    g: BackboneTable = build({"backbone": dict(table)}).backbone
    return loaded(dataclasses.replace(g, device=g.device or device))


def _searched(
    kind: str,
    options: Any,
    backbone: Backbone,
    generator: Backbone | None,
    task: Task,
    draw: tuple[Sequence[Example], Sequence[Example] | None],
    seed: int,
    tuning: Tuning | None,
    out: Path | None,
    resume: bool,
) -> SearchResult:
    """One search on one draw, without test rows."""
    from deltaprompt.search import label_words, lottery, templates

    train, dev = draw[0], draw[1] or []
    if kind == "lottery":
        return lottery(backbone, task, train, dev, options=options, seed=seed, out=out, resume=resume)
    if generator is None:
        return label_words(
            backbone, task, train, dev, options=options, seed=seed, tuning=tuning, out=out, resume=resume
        )
    return templates(
        backbone, generator, task, train, dev, options=options, seed=seed, tuning=tuning, out=out, resume=resume
    )


def _tuning(recipe: Recipe, backbone: Backbone, seed: int) -> Tuning | None:
    """How candidates are tuned: all of a block in common passes, each by itself."""
    import dataclasses

    import torch

    from deltaprompt.model import Model
    from deltaprompt.search import Tuning
    from deltaprompt.trainer import Plan, Silent, fit_many

    if not recipe.deltas:
        return None
    deltas = recipe.deltas

    def run(
        tasks: Sequence[Task], train: Sequence[Example], dev: Sequence[Example], asked: Sequence[Example]
    ) -> Tensor:
        model = Model(backbone, tasks, deltas, [seed] * len(tasks))
        plans = [Plan(train, dev, recipe.training, seed, name=str(n)) for n in range(len(tasks))]
        try:
            fit_many(model, plans, together=recipe.together, progress=Silent())
            return torch.stack([model.probabilities(asked, slot=slot) for slot in range(len(tasks))])
        finally:
            model.adapted.remove()

    return Tuning(run, {"deltas": repr(deltas), "training": dataclasses.asdict(recipe.training), "seed": seed})


def _measured(result: SearchResult, test: Sequence[Example], out: Path | None) -> SearchResult:
    measured = result.measured(test)
    seen = measured.looked_at["test"]["also in train or dev"]
    if seen:
        console.note(f"{seen} test rows are also among the rows that seed {result.session.seed} chose by")
    _write(None if out is None else out / f"seed-{result.session.seed}", measured)
    return measured


def _keep(folder: Path | None, result: SearchResult) -> None:
    """The chosen prompt as an adaptation of the frozen model, for `deltaprompt predict`."""
    if folder is None:
        return
    model = result.model()
    try:
        model.save(folder / CHOSEN)
    finally:
        model.adapted.remove()
    tuned = "" if result.session.tuning is None else " (without tuning; fit trains with its template and words)"
    console.note(f"use it: deltaprompt predict {shlex.quote(str(folder / CHOSEN))} FILE{tuned}")


def _write(folder: Path | None, found: SearchResult | Draws) -> None:
    """The result as JSON and as Markdown; each file is whole or not there."""
    from deltaprompt.store import write_text

    if folder is None:
        return
    texts = {"json": json.dumps(found.as_json(), ensure_ascii=False, indent=1), "md": found.markdown()}
    for ending, text in texts.items():
        write_text(folder / f"{RESULT}.{ending}", text + "\n")
