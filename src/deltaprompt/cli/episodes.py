"""`deltaprompt episodes`: learn to learn from few examples, and measure it on episodes of labels never seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaprompt.cli import console, options
from deltaprompt.cli.pools import EpisodesTable, Pools, moves_in
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from deltaprompt.cli.recipe import Recipe
    from deltaprompt.model.episodic import Episodic
    from deltaprompt.trainer import SeedsResult

TABLE = "episodes"  # that only these recipes have
BATCH = 4  # episodes in one step, where nothing is said
METRICS = {"accuracy": "accuracy", "f1": "F1", "low": "from", "high": "to"}  # the interval's ends
OF_EPISODES = "Episodes"


def _option(name: str, help: str) -> Any:
    return typer.Option(name, help=help, rich_help_panel=OF_EPISODES, show_default=False, metavar="N")


Spans = Annotated[
    bool, typer.Option("--spans", help="Find spans of texts, and not labels of texts.", rich_help_panel=options.TASK)
]
Ways = Annotated[int | None, _option("--ways", "Labels an episode; default: 5.")]
Shots = Annotated[int | None, _option("--shots", "Of each label to learn from; default: 1.")]
Queries = Annotated[int | None, _option("--queries", "Of each label to tell; default: 1.")]
Episodes = Annotated[int | None, _option("--episodes", "To train on; default: 1000.")]
TestEpisodes = Annotated[int | None, _option("--test-episodes", "To measure on; default: 1000.")]


def episodes(
    context: typer.Context,
    recipe: options.RecipeFile = None,
    data: options.Train = None,
    test: options.Test = None,
    dev: options.Dev = None,
    text: options.Text = None,
    label: options.Label = None,
    spans: Spans = False,
    ways: Ways = None,
    shots: Shots = None,
    queries: Queries = None,
    number: Episodes = None,
    test_episodes: TestEpisodes = None,
    template: options.Template = None,
    verbalizer: options.VerbalizerOption = None,
    max_length: options.MaxLength = None,
    backbone: options.BackboneName = None,
    delta: options.Deltas = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seeds: options.Seeds = None,
    together: options.Together = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    learning_rate: options.LearningRate = None,
    precision: options.Precision = None,
    out: options.Out = None,
    resume: options.Resume = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Learn to learn from few examples, in episodes; and measure it on episodes of other labels."""
    from deltaprompt.cli import results
    from deltaprompt.trainer.accelerated import is_main

    chosen, table = _chosen(recipe, context.params)
    with console.resumable(chosen.out, resume):
        result = _run(chosen, table, resume)
    if not is_main():
        return
    if as_json:
        console.print_json(result.as_json())
        return
    results.show(result, METRICS, "f1" if table.spans else "accuracy")


def _chosen(path: Path | None, given: Mapping[str, Any]) -> tuple[Recipe, EpisodesTable]:
    """The recipe of a file, if there is one, and of options, which win; and its table of episodes."""
    from deltaprompt.cli.recipe import build, overlaid, read_toml, table_of
    from deltaprompt.registry import variant_of

    tables = {} if path is None else read_toml(path)
    own = tables.pop(TABLE, {})
    asked = {name: given[name] for name in ("ways", "shots", "queries")} | {"spans": given["spans"] or None}
    asked |= {"train": given["number"], "test": given["test_episodes"]}
    own = {**own, **{k: v for k, v in asked.items() if v is not None}} if isinstance(own, Mapping) else own
    table = table_of(EpisodesTable, own, f"[{TABLE}]")
    deltas, verbalizer = given["delta"], given["verbalizer"]
    over = {
        "backbone": {"name": given["backbone"], "device": given["device"], "dtype": given["dtype"]},
        "task": {
            "template": given["template"],
            "verbalizer": variant_of("verbalizers", verbalizer) if verbalizer else None,
            "max_length": given["max_length"],
        },
        "data": {"train": given["data"], **{name: given[name] for name in ("test", "dev", "text", "label")}},
        "training": {n: given[n] for n in ("epochs", "batch_size", "learning_rate", "precision")},
        "deltas": [] if deltas == ["none"] else [variant_of("deltas", each) for each in deltas] if deltas else None,
        **{name: given[name] for name in ("seeds", "together", "out")},
    }
    merged = overlaid({"training": {}, **tables}, over)
    training = merged["training"]
    merged["training"] = {"batch_size": BATCH, **({} if "steps" in training else {"epochs": 1}), **training}
    return build(merged), table


def _run(recipe: Recipe, table: EpisodesTable, resume: bool) -> SeedsResult:
    """Loads, trains on episodes of some labels, and measures on episodes of others."""
    from deltaprompt.cli.data import refuse, refuse_tables
    from deltaprompt.cli.seeds import called, deltas_of, fit_recipe
    from deltaprompt.cli.task import loaded
    from deltaprompt.model.learner import Learner

    if recipe.grid.axes or recipe.shots is not None:
        raise ConfigError("episodes have shots in [episodes] and labels of their own; leave other shots and [grid] out")
    refuse_tables(recipe, ("generation", "tagging", "masks", "pairs"), "episodes")
    refuse(recipe.data, ("test_share", "unlabelled", "hold_out", "types", "seen"), "episodes")
    refuse(recipe.task, ("labels", "order", "calibration", "several"), "episodes, whose labels are their own")
    asked = _episodic(recipe, table)
    pools = Pools.of(recipe, table, asked)
    if table.structured:
        asked = dataclasses.replace(asked, moves=moves_in(pools.train), tau=table.tau)
    kind = "encoder" if table.spans and recipe.backbone.kind is None else recipe.backbone.kind
    backbone = loaded(dataclasses.replace(recipe.backbone, kind=kind), [asked.template])
    deltas = deltas_of(recipe, backbone)
    test = pools.dealt("test", 0)
    counts = ", ".join(f"{len(vars(pools)[role]):,} {role}" for role in ("train", "dev", "test"))
    console.note(
        f"{recipe.backbone.name}: {table.ways} ways, {table.shots} shots, {type(asked.verbalizer).__name__}, "
        f"{called(recipe, deltas)}; rows: {counts}"
    )
    return fit_recipe(
        recipe,
        lambda seeds: Learner(backbone, asked, deltas, seeds),
        lambda seed: (pools.dealt("train", seed), pools.dealt("dev", seed) or None),
        test,
        resume,
    )


def _episodic(recipe: Recipe, table: EpisodesTable) -> Episodic:
    from deltaprompt import registry
    from deltaprompt.model.episodic import Episodic

    own = recipe.task.verbalizer
    more = {} if own is None else {"verbalizer": registry.from_description("verbalizers", own)}
    template, t = recipe.task.template or "{text}", table
    length = recipe.task.max_length
    return Episodic(template, spans=t.spans, max_length=length, steps=t.steps, rate=t.rate, legacy=t.legacy, **more)
