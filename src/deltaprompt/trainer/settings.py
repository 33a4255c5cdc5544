"""What a run's result depends on, told in a few words each, so that a run goes on only with the same."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from deltaprompt.errors import ConfigError
from deltaprompt.model.trainable import Trainable
from deltaprompt.trainer.objective import objective_of
from deltaprompt.trainer.plan import Plan, told

FREE = ("checkpoint_every", "checkpointing", "keep")  # options that change no number (the last: up to rounding)


def check(model: Trainable, slot: int, plan: Plan) -> None:
    """Raises where there is nothing to train, or nothing to train on."""
    objective, zero_shot = objective_of(model), not plan.train and bool(plan.unlabelled)
    if plan.unlabelled and not objective.takes_unlabelled():
        raise ConfigError(
            f"{len(plan.unlabelled)} unlabelled texts, and nothing is done with them by a {type(model).__name__}; "
            "leave them out"
        )
    if not zero_shot and model.parameter_count(slot) == 0 and not objective.takes_examples(slot):
        raise ConfigError(
            "nothing in this model trains: add a delta (lora, …) or a verbalizer that learns (soft); or let it take "
            "examples without training, as demonstrations ({demos:4} in the template) or for a calibration"
        )
    if not plan.train and not zero_shot:
        raise ConfigError(
            "there are no examples to train on; to answer without any, give texts of the task as unlabelled ones"
        )
    if plan.dev is not None and not plan.dev:
        raise ConfigError("the dev set has no examples; leave it out to train without one")
    for name, examples in (("train", plan.train), ("dev", plan.dev or [])):
        objective.check(name, examples)


def settings_of(model: Trainable, slot: int, plan: Plan) -> dict[str, Any]:
    """By name, as JSON."""
    chosen = {name: value for name, value in asdict(plan.training).items() if name not in FREE}
    return {
        **{name: str(value) if value == math.inf else value for name, value in chosen.items()},
        "seed": plan.seed,
        "backbone": f"{model.backbone.name} ({model.backbone.fingerprint})",
        **objective_of(model).told(slot),
        "deltas": repr(model.chosen),
        "train": told(plan.train),
        "dev": told(plan.dev or []),
        **({"unlabelled": told(plan.unlabelled)} if plan.unlabelled else {}),
    }
