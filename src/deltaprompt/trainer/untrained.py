"""Fitting a model in which nothing trains: it takes what it needs of the examples, is measured on dev and is kept."""

from __future__ import annotations

import time
from dataclasses import replace

from deltaprompt.model import Model
from deltaprompt.model.generator import Trainable
from deltaprompt.model.starting import calibrate
from deltaprompt.trainer import failures
from deltaprompt.trainer.accelerated import Lone, is_main
from deltaprompt.trainer.kept import Kept
from deltaprompt.trainer.measure import measured
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.run import Run
from deltaprompt.verbalizers._base import Started


def takes_examples(model: Model, slot: int) -> bool:
    """Whether examples change its answers though nothing trains: it shows them, starts from them, or is calibrated."""
    reader = model.reader(slot)
    shows = reader.features.template.demos is not None
    return shows or reader.task.calibration is not None or isinstance(reader.verbalizer, Started)


def prepare(model: Model, plan: Plan, slot: int) -> None:
    """A template that shows demonstrations and has none is given the training rows; before texts are read."""
    features = model.reader(slot).features
    if features.template.demos is not None and features.demonstrations is None:
        model.demonstrate(plan.train, slot, plan.seed)


def begin(model: Model, plan: Plan, slot: int) -> None:
    """A verbalizer is given its start, and a calibration is measured."""
    rows = plan.training.batch_size
    model.start(plan.train, slot, rows, plan.unlabelled)
    calibrate(model, plan.unlabelled or plan.train, slot, rows)


def given(model: Trainable, plan: Plan, slot: int, kept: Kept | None) -> Run:
    """The run of a slot in which nothing trains, of no step."""
    assert isinstance(model, Model)  # a generator takes no examples otherwise
    clock = time.perf_counter()
    with failures.of_memory(plan.training):
        begin(model, plan, slot)
        dev = model.encode(plan.dev, slot) if plan.dev else []
        metrics = measured(Lone(model), model, dev, plan.training.batch_size, slot) if dev else {}
    run = Run(0, 0.0, 0, metrics, [], time.perf_counter() - clock, "done", 0)
    if kept is None or not is_main():
        return run
    return replace(run, bytes=kept.write(model, slot, metrics, run))
