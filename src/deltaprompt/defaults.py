"""What is left open is chosen: the demo's kind, and for backbone and data template, deltas and verbalizer.

So the command line and the estimators choose alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaprompt import registry
from deltaprompt.backbone import Backbone, Kind
from deltaprompt.backbone.load import DEMO
from deltaprompt.calibrations._base import Calibration
from deltaprompt.deltas._base import Delta
from deltaprompt.deltas.lora import LoRA
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


def kind_for(name: str | Path, kind: Kind | None, templates: Sequence[str | None]) -> Kind | None:
    """The kind to load; the demo is a sentence encoder where none is asked for and no template has a `{mask}`."""
    encodes = kind is None and str(name) == DEMO and not any(t is not None and parse(t).masks for t in templates)
    return "encoder" if encodes else kind


def deltas_for(backbone: Backbone) -> tuple[Delta, ...]:
    """LoRA on every linear map of the layers: the best of what was tried on few-shot sets."""
    roles = [name for name, site in backbone.sites.items() if site.kind == "linear" and "layers." in name]
    return (LoRA(at=tuple(dict.fromkeys(name.partition("layers.")[2].partition(".")[2] for name in roles))),)


def task_for(
    backbone: Backbone,
    names: Sequence[str],
    template: str | None = None,
    stands: Mapping[str, str | Sequence[str]] | Sequence[str] | None = None,
    verbalizer: Verbalizer | Mapping[str, Any] | None = None,
    max_length: int | None = None,
    calibration: Calibration | None = None,
    several: bool = False,
) -> Task:
    """The task of these labels.

    Args:
        backbone: what it is for.
        names: the labels of the data.
        template: the usual one of the backbone's kind where not given.
        stands: for each label the words or the sentence that stand for it; where not given they stand for themselves.
        verbalizer: also by its kind and options, and then told what stands for the labels where these do not say.
        max_length: as a `Task` has it.
        calibration: as a `Task` has it.
        several: as a `Task` has it.
    """
    task = Task(
        template or TEMPLATES[backbone.kind],
        stands or tuple(names),
        max_length=max_length,
        calibration=calibration,
        several=several,
    )
    if not isinstance(verbalizer, Verbalizer):
        verbalizer = _verbalizer(verbalizer, task, backbone, named=stands is not None)
    return dataclasses.replace(task, verbalizer=verbalizer)


def _verbalizer(given: Mapping[str, Any] | None, task: Task, backbone: Backbone, named: bool) -> Verbalizer:
    """The one asked for, told what stands for the labels where it does not say; numbers for labels tell it nothing."""
    mute = not named and all(name.removeprefix("-").isdecimal() for name in task.names)
    if given is None:
        chosen = task.settled(backbone)
        return Prototypes() if mute and isinstance(chosen, Prototypes) else chosen
    cls = registry.variant("verbalizers", str(given.get("kind", "prototypes")))
    known = {f.name for f in dataclasses.fields(cls)}
    stands: dict[str, Any] = {
        "words": task.words(),
        "descriptions": {label: ", ".join(words) for label, words in task.words().items()},
    }
    splits_names = cls is Hierarchical and not isinstance(task.labels, Mapping)
    if backbone.kind == "encoder" or parse(task.template).masks > 1 or splits_names:
        del stands["words"]
    told = {name: value for name, value in stands.items() if name in known and not mute}
    made: Verbalizer = registry.from_description("verbalizers", {"kind": "prototypes", **told, **given})
    return made
