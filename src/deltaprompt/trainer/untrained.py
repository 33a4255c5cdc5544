"""Fitting a model in which nothing trains: it takes what it needs of the examples, is measured on dev and is kept."""

from __future__ import annotations

import time
from dataclasses import replace

from deltaprompt.model.trainable import Trainable
from deltaprompt.trainer import failures
from deltaprompt.trainer.accelerated import Lone, is_main
from deltaprompt.trainer.kept import Kept
from deltaprompt.trainer.objective import objective_of
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.run import Run


def given(model: Trainable, plan: Plan, slot: int, kept: Kept | None) -> Run:
    """The run of a slot in which nothing trains, of no step."""
    objective, clock = objective_of(model), time.perf_counter()
    with failures.of_memory(plan.training):
        objective.start(slot, plan)
        dev = model.encode(plan.dev, slot) if plan.dev else []
        metrics = model.measure(dev, plan.training.batch_size, slot, Lone(model)) if dev else {}
    run = Run(0, 0.0, 0, metrics, [], time.perf_counter() - clock, "done", 0)
    if kept is None or not is_main():
        return run
    return replace(run, bytes=kept.write(model, slot, metrics, run))
