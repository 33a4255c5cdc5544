"""A frozen backbone asked through many templates and label words at once: class probabilities [t, n, c]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded, bucketed
from deltaprompt.features.batching import chunks
from deltaprompt.model import Model, Task
from deltaprompt.model.model import read
from deltaprompt.model.reader import of_rows
from deltaprompt.model.showing import shows
from deltaprompt.model.starting import calibrate, unlabelled_of
from deltaprompt.model.trainable import evaluating
from deltaprompt.types import Example
from deltaprompt.verbalizers._base import Verbalizer
from deltaprompt.verbalizers._words import tuple_of
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.soft import SoftVerbalizer

Place = tuple[int, int]  # which of the templates, and which row


@dataclass(frozen=True, eq=False)
class Frozen:
    """Asks a backbone that is as it was pretrained.

    Args:
        backbone: a language model, to which nothing is attached.
        support: the training rows, for verbalizers that start from some and calibrations that are measured on some.
        batch_size: rows in one pass, whatever their templates.
        seed: of the demonstrations that a template shows.
    """

    backbone: Backbone
    support: Sequence[Example]
    batch_size: int = 64
    seed: int = 0

    def probabilities(self, tasks: Sequence[Task], rows: Sequence[Example]) -> Tensor:
        """Class probabilities [t, n, c] of every row through every task, on the CPU.

        A text is run once for all tasks that read it alike, whose templates are the same and whose words are not.
        """
        found = torch.zeros(len(tasks), len(rows), len(tasks[0].names))
        with self._asking(tasks) as model, torch.inference_mode():
            alike = _alike(model)
            encoded = [model.encode(unlabelled_of(rows), slots[0]) for slots in alike]
            for part in self._parts(model, encoded, alike):
                for slot, own, p in self._asked(model, encoded, alike, part):
                    found[slot, own] = p
        return found

    def states(self, task: Task, rows: Sequence[Example]) -> Tensor:
        """The states [n, d] where the first token of an answer is read; the template shows no demonstrations."""
        plain = Task(task.template, task.names, SoftVerbalizer(), task.max_length)
        with evaluating(self.backbone.model), _model(self.backbone, [plain]) as model, torch.inference_mode():
            encoded = [model.encode(unlabelled_of(rows))]
            found = torch.zeros(len(rows), self.backbone.width, device=model.device)
            for part in self._parts(model, encoded, [[0]]):
                batch = model.features.collate([encoded[0][row] for _, row in part]).to(model.device)
                found[[row for _, row in part]] = read(self.backbone, batch, more=0).hidden[:, 0, 0].float()
        return found

    def whole_words(self, task: Task) -> dict[int, str]:
        """The tokens that are a word by themselves as it stands at the mask: id -> word."""
        plain = Task(task.template, task.names, SoftVerbalizer(), task.max_length)
        with _model(self.backbone, [plain]) as model:
            return {i: self.backbone.tokenizer.decode([i]).strip() for i in model.features.whole_words()}

    def model(self, task: Task) -> Model:
        """A model of one task, ready to answer, which is attached to the backbone until `adapted.remove()`."""
        check_answers(task.settled(self.backbone))
        model = Model(self.backbone, task, ())
        self._begin(model, [task])
        return model

    @contextmanager
    def _asking(self, tasks: Sequence[Task]) -> Iterator[Model]:
        """A model of the tasks, a slot each, ready to answer; afterwards the backbone is as it was."""
        for task in tasks:
            check_answers(task.settled(self.backbone))
        with evaluating(self.backbone.model), _model(self.backbone, tasks) as model:
            self._begin(model, tasks)
            yield model

    def _begin(self, model: Model, tasks: Sequence[Task]) -> None:
        """Gives each task what it needs of the training rows before it answers."""
        for slot, task in enumerate(tasks):
            if shows(task):
                model.demonstrate(self.support, slot, self.seed)
            model.start(self.support, slot, self.batch_size)
            calibrate(model, self.support, slot, self.batch_size)

    def _parts(
        self, model: Model, encoded: Sequence[Sequence[Encoded]], alike: Sequence[Sequence[int]]
    ) -> Iterator[list[Place]]:
        """Batches of places that can be run together.

        A left-to-right model reads a text before what a template adds behind it: the prompts of one text go together,
        and the text is run once. Elsewhere rows of one length do. Answers that go on are scored a template at a time,
        and so are templates with soft tokens, of which each slot has its own.
        """
        soft = any(True for _ in model.adapted.parts())
        together: dict[tuple[int, int, int], list[Place]] = {}
        for number, own in enumerate(encoded):
            continues = model.reader(alike[number][0]).reading.continues
            for row, one in enumerate(own):
                text = row if self.backbone.kind == "causal" and not continues else -1
                key = (text, number if continues or soft else -1, len(one.variants))
                together.setdefault(key, []).append((number, row))
        for places in together.values():
            if self.backbone.kind == "causal":
                parts = chunks(range(len(places)), self.batch_size)
            else:
                parts = bucketed([encoded[number][row].length for number, row in places], self.batch_size)
            for part in parts:
                yield [places[i] for i in part]

    def _asked(
        self,
        model: Model,
        encoded: Sequence[Sequence[Encoded]],
        alike: Sequence[Sequence[int]],
        part: Sequence[Place],
    ) -> Iterator[tuple[int, list[int], Tensor]]:
        """Of one batch: a slot, some rows, and their probabilities [rows, c] there."""
        batch = model.features.collate([encoded[number][row] for number, row in part]).to(model.device)
        first = alike[part[0][0]][0]
        model.adapted.route(first)
        reading = model.reader(first).reading
        repeated = model.adapted.repeated if reading.continues else None
        at = read(self.backbone, batch, repeated, more=reading.later)
        for number in dict.fromkeys(number for number, _ in part):
            own = [i for i, (other, _) in enumerate(part) if other == number]
            for slot in alike[number]:
                scores = model.reader(slot)(of_rows(at, own), model.seats[slot][1])
                yield slot, [part[i][1] for i in own], scores.float().softmax(-1).cpu()


def _alike(model: Model) -> list[list[int]]:
    """The slots that read a text alike."""
    found: dict[tuple[object, ...], list[int]] = {}
    for slot in range(model.adapted.slots):
        features = model.reader(slot).features
        own = None if features.template.demos is None else slot  # demonstrations show a task's own words
        found.setdefault((features.template, features.answer_lengths, features.max_length, own), []).append(slot)
    return list(found.values())


@contextmanager
def _model(backbone: Backbone, tasks: Sequence[Task]) -> Iterator[Model]:
    model = Model(backbone, tasks, (), [0] * len(tasks))
    try:
        yield model
    finally:
        model.adapted.remove()


def check_answers(verbalizer: Verbalizer) -> None:
    """An error where a verbalizer has to be trained before it answers."""
    if isinstance(verbalizer, SoftVerbalizer) and not verbalizer.words:
        raise ConfigError(
            "a search asks a frozen model, and a soft verbalizer that begins from no words has to be trained before it "
            "answers; give the task label words"
        )


def label_words(task: Task, backbone: Backbone) -> dict[str, tuple[str, ...]]:
    """The words of each label, where words are what stands for them."""
    settled = task.settled(backbone)
    if not isinstance(settled, LabelWords):
        raise ConfigError(
            f"this search needs label words, and the task has {type(settled).__name__}; give labels words and leave "
            "the verbalizer out, and load a language model (kind = 'masked', 'causal' or 'seq2seq')"
        )
    return {label: tuple_of(settled.words[label]) for label in task.names}
