"""Tagging at the command line: fitting, predicting and measuring what finds spans of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltaprompt.cli import console
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from deltaprompt.cli.recipe import Recipe, TaggingTable
    from deltaprompt.model.tagger import Tagger
    from deltaprompt.model.tagging import Tagging
    from deltaprompt.trainer import SeedsResult
    from deltaprompt.types import Example

METRICS = {"f1": "F1", "precision": "precision", "recall": "recall", "macro_f1": "macro F1"}
ERRORS = {
    "fp": "words found where nothing is",
    "fn": "words missed",
    "within": "wrong fine type",
    "outer": "wrong type",
}


def tables(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the recipe's table of what is looked for; none where something else is asked for."""
    from deltaprompt.registry import variant_of

    if not given["find_spans"] and "tagging" not in recipe:
        return {}
    if given["find_spans"] and (given["chat"] or given["generate"] is not None):
        raise ConfigError("--tagging finds spans of texts, and --generate and --chat write texts; give one of them")
    verbalizer = given["verbalizer"]
    return {
        "tagging": {
            "verbalizer": variant_of("verbalizers", verbalizer) if verbalizer else None,
            "max_length": given["max_length"],
        }
    }


def run(recipe: Recipe, table: TaggingTable, resume: bool) -> SeedsResult:
    """Loads, trains and measures."""
    from deltaprompt.cli.data import test_share, training_file
    from deltaprompt.cli.seeds import called, deltas_of, fit_recipe
    from deltaprompt.cli.task import loaded
    from deltaprompt.data import few_sentences, hold_out
    from deltaprompt.data.samplers import dealt
    from deltaprompt.data.tagged import span_labels
    from deltaprompt.model.tagger import Tagger

    asked = recipe.data
    train: Sequence[Example] = rows(training_file(recipe))
    test: Sequence[Example] | None = None if asked.test is None else rows(asked.test)
    if (share := test_share(asked)) is not None:
        train, test = hold_out(train, share, 0)
    dev = None if asked.dev is None else rows(asked.dev)
    tagging = tagging_of(table, span_labels(train))
    backbone = loaded(dataclasses.replace(recipe.backbone, kind=recipe.backbone.kind or "encoder"))
    deltas = deltas_of(recipe, backbone)
    head = type(tagging.task.verbalizer).__name__
    types = ", ".join(tagging.types[:6]) + (", …" if len(tagging.types) > 6 else "")
    console.note(
        f"{recipe.backbone.name}: {len(tagging.types)} types of spans ({types}), "
        f"{tagging.scheme}, {called(recipe, deltas)}, {head}, {len(train):,} texts"
    )

    def deal(seed: int) -> tuple[Sequence[Example], Sequence[Example] | None]:
        return dealt(train, dev, recipe.shots, seed, asked.hold_out, few_sentences, hold_out)

    return fit_recipe(recipe, lambda seeds: Tagger(backbone, tagging, deltas, seeds), deal, test, resume)


def tagging_of(table: TaggingTable, types: Sequence[str]) -> Tagging:
    """What is looked for; the types of the data where the table has none."""
    from deltaprompt import registry
    from deltaprompt.model.tagging import Tagging

    own = table.verbalizer
    verbalizer = None if own is None else registry.from_description("verbalizers", own)
    return Tagging(table.types or tuple(types), table.scheme, verbalizer, table.max_length)


def rows(source: str, labelled: bool = True) -> list[Example]:
    """The rows of a file, or of a dataset on the hub: `hf:name`, `hf:name@split`."""
    from deltaprompt.cli.data import split_of
    from deltaprompt.data import read_tagged

    return read_tagged(*split_of(source), labelled=labelled)


def inputs(source: str, text: str | None, fields: Mapping[str, str]) -> Iterator[Example]:
    """What spans are looked for in: texts, or sentences whose words are known; in a .txt file a text is a line."""
    from deltaprompt.data import read_texts

    yield from rows(source, labelled=False) if _in_words(source) else read_texts(source, text, fields)


def _in_words(source: str) -> bool:
    from deltaprompt.data.columns import in_columns
    from deltaprompt.data.formats import rows_of
    from deltaprompt.data.tagged import WORDS

    if source == "-" or source.removesuffix(".gz").endswith(".txt"):
        return False
    first = None if in_columns(source) else next(rows_of(source, None), None)
    return in_columns(source) or (first is not None and any(isinstance(first.values.get(n), list) for n in WORDS))


def line(found: Mapping[str, Any]) -> str:
    """The entities of a text on one line."""
    return "\t".join(
        f"{' '.join(one['text'].split())} [{one['label']} {one['score']:.2f}]" for one in found["entities"]
    )


def evaluate(model: Tagger, folder: Path, file: str, batch_size: int, as_json: bool) -> None:
    """Prints how well spans are found."""
    examples = rows(file)
    told = {**model.evaluate(examples, batch_size), "examples": len(examples)}
    if as_json:
        console.print_json(told)
        return
    shown = [[called, f"{told[name]:.4f}"] for name, called in {**METRICS, **ERRORS}.items()]
    shown.append(["texts", f"{len(examples):,}"])
    console.output().print(console.table(["", str(folder)], shown))
