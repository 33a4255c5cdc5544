"""The rows that a recipe names, and which of them each seed trains on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from deltaprompt.cli import entities
from deltaprompt.cli.console import note
from deltaprompt.cli.recipe import DataTable, Recipe, TaskTable, pairs
from deltaprompt.data import labels_of, read, read_relations, read_texts, split
from deltaprompt.data.formats import HUB
from deltaprompt.data.readers import STDIN
from deltaprompt.data.samplers import dealt
from deltaprompt.defaults import TEMPLATES
from deltaprompt.errors import ConfigError, DataError, nearest
from deltaprompt.templates import parse
from deltaprompt.types import Example

SPLITS = {
    "train": "train",
    "dev": "validation",
    "test": "test",
    "unlabelled": "unsupervised",
    "outside": "test",
}  # the usual names of a hub dataset's splits
MARKED = frozenset(("marked", "first", "between", "second"))  # fields that rows of relations have
Sets = tuple[Sequence[Example], Sequence[Example] | None]


def rows(source: str, asked: DataTable, fields: Collection[str], role: str) -> list[Example]:
    """The rows of a file, or of a dataset on the hub: `hf:name`, `hf:name@split`.

    Labels are read but for the roles "unlabelled" and "outside".
    """
    name, wanted = split_of(source, SPLITS[role])
    text = asked.text or asked.fields.get("text") or ("text" if "text" in fields else None)
    own = {key: column for key, column in asked.fields.items() if key != "text"}
    dropped: list[str] = []
    on_empty = dropped.append if asked.drop_empty else None
    labelled = role not in ("unlabelled", "outside")
    if entities.asked_for(fields):
        found = entities.mentions(name, wanted, labelled, on_empty, None if asked.label == "label" else asked.label)
    elif MARKED & set(fields):
        column = "relation" if asked.label == "label" else asked.label
        found = read_relations(name, wanted, labelled=labelled, label=column, on_empty=on_empty)
    else:
        found = read(name, text=text, label=asked.label, fields=own, split=wanted, labelled=labelled, on_empty=on_empty)
    if dropped:
        note(f"{source}: left out {len(dropped)} of {len(found) + len(dropped)} rows, the first: {dropped[0]}")
    return found


def split_of(source: str, usual: str = "train") -> tuple[str, str | None]:
    """A source without its split, and its split: that of `hf:name@split`, of `hf:name` the usual; a file has none."""
    if not source.startswith(HUB):
        return source, None
    name, at, split = source.partition("@")
    return name, split if at else usual


def labelled_rows(source: str, given: Mapping[str, Any], fields: Collection[str]) -> list[Example]:
    """The rows to measure an adaptation with these fields on, as the options of its command say."""
    return rows(source, _asked(given), fields, "test")


def outside_rows(source: str, given: Mapping[str, Any], fields: Collection[str]) -> list[Example]:
    """Texts that belong to none of the labels, as the options say; - for standard input."""
    asked = _asked(given)
    return (
        list(read_texts(source, asked.text, asked.fields))
        if source == STDIN
        else rows(source, asked, fields, "outside")
    )


def _asked(given: Mapping[str, Any]) -> DataTable:
    """What the options of a command say of rows."""
    own = pairs(given["field"] or [], "--field")
    return DataTable(text=given["text"], label=given["label"] or "label", fields=own, drop_empty=given["drop_empty"])


def apart(asked: DataTable, train: list[Example]) -> tuple[Sequence[Example], Sequence[Example] | None]:
    """The training rows, and the share of them that is kept to measure on, where one is asked for."""
    share = test_share(asked)
    return (train, None) if share is None else split(train, share, 0)


def test_share(asked: DataTable) -> float | None:
    """The share of the training rows to measure on, where there is no file for it."""
    if asked.test_share is not None and asked.test is not None:
        raise ConfigError(
            f"test = {asked.test!r} and test_share = {asked.test_share} were both given; give one of them"
        )
    return asked.test_share


def refuse(asked: DataTable | TaskTable, keys: Sequence[str], where: str) -> None:
    """Raises where a table has a key that nothing would be done with."""
    table = "data" if isinstance(asked, DataTable) else "task"
    for key in keys:
        if vars(asked)[key] != vars(type(asked)())[key]:
            raise ConfigError(f"{key} in [{table}] is not for {where}; leave it out")


def refuse_tables(recipe: Recipe, names: Sequence[str], where: str) -> None:
    """Raises where a recipe has a table that nothing would be done with."""
    for name in names:
        if vars(recipe)[name] is not None:
            raise ConfigError(f"[{name}] is not for {where}; leave it out")


class Deal:
    """The training and dev examples of each seed."""

    def __init__(self, recipe: Recipe, train: Sequence[Example], dev: Sequence[Example] | None) -> None:
        self.recipe = recipe
        self.train = train
        self.dev = dev

    def __call__(self, seed: int) -> Sets:
        """Shots from the training rows, with as many to choose by; without shots all rows, a tenth of them held out.

        With 0 shots none: their texts are then the unlabelled ones.
        """
        if self.recipe.shots == 0:
            return [], None
        train, dev = dealt(self.train, self.dev, self.recipe.shots, seed, self.recipe.data.hold_out)
        return train, dev or None


def fields_of(recipe: Recipe) -> frozenset[str]:
    """The fields that a recipe's templates have, of a grid all of them together."""
    templates = recipe.grid.template or (recipe.task.template or TEMPLATES["encoder"],)
    return frozenset(name for template in templates for name in parse(template).fields)


def names_of(asked: DataTable, train: Sequence[Example]) -> tuple[str, ...]:
    """The labels: those of a file that has all, else the data's."""
    names = labels_of(train) if asked.types is None else entities.types_in(asked.types)
    if len(names) == 1:
        raise DataError(
            f"all {len(train):,} rows of {asked.train} have the label {names[0]!r}; give rows of two or more"
        )
    return names


def check_labels(rows: Sequence[Example] | None, names: Sequence[str], source: str | None) -> None:
    """Raises where a row has a label that the task has not."""
    known = frozenset(names)
    for number, row in enumerate(rows or (), 1):
        for label in row.gold:
            if label not in known:
                raise DataError(
                    f"{source}, row {number}: no training row has the label {label!r:.60}{nearest(label, names)}; give "
                    "training rows of it, or remove the row"
                )


def training_file(recipe: Recipe) -> str:
    """The file to train on, which alone has no default."""
    if recipe.data.train is None:
        raise ConfigError('there is no training data: give --data FILE, or a recipe with train = "FILE" in [data]')
    return recipe.data.train
