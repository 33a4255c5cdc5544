"""`open_peft`: a PEFT folder on a backbone, by itself or with a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Adapted, carries_deltas
from deltaprompt.errors import ConfigError
from deltaprompt.interchange import cached, fields, ia3, lora, prefix, prompt
from deltaprompt.interchange.folder import CONFIG, Folder
from deltaprompt.interchange.folder import read as read_folder
from deltaprompt.interchange.forms import Opened
from deltaprompt.model import Model, Task
from deltaprompt.verbalizers._base import Started

READERS: Mapping[str, Callable[[Folder, Backbone], Opened]] = {
    fields.LORA: lora.read,
    fields.IA3: ia3.read,
    fields.PROMPT: prompt.read,
    fields.PREFIX: prefix.read,
}


@overload
def open_peft(folder: str | Path, backbone: Backbone) -> Adapted: ...
@overload
def open_peft(folder: str | Path, backbone: Backbone, task: Task) -> Model: ...
def open_peft(folder: str | Path, backbone: Backbone, task: Task | None = None) -> Adapted | Model:
    """A backbone with the deltas of a PEFT folder, which give the scores that peft's model of it gives; not training.

    LoRA (with rank and alpha patterns, rank-stabilised, DoRA), IA3, prompt tuning and prefix tuning. A soft prompt acts
    on virtual ids, `backbone.vocabulary` and on, that stand in front of the text; a `Model` puts them there itself.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        backbone: the model that the adapter was made for.
        task: where given, the result is a `Model` of it, whose label words or prototypes have their start.

    Raises:
        StoreError: a file is missing or damaged, the adapter is not of this backbone, or a field of its config changes
            what it computes in a way that has no form here.
    """
    if carries_deltas(backbone.model):
        raise ConfigError("this backbone already carries deltas, which would act here too; take them off it first")
    held = read_folder(folder)
    opened = READERS[fields.method_of(held.config, held.path / CONFIG)](held, backbone)
    model = _attached(opened, backbone, task).eval()
    adapted = model if isinstance(model, Adapted) else model.adapted
    fill(adapted, opened.tensors)
    _check(adapted, opened)
    if isinstance(model, Model) and isinstance(model.verbalizer, Started):
        _begin(model, model.verbalizer)
    return model


def _attached(opened: Opened, backbone: Backbone, task: Task | None) -> Adapted | Model:
    if task is None:
        return Adapted(backbone, opened.deltas)
    return Model(backbone, task, opened.deltas)


def _begin(model: Model, verbalizer: Started) -> None:
    """Gives prototypes their start where sentences describe the labels."""
    if verbalizer.texts(model.scorer.setting):
        model.start([])


def _check(adapted: Adapted, opened: Opened) -> None:
    """Takes the deltas away again where they do not do what the folder's do."""
    if opened.expected is None:
        return
    try:
        cached.check(adapted, 0, opened.expected)
    except Exception:
        adapted.remove()
        raise


@torch.no_grad()
def fill(adapted: Adapted, tensors: Mapping[str, Tensor]) -> None:
    """Writes a folder's tensors into the deltas that were made for them."""
    own = dict(adapted.parts())
    for name, tensor in tensors.items():
        own[name][0].copy_(tensor)
