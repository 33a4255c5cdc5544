"""Our own way: a task with its deltas on a backbone, all seeds of a cell trained in one pass where they can."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from deltaprompt.backbone import Backbone
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError
from deltaprompt.model import Model, Task
from deltaprompt.model.starting import check_ready, unlabelled_of
from deltaprompt.model.trainable import evaluating
from deltaprompt.study.data import DataSet, Sets, Shots
from deltaprompt.study.method import Entry, Method, Outcome
from deltaprompt.trainer import Plan, Progress, Run, Training
from deltaprompt.trainer.many import TOGETHER, train_many
from deltaprompt.trainer.objective import objective_of
from deltaprompt.trainer.settings import FREE
from deltaprompt.types import Example


@dataclass(frozen=True, eq=False)
class Trained(Method):
    """A task with deltas, as `fit` trains it; with 0 shots without deltas, as it is.

    Args:
        name: its own.
        backbone: what it adapts.
        task: what is asked, of all data sets or by the name of each.
        deltas: in the order in which they act.
        training: how.
        dev: whether it chooses its best by rows that it does not train on.
        together: seeds in one pass at most.
        progress: a bar on a terminal where not given.
    """

    name: str
    backbone: Backbone
    task: Task | Mapping[str, Task]
    deltas: Sequence[Delta] = ()
    training: Training = Training()  # noqa: RUF009  frozen
    dev: bool = True
    together: int = TOGETHER
    progress: Progress | None = None

    def entry(self, data: DataSet) -> Entry:
        task, settings = self._task(data), {n: v for n, v in asdict(self.training).items() if n not in FREE}
        model = Model(self.backbone, task, self.deltas)
        try:
            features = model.features
            for label in data.labels:
                features.label_index(label)
            if features.template.demos is None:  # else its rows stand beside others first
                model.encode([data.train[0], data.test[0]])
            learns = model.parameter_count() > 0 or objective_of(model).takes_examples(0)
        finally:
            model.adapted.remove()
        told = {"task": repr(task), "deltas": repr(list(self.deltas)), "training": settings, "dev": self.dev}
        return Entry({"kind": "fit", "backbone": self.backbone.kind, **told}, self.backbone.fingerprint, True, learns)

    def ready(self) -> None:
        """Its entries are all that is checked."""

    def run(self, data: DataSet, shots: Shots, seeds: Sequence[int]) -> Sequence[Outcome | str]:
        sets = [data.draw(shots, seed, self.dev) for seed in seeds]
        model = Model(self.backbone, self._task(data), () if shots == 0 else self.deltas, seeds)
        try:
            begun = time.process_time()
            runs = self._fitted(model, data, seeds, sets)
            seconds = (time.process_time() - begun) / len(seeds)
            found = answers(model, [slot for slot, run in enumerate(runs) if not run.failed], data.test)
            return [
                run.failed or Outcome(data.classes(found[slot]), seconds, run.trainable, bytes_of(model, slot))
                for slot, run in enumerate(runs)
            ]
        finally:
            model.adapted.remove()

    def _fitted(self, model: Model, data: DataSet, seeds: Sequence[int], sets: Sequence[Sets]) -> list[Run]:
        texts = data.unlabelled or (() if sets[0][0] else unlabelled_of(data.train))
        plans = [Plan(*own, self.training, seed, unlabelled=texts) for seed, own in zip(seeds, sets, strict=True)]
        return train_many(model, plans, together=self.together, out=None, resume=False, progress=self.progress)

    def _task(self, data: DataSet) -> Task:
        if isinstance(self.task, Task):
            return self.task
        if data.name not in self.task:
            raise ConfigError(f"method {self.name!r} has no task for {data.name!r}; it has {', '.join(self.task)}")
        return self.task[data.name]


@torch.inference_mode()
def answers(model: Model, slots: Sequence[int], test: Sequence[Example]) -> dict[int, list[str]]:
    """The likeliest label of every row by slot; a backbone on which nothing acts is run once for all slots."""
    if not slots:
        return {}
    if len(model.readers) > 1 or any(True for _ in model.adapted.parts()):
        return {slot: _labels(model, model.probabilities(test, slot=slot).argmax(-1).tolist()) for slot in slots}
    for slot in slots:
        check_ready(model.reader(slot), model.seats[slot][1])
    best = torch.zeros(len(slots), len(test), dtype=torch.long)
    with evaluating(model):
        for batch in model.features.batches(model.features.encode(unlabelled_of(test)), 32):
            at = model.at_mask(batch.to(model.device), 0)
            for number, slot in enumerate(slots):
                scores = model.reader(slot).scorer.probabilities(model.scores(at, slot))
                best[number, batch.index] = scores.argmax(-1).cpu()
    return {slot: _labels(model, row) for slot, row in zip(slots, best.tolist(), strict=True)}


def _labels(model: Model, classes: Sequence[int]) -> list[str]:
    return [model.task.names[i] for i in classes]


def bytes_of(model: Model, slot: int) -> int:
    """The bytes of a saved adaptation."""
    with tempfile.TemporaryDirectory() as folder:
        return model.save(folder, slot)
