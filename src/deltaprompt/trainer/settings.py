"""What a run's result depends on, told in a few words each, so that a run goes on only with the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deltaprompt.errors import ConfigError
from deltaprompt.model import Model
from deltaprompt.trainer.training import Training
from deltaprompt.types import Example

FREE = ("checkpoint_every", "checkpointing")  # options that change no number
Examples = Sequence[Example]


def check(model: Model, train: Examples, dev: Examples | None) -> None:
    """Raises where there is nothing to train, or nothing to train on."""
    if model.adapted.slots != 1:
        raise ConfigError(f"fit trains one adaptation, and this model has {model.adapted.slots}; make it with one seed")
    if model.parameter_count() == 0:
        raise ConfigError("nothing in this model trains: add a delta (lora, …) or a verbalizer that learns (soft)")
    if not train:
        raise ConfigError("there are no examples to train on")
    if dev is not None and not dev:
        raise ConfigError("the dev set has no examples; leave it out to train without one")
    for name, examples in (("train", train), ("dev", dev or [])):
        bare = next((i for i, e in enumerate(examples, 1) if e.label is None), None)
        if bare is not None:
            raise ConfigError(f"{name} example {bare} has no label; training needs one on each")


def settings_of(model: Model, train: Examples, dev: Examples | None, training: Training, seed: int) -> dict[str, Any]:
    """By name, as JSON."""
    chosen = {name: value for name, value in asdict(training).items() if name not in FREE}
    return {
        **{name: str(value) if value == math.inf else value for name, value in chosen.items()},
        "seed": seed,
        "backbone": f"{model.backbone.name} ({model.backbone.fingerprint})",
        "task": repr(model.task),
        "deltas": repr(model.chosen),
        "train": _told(train),
        "dev": _told(dev or []),
    }


def _told(examples: Examples) -> str:
    """The number of examples and a digest of them in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([sorted(example.fields.items()), example.label]).encode())
    return f"{len(examples)} examples ({digest.hexdigest()[:12]})"
