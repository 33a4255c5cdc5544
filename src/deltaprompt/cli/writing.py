"""Generation at the command line: fitting, predicting and measuring what writes texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaprompt.cli import console
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from deltaprompt.cli.recipe import DataTable, Recipe
    from deltaprompt.model.generation import Chat, Generation
    from deltaprompt.model.generator import Generator
    from deltaprompt.trainer import SeedsResult
    from deltaprompt.types import Example

METRICS = {"bleu": "BLEU", "chrf": "chrF", "rougeL": "ROUGE-L", "loss": "loss", "perplexity": "perplexity"}
APART = ("bleu_seen", "bleu_unseen")


def tables(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the recipe's table of what is written; none where labels are asked for."""
    name = "chat" if given["chat"] else "generation" if given["generate"] is not None else None
    name = name or next((known for known in ("generation", "chat") if known in recipe), None)
    if name is None:
        return {}
    if given["chat"] and given["generate"] is not None:
        raise ConfigError(
            "--chat takes its prompts from conversations, and --generate from a template; give one of them"
        )
    told = {"template": given["generate"]} if name == "generation" else {}
    return {name: {**told, "max_length": given["max_length"]}}


def run(recipe: Recipe, generation: Generation | Chat, resume: bool) -> SeedsResult:
    """Loads, trains and measures."""
    from deltaprompt.cli.data import training_file
    from deltaprompt.cli.seeds import called, deltas_of, fit_recipe
    from deltaprompt.cli.task import loaded
    from deltaprompt.data import grouped, hold_out, told_apart
    from deltaprompt.data.samplers import dealt
    from deltaprompt.model.generation import Generation
    from deltaprompt.model.generator import Generator

    asked = recipe.data
    train = _rows(training_file(recipe), asked, generation)
    dev = None if asked.dev is None else _rows(asked.dev, asked, generation)
    test = None if asked.test is None else grouped(_rows(asked.test, asked, generation))
    if test is not None and asked.seen is not None:
        test = told_apart(test, train, asked.seen)
    backbone = loaded(recipe.backbone)
    deltas = deltas_of(recipe, backbone)
    what = f"after {generation.template!r}" if isinstance(generation, Generation) else "in conversations"
    console.note(f"{recipe.backbone.name}: texts {what}, {called(recipe, deltas)}, {len(train):,} rows")

    def deal(seed: int) -> tuple[Sequence[Example], Sequence[Example] | None]:
        return dealt(train, dev, None, seed, asked.hold_out, apart=hold_out)

    return fit_recipe(recipe, lambda seeds: Generator(backbone, generation, deltas, seeds), deal, test, resume)


def inputs(model: Generator, source: str, text: str | None, fields: Mapping[str, str]) -> Iterator[Example]:
    """What is to be gone on with: conversations, or the fields of prompts; a line of text is the prompt's one field."""
    from deltaprompt.data.chats import read_questions
    from deltaprompt.data.pairs import read_inputs
    from deltaprompt.model.generation import Chat
    from deltaprompt.types import Example

    if isinstance(model.generation, Chat):
        yield from read_questions(source)
        return
    wanted = model.features.template.fields
    own = {**fields, **({wanted[0]: text} if text is not None and len(wanted) == 1 else {})}
    for example in read_inputs(source, own):
        lacks = len(wanted) == 1 and wanted[0] not in example.fields and "text" in example.fields
        yield Example({wanted[0]: example.fields["text"]}) if lacks else example


def evaluate(
    model: Generator,
    folder: Path,
    file: str,
    target: str | None,
    fields: Mapping[str, str],
    batch_size: int,
    as_json: bool,
) -> None:
    """Prints how good a generator is on rows with right texts."""
    from deltaprompt.cli.recipe import DataTable
    from deltaprompt.data import grouped

    asked = DataTable(fields=fields) if target is None else DataTable(fields=fields, target=target)
    examples = grouped(_rows(file, asked, model.generation))
    told = {**model.evaluate(examples, batch_size), "examples": len(examples)}
    if as_json:
        console.print_json(told)
        return
    shown = [
        [METRICS.get(name, name), f"{value:,}" if name == "examples" else f"{value:.3f}"]
        for name, value in told.items()
    ]
    console.output().print(console.table(["", str(folder)], shown))


def called(test: Mapping[str, object]) -> dict[str, str]:
    """The metrics to show of a result, by name, and how they are called."""
    names = ("bleu", *APART, "chrf", "rougeL", "loss")
    return {name: METRICS.get(name) or f"BLEU {name.removeprefix('bleu_')}" for name in names if name in test}


def _rows(source: str, asked: DataTable, generation: Generation | Chat) -> list[Example]:
    """The rows of a file, or of a dataset on the hub."""
    from deltaprompt.cli.data import split_of
    from deltaprompt.data import read_chats, read_pairs
    from deltaprompt.model.generation import Chat

    if isinstance(generation, Chat):
        return read_chats(*split_of(source))
    name, split = split_of(source)
    return read_pairs(name, asked.target, asked.fields, split)
