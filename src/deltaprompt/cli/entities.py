"""Entity typing at the command line: rows of mentions, all their types, and fitting from pairs, without labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaprompt.cli import console
from deltaprompt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from deltaprompt.backbone import Backbone
    from deltaprompt.cli.recipe import Recipe
    from deltaprompt.data.linked import Linked
    from deltaprompt.trainer import SeedsResult
    from deltaprompt.types import Example

FIELDS = frozenset(("left", "mention", "right"))
METRICS = {"loose_macro_f1": "loose macro F1", "loose_micro_f1": "loose micro F1"}


def asked_for(fields: Collection[str]) -> bool:
    """Whether templates with these fields read entity rows."""
    return FIELDS.issubset(fields)


def mentions(
    source: str, split: str | None, labelled: bool, on_empty: Callable[[str], None] | None, label: str | None
) -> list[Example]:
    """The mentions of a file; of plain texts, where no types are asked for, the names in them."""
    from deltaprompt.data import read
    from deltaprompt.data.columns import in_columns
    from deltaprompt.data.entities import read_entities
    from deltaprompt.data.formats import rows_of
    from deltaprompt.data.linked import find_mentions

    if not labelled and not in_columns(source):
        first = next(rows_of(source, split), None)
        if first is not None and not first.values.keys() & {"mention", "start", "tokens"}:
            found = find_mentions([row.fields["text"] for row in read(source, split=split, labelled=False)])
            console.note(f"{source} has texts and no mentions; {len(found):,} names in them are told by their capitals")
            return found
    return read_entities(source, split, labelled=labelled, on_empty=on_empty, label=label)


def types_in(path: str) -> tuple[str, ...]:
    """The names in a file of types, one a line."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the file of types cannot be read: {error}") from error
    names = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(names) < 2:
        raise DataError(f"{path} holds {len(names)} types; give two or more, one a line")
    return names


def shown_of(told: Mapping[str, Any]) -> dict[str, str]:
    """The metrics to show of a result, by name, and how they are called."""
    return {"accuracy": "accuracy", "macro_f1": "macro F1", **{n: name for n, name in METRICS.items() if n in told}}


def fit(recipe: Recipe, linked: Linked, backbone: Backbone, resume: bool) -> SeedsResult:
    """Trains on pairs of mentions without labels, and measures on test."""
    from deltaprompt.cli.data import fields_of, names_of, refuse, rows
    from deltaprompt.cli.fit import told
    from deltaprompt.cli.seeds import deltas_of, fit_recipe
    from deltaprompt.cli.task import task_for
    from deltaprompt.model import Model
    from deltaprompt.model.similar import Similar

    asked, fields = recipe.data, fields_of(recipe)
    if recipe.grid.axes or recipe.shots is not None:
        raise ConfigError("[pairs] trains without labels; leave [grid] and shots out")
    refuse(asked, ("dev", "test_share", "hold_out"), "[pairs], of which its own held_out are kept to choose by")
    if not asked_for(fields):
        raise ConfigError(
            "[pairs] are of entity rows; give [task] a template with the fields {left}, {mention} and {right}"
        )
    source = asked.unlabelled or asked.train
    if source is None:
        raise ConfigError('there are no mentions: give a recipe with unlabelled = "FILE" in [data]')
    found = rows(source, asked, fields, "unlabelled")
    labelled = [file for file in (asked.train, asked.test) if file is not None]
    train = rows(labelled[0], asked, fields, "test") if labelled and asked.types is None else []
    test = None if asked.test is None else rows(asked.test, asked, fields, "test")
    deltas = deltas_of(recipe, backbone)
    task = task_for(recipe.task, backbone, names_of(asked, train))
    told(recipe, [task], deltas, backbone.kind)

    def deal(seed: int) -> tuple[list[Example], list[Example] | None]:
        pairs, dev = linked.dealt(found, seed)
        console.note(f"seed {seed}: {len(pairs):,} pairs of sentences, {len(dev):,} to choose by")
        return pairs, dev or None

    return fit_recipe(recipe, lambda seeds: Similar(Model(backbone, task, deltas, seeds)), deal, test, resume)
