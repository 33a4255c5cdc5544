"""Our own way: a task with its deltas on a backbone, all seeds of a cell trained in one pass where they can."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError, DeltaPromptError
from deltaprompt.model import Model, Task
from deltaprompt.model.class_scores import class_scores
from deltaprompt.model.label_metrics import auroc
from deltaprompt.model.starting import by_chance, unlabelled_of
from deltaprompt.study.data import Classes, DataSet, Sets, Shots
from deltaprompt.study.method import Entry, Method, Outcome
from deltaprompt.trainer import Plan, Progress, Run, Training
from deltaprompt.trainer.many import TOGETHER, train_many
from deltaprompt.trainer.objective import objective_of
from deltaprompt.trainer.settings import FREE

Answer = tuple[Classes, Tensor, Tensor]  # of test rows the classes and the largest scores, of texts outside the latter


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
        model = Model(self.backbone, task, self.deltas, (0, 1))
        try:
            features = model.features
            for label in data.labels:
                features.label_index(label)
            if features.template.demos is None:  # else its rows stand beside others first
                model.encode([data.train[0], data.test[0], *data.outside[:1]])
            learns = model.parameter_count() > 0 or objective_of(model).takes_examples(0)
            zero_shot = by_chance(model) is None and features.template.demos is None
        finally:
            model.adapted.remove()
        told = {"task": repr(task), "deltas": repr(list(self.deltas)), "training": settings, "dev": self.dev}
        return Entry(
            {"kind": "fit", "backbone": self.backbone.kind, **told}, self.backbone.fingerprint, zero_shot, learns
        )

    def ready(self) -> None:
        """Its entries are all that is checked."""

    def run(self, data: DataSet, shots: Shots, seeds: Sequence[int]) -> Sequence[Outcome | str]:
        sets = [data.draw(shots, seed, self.dev) for seed in seeds]
        model = Model(self.backbone, self._task(data), () if shots == 0 else self.deltas, seeds)
        try:
            begun = time.process_time()
            runs = self._fitted(model, data, seeds, sets)
            seconds = (time.process_time() - begun) / len(seeds)
            found = answers(model, [slot for slot, run in enumerate(runs) if not run.failed], data)
            return [run.failed or _outcome(found[slot], seconds, run, model, slot) for slot, run in enumerate(runs)]
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


def answers(model: Model, slots: Sequence[int], data: DataSet) -> dict[int, Answer]:
    """The likeliest class of every test row, and the largest score of every text, by slot; each text is read once."""
    each = zip(slots, *(class_scores(model, rows, slots) for rows in (data.test, data.outside)), strict=True)
    found = dict[int, Answer]()
    for slot, inside, outside in each:
        best = model.reader(slot).scorer.probabilities(inside).argmax(-1).tolist()
        labels = data.classes([model.task.names[i] for i in best])
        found[slot] = labels, inside.amax(-1), outside.amax(-1)
    return found


def _outcome(found: Answer, seconds: float, run: Run, model: Model, slot: int) -> Outcome | str:
    """What a seed came to; where its scores cannot be compared it has failed alone."""
    classes, inside, outside = found
    try:
        area = auroc(inside, outside) if len(outside) else None
    except DeltaPromptError as e:
        return str(e)
    return Outcome(classes, seconds, run.trainable, bytes_of(model, slot), area)


def bytes_of(model: Model, slot: int) -> int:
    """The bytes of a saved adaptation."""
    with tempfile.TemporaryDirectory() as folder:
        return model.save(folder, slot)
