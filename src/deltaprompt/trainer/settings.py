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
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.untrained import takes_examples
from deltaprompt.types import Example

FREE = ("checkpoint_every", "checkpointing", "keep")  # options that change no number (the last: up to rounding)
Examples = Sequence[Example]


def check(model: Model, slot: int, plan: Plan) -> None:
    """Raises where there is nothing to train, or nothing to train on."""
    if model.parameter_count(slot) == 0 and not takes_examples(model, slot):
        raise ConfigError(
            "nothing in this model trains: add a delta (lora, …) or a verbalizer that learns (soft); or let it take "
            "examples without training, as demonstrations ({demos:4} in the template) or for a calibration"
        )
    if not plan.train:
        raise ConfigError("there are no examples to train on")
    if plan.dev is not None and not plan.dev:
        raise ConfigError("the dev set has no examples; leave it out to train without one")
    for name, examples in (("train", plan.train), ("dev", plan.dev or [])):
        bare = next((i for i, e in enumerate(examples, 1) if e.label is None), None)
        if bare is not None:
            raise ConfigError(f"{name} example {bare} has no label; training needs one on each")


def settings_of(model: Model, slot: int, plan: Plan) -> dict[str, Any]:
    """By name, as JSON."""
    shown = model.reader(slot).features.demonstrations
    chosen = {name: value for name, value in asdict(plan.training).items() if name not in FREE}
    return {
        **{name: str(value) if value == math.inf else value for name, value in chosen.items()},
        "seed": plan.seed,
        "backbone": f"{model.backbone.name} ({model.backbone.fingerprint})",
        "task": repr(model.reader(slot).task),
        "deltas": repr(model.chosen),
        "train": _told(plan.train),
        "dev": _told(plan.dev or []),
        **({"unlabelled": _told(plan.unlabelled)} if plan.unlabelled else {}),
        **({"demonstrations": _told(shown.rows)} if shown is not None else {}),
    }


def _told(examples: Examples) -> str:
    """The number of examples and a digest of them in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([sorted(example.fields.items()), example.label]).encode())
    return f"{len(examples)} examples ({digest.hexdigest()[:12]})"
