"""A recipe's tables as a backbone and a task; what they leave open is chosen by `deltaprompt.defaults`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deltaprompt import defaults, registry
from deltaprompt.backbone import Backbone, load
from deltaprompt.calibrations._base import Calibration
from deltaprompt.cli.recipe import BackboneTable, Labels, TaskTable, Words
from deltaprompt.data import read_label_words
from deltaprompt.errors import ConfigError
from deltaprompt.model import Task


def loaded(b: BackboneTable, templates: Sequence[str | None] = ("{mask}",)) -> Backbone:
    """The backbone of a recipe's table, for a task with these templates."""
    kind = defaults.kind_for(b.name, b.kind, templates)
    return load(b.name, kind=kind, device=b.device, dtype=b.dtype, attention=b.attention, revision=b.revision)


def task_for(table: TaskTable, backbone: Backbone, labels: Sequence[str]) -> Task:
    """The task of a recipe's table; `labels` are those of the data."""
    stands = stands_for(table.labels, table.order or labels, bool(table.order))
    calibration: Calibration | None = None
    if table.calibration is not None:
        calibration = registry.from_description("calibrations", table.calibration)
    given = (table.template, stands, table.verbalizer, table.max_length, calibration, table.several)
    return defaults.task_for(backbone, labels, *given)


def stands_for(
    given: Labels | None, labels: Sequence[str], ordered: bool = False
) -> Mapping[str, Words] | tuple[str, ...] | None:
    """What stands for labels; where that is a file of words, the words of these labels in it.

    A file that names no labels is read in their order, which must be known: numbers have one, names are given theirs.
    """
    if not isinstance(given, str):
        return given
    path, _, choice = given.rpartition("#") if given.rpartition("#")[2].isdecimal() else (given, "", "0")
    found = read_label_words(path, labels, int(choice))
    numbers = all(label.removeprefix("-").isdecimal() for label in labels)
    if not ordered and not numbers and read_label_words(path, [*labels][::-1], int(choice)) != found:
        raise ConfigError(
            f"{path} does not name its labels, and theirs ({', '.join(labels)}) have no order of their own; give "
            'order = ["…", …] in [task], or --order, the labels in the order of the file\'s lines'
        )
    return found
