"""What a recipe leaves open is chosen: the demo's kind, and for backbone and data template, deltas and verbalizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deltaprompt import registry
from deltaprompt.backbone import Backbone, Kind, load
from deltaprompt.backbone.load import DEMO
from deltaprompt.calibrations._base import Calibration
from deltaprompt.cli.recipe import BackboneTable, Labels, TaskTable, Words
from deltaprompt.data import read_label_words
from deltaprompt.deltas._base import Delta
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError
from deltaprompt.model import Task
from deltaprompt.templates import parse
from deltaprompt.verbalizers._base import Verbalizer
from deltaprompt.verbalizers.hierarchical import Hierarchical
from deltaprompt.verbalizers.prototypes import Prototypes

TEMPLATES: Mapping[Kind, str] = {
    "encoder": "{text}",
    "masked": "{text} Category: {mask}",
    "causal": "{text} Category: {mask}",
    "seq2seq": "{text} Category: {mask}",
}


def loaded(b: BackboneTable, templates: Sequence[str | None] = ("{mask}",)) -> Backbone:
    """The backbone of a recipe's table; the demo is a sentence encoder where no template of a task has a `{mask}`."""
    encodes = b.kind is None and b.name == DEMO and not any(t is not None and parse(t).masks for t in templates)
    kind: Kind | None = "encoder" if encodes else b.kind
    return load(b.name, kind=kind, device=b.device, dtype=b.dtype, attention=b.attention, revision=b.revision)


def deltas_for(backbone: Backbone) -> tuple[Delta, ...]:
    """LoRA on every linear map of the layers: the best of what was tried on few-shot sets."""
    roles = [name for name, site in backbone.sites.items() if site.kind == "linear" and "layers." in name]
    return (LoRA(at=tuple(dict.fromkeys(name.partition("layers.")[2].partition(".")[2] for name in roles))),)


def task_for(table: TaskTable, backbone: Backbone, labels: Sequence[str]) -> Task:
    """The task of a recipe's table; `labels` are those of the data."""
    template = table.template or TEMPLATES[backbone.kind]
    given = stands_for(table.labels, table.order or labels, bool(table.order))
    calibration: Calibration | None = None
    if table.calibration is not None:
        calibration = registry.from_description("calibrations", table.calibration)
    task = Task(
        template, given or tuple(labels), max_length=table.max_length, calibration=calibration, several=table.several
    )
    return dataclasses.replace(task, verbalizer=_verbalizer(table, task, backbone))


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


def _verbalizer(table: TaskTable, task: Task, backbone: Backbone) -> Verbalizer:
    """The one asked for, told what stands for the labels where it does not say; numbers for labels tell it nothing."""
    mute = table.labels is None and all(name.removeprefix("-").isdecimal() for name in task.names)
    if table.verbalizer is None:
        chosen = task.settled(backbone)
        return Prototypes() if mute and isinstance(chosen, Prototypes) else chosen
    options = dict(table.verbalizer)
    cls = registry.variant("verbalizers", str(options.get("kind", "prototypes")))
    known = {f.name for f in dataclasses.fields(cls)}
    stands: dict[str, Any] = {
        "words": task.words(),
        "descriptions": {label: ", ".join(words) for label, words in task.words().items()},
    }
    splits_names = cls is Hierarchical and not isinstance(task.labels, Mapping)
    if backbone.kind == "encoder" or parse(task.template).masks > 1 or splits_names:
        del stands["words"]
    told = {name: value for name, value in stands.items() if name in known and not mute}
    made: Verbalizer = registry.from_description("verbalizers", {"kind": "prototypes", **told, **options})
    return made
