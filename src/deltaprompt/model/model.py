"""The forward path: template and deltas in front, states where the answer is read, the verbalizer behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.continuation import prompted
from deltaprompt.backbone.shared import Begun, begun, states_after
from deltaprompt.compose import Adapted, Index, carries_deltas, instances
from deltaprompt.compose.routing import check_slot
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded, Features
from deltaprompt.model import starting
from deltaprompt.model.class_scores import class_scores
from deltaprompt.model.label_metrics import auroc, measured, measures
from deltaprompt.model.reader import Reader, Scorer, check_alike, of_rows, of_template, placed
from deltaprompt.model.several import LEAST, chosen
from deltaprompt.model.showing import demonstrate, shows
from deltaprompt.model.starting import check_labelled
from deltaprompt.model.task import Task
from deltaprompt.model.trainable import Trainable
from deltaprompt.model.virtual import begin_from_words, check_room
from deltaprompt.registry import describe as described
from deltaprompt.types import AtMask, Batch, Example
from deltaprompt.verbalizers._base import Verbalizer, normalised, pooled


class Model(Trainable):
    """A backbone adapted to a task. `forward` maps a `Batch` to `{"loss", "logits"}`: any trainer can train it.

    Args:
        backbone: it is frozen until `adapted.remove()`.
        task: what is asked; of several adaptations perhaps one each, which then have the same labels.
        deltas: in the order in which they act, the same for all adaptations.
        seeds: one an adaptation; what it starts from.
    """

    def __init__(
        self, backbone: Backbone, task: Task | Sequence[Task], deltas: Sequence[Delta], seeds: Sequence[int] = (0,)
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.once = None
        tasks = [task] * len(seeds) if isinstance(task, Task) else list(task)
        if len(tasks) != len(seeds):
            raise ConfigError(f"{len(tasks)} tasks for {len(seeds)} seeds; give one task for all, or one a seed")
        # equal labels may stand in another order; each adaptation has demonstrations of its own
        told = [(task, task.names, slot if shows(task) else -1) for slot, task in enumerate(tasks)]
        distinct = [one for i, one in enumerate(told) if one not in told[:i]]
        numbers = [distinct.index(one) for one in told]
        made = [Reader(backbone, task, instances(deltas), numbers.count(n)) for n, (task, *_) in enumerate(distinct)]
        check_alike(made)  # whatever is wrong is said before anything is attached
        if carries_deltas(backbone.model):
            raise ConfigError(
                "this backbone already carries another model's deltas, which would act here too; take them off it with "
                "that model's .adapted.remove(), or load the backbone again"
            )
        self.adapted = Adapted(backbone, placed(deltas, made[0].features), len(seeds), seeds)
        self.readers = nn.ModuleList(made)
        self.seats = tuple((n, numbers[:i].count(n)) for i, n in enumerate(numbers))  # of a slot: reader, slot there
        for number, reader in enumerate(made):
            reader.scorer.start([seed for seed, n in zip(seeds, numbers, strict=True) if n == number])
        begin_from_words(backbone, self.adapted, [self.reader(slot).features for slot in range(len(seeds))])
        self.train(False)

    @property
    def chosen(self) -> tuple[Delta, ...]:
        """The task's deltas; those that its template asks for come before them."""
        return self.adapted.deltas[len(of_template(self.features)) :]

    def reader(self, slot: int = 0) -> Reader:
        """How an adaptation's texts are read and scored."""
        check_slot(slot, self.adapted.slots)
        return cast(Reader, self.readers[self.seats[slot][0]])

    @property
    def task(self) -> Task:
        """What is asked; of several tasks the first adaptation's."""
        return self.reader().task

    @property
    def features(self) -> Features:
        """How texts become token ids; of several tasks the first adaptation's."""
        return self.reader().features

    @property
    def scorer(self) -> Scorer:
        """The verbalizer with its tensors; of several tasks the first adaptation's."""
        return self.reader().scorer

    @property
    def verbalizer(self) -> Verbalizer:
        """The verbalizer in use; of several tasks the first adaptation's."""
        return self.reader().verbalizer

    def forward(self, batch: Batch, adaptation: Index = None, sizes: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Class scores `logits` [b, c] and, where the batch has labels, the `loss`: the verbalizer's, or cross-entropy.

        Args:
            batch: b rows.
            adaptation: whose they are: a slot, or one a row [b].
            sizes: where rows of several adaptations stand one after another, the rows of each; `losses` are theirs.
        """
        at = self.at_mask(batch, adaptation)
        logits = self.scores(at, adaptation)
        if batch.labels is None:
            return {"logits": logits}
        each = self.losses(at, logits, batch.labels, adaptation, sizes)
        return {"loss": each.mean(), "losses": each, "logits": logits}

    def losses(
        self, at: AtMask, logits: Tensor, classes: Tensor, adaptation: Index = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """The loss of each adaptation's rows, from their scores [b, c]; see `forward`."""
        parts = torch.arange(len(logits), device=logits.device).split(list(sizes or [len(logits)]))
        return torch.stack([self._loss(at, logits, classes, rows, adaptation) for rows in parts])

    def _loss(self, at: AtMask, logits: Tensor, classes: Tensor, rows: Tensor, adaptation: Index) -> Tensor:
        """The loss of rows of one adaptation."""
        slot = int(adaptation[rows[0]]) if isinstance(adaptation, Tensor) else adaptation or 0
        number, place = self.seats[slot]
        return cast(Reader, self.readers[number]).loss(of_rows(at, rows), logits[rows], classes[rows], place)

    def log_distributions(self, batch: Batch, adaptation: Index = None) -> Tensor:
        """log of a distribution over the labels [b, c], also where several may be right, of which one would then be."""
        return normalised(self.scores(self.at_mask(batch, adaptation), adaptation, of_one=True))

    def at_mask(self, batch: Batch, adaptation: Index = None) -> AtMask:
        """The states where the answer is read, and the head that scores words there."""
        self.adapted.route(adaptation)
        reading = [cast(Reader, self.readers[n]) for n in self._numbers(adaptation)]
        continues = any(reader.reading.continues for reader in reading)
        if continues and len(reading) > 1:
            raise ConfigError(
                "answers of several tokens are scored one task at a time; give a batch of one task's rows"
            )
        with self.adapted.repeated(batch.variants):
            alike = not self.training and not isinstance(adaptation, Tensor)
            repeated = self.adapted.repeated if continues else None
            return read(self.backbone, batch, repeated, self.once, reading[0].reading.later if alike else None)

    def _numbers(self, adaptation: Index) -> list[int]:
        """The readers that a batch is of."""
        if len(self.readers) == 1:
            return [0]
        if not isinstance(adaptation, Tensor):
            return [self.seats[adaptation or 0][0]]
        return sorted({self.seats[slot][0] for slot in adaptation.tolist()})

    def scores(self, at: AtMask, adaptation: Index = None, of_one: bool = False) -> Tensor:
        """Class scores [b, c] of states, of each row by its own task's verbalizer; with `of_one` of one label each."""
        if len(self.readers) == 1:
            return self.readers[0](at, adaptation, of_one)
        if not isinstance(adaptation, Tensor):
            number, place = self.seats[adaptation or 0]
            return self.readers[number](at, place, of_one)
        seats = torch.tensor(self.seats, device=adaptation.device)[adaptation]  # [b, 2]
        each = [(n, (seats[:, 0] == n).nonzero()[:, 0]) for n in self._numbers(adaptation)]
        found = torch.cat([self.readers[n](of_rows(at, rows), seats[rows, 1], of_one) for n, rows in each])
        return found[torch.cat([rows for _, rows in each]).argsort()]

    def encode(self, examples: Sequence[Example], slot: int = 0) -> list[Encoded]:
        """Examples as token ids."""
        return self.reader(slot).features.encode(examples)

    def start(
        self,
        examples: Sequence[Example],
        slot: int = 0,
        batch_size: int = 32,
        unlabelled: Sequence[Example] = (),
    ) -> None:
        """Gives a verbalizer that starts from texts (prototypes, chosen words, …) its start, on the model as it is.

        Args:
            examples: training examples; what needs no labels takes them without.
            slot: which adaptation.
            batch_size: rows in one pass.
            unlabelled: further texts for what needs no labels.
        """
        starting.start(self, examples, unlabelled, slot, batch_size)

    def demonstrate(self, examples: Sequence[Example], slot: int = 0, seed: int = 0) -> None:
        """Gives a template with `{demos}` what it shows: labelled examples, of which the seed draws some.

        A calibration that needs no texts is measured on them. `fit` gives a model that has none its training rows.
        """
        self.reader(slot)
        demonstrate(self, examples, slot, seed)

    def calibrate(self, examples: Sequence[Example] = (), slot: int = 0, batch_size: int = 32) -> None:
        """Measures the task's calibration on the model as it is, whose answers it then corrects.

        `fit` does so before it trains; afterwards this measures it again, on what was learned.

        Args:
            examples: texts of the task, labelled or not, for calibrations that need some; their labels are not read.
            slot: which adaptation.
            batch_size: rows in one pass.

        Raises:
            ConfigError: the task has no calibration, or needs texts for it.
        """
        if self.reader(slot).task.calibration is None:
            raise ConfigError("this task has no calibration; give it one, Task(…, calibration=dp.Contextualised())")
        starting.calibrate(self, examples, slot, batch_size)

    def embed(self, features: Features, examples: Sequence[Example], slot: int = 0, batch_size: int = 32) -> Tensor:
        """The pooled states [n, d] of examples, in their order; the model is not training."""
        return starting.observed(self, features, examples, pooled, slot, batch_size)

    def predict(
        self, examples: Sequence[str | Mapping[str, str] | Example], batch_size: int = 32, slot: int = 0
    ) -> list[dict[str, Any]]:
        """`{"label", "score", "scores"}` for each text: the likeliest label, its probability, and every label's.

        Of a task of several labels also `labels`: all whose probability is above 1/2, the likeliest first, never none.
        """
        found = self.probabilities(examples_of(examples, "predict"), batch_size, slot)
        return [answer(self.task, p) for p in found.tolist()]

    def probabilities(self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> Tensor:
        """Class probabilities [n, c] on the CPU, in the order of the examples."""
        (scores,) = class_scores(self, examples, [slot], batch_size)
        return self.reader(slot).scorer.probabilities(scores)

    def max_logit(
        self, examples: Sequence[str | Mapping[str, str] | Example], batch_size: int = 32, slot: int = 0
    ) -> Tensor:
        """max_c score(c) [n] on the CPU: low for a text that belongs to no class (Hendrycks et al. 2022, MaxLogit).

        The score before the softmax tells how near the nearest class is, a probability only how much nearer than the
        others. Scores of label words, and of what is calibrated, are made of log-probabilities already. Of a task of
        several labels it is the largest log-odds: low where no label is right.
        """
        return class_scores(self, examples_of(examples, "max_logit"), [slot], batch_size)[0].amax(-1)

    def evaluate(
        self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0, outside: Sequence[Example] = ()
    ) -> dict[str, float]:
        """Accuracy and macro F1 on labelled examples; of type paths and of several labels those of typing too.

        With texts `outside` that belong to no class, whose labels are not read, also the `auroc` of `max_logit`.
        """
        if not examples:
            raise ConfigError("there are no examples to evaluate on")
        for example in examples:
            check_labelled(example)
        gold, task = [self.features.classes_of(example) for example in examples], self.task
        (scores,) = class_scores(self, examples, [slot], batch_size)
        found = chosen(self.reader(slot).scorer.probabilities(scores), task.several, LEAST)
        told = measures(task.names, gold, found, task.several)
        if outside:
            told["auroc"] = auroc(scores.amax(-1), self.max_logit(outside, batch_size, slot))
        return told

    def measure(
        self, rows: Sequence[Encoded], batch_size: int = 32, slot: int = 0, through: nn.Module | None = None
    ) -> dict[str, float]:
        """`{"accuracy", "macro_f1", …, "loss"}` of labelled rows."""
        return measured(through or self, self.features, self.task, rows, batch_size, slot)

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable tensor `[slots, …]` by stored name; of several tasks a verbalizer's begin with its number."""
        for name, tensor in self.adapted.parts():
            yield f"delta.{name}", tensor
        for number, reader in enumerate(self.readers):
            own = f"{number}." if len(self.readers) > 1 else ""
            for name, tensor in cast(Reader, reader).scorer.tensors.items():
                yield f"verbalizer.{own}{name}", tensor

    def slot_parts(self, slot: int = 0) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Every tensor that an adaptation has a part of, by stored name, and which part it is."""
        for name, tensor in self.adapted.parts():
            yield f"delta.{name}", tensor, slot
        for name, tensor in self.reader(slot).scorer.tensors.items():
            yield f"verbalizer.{name}", tensor, self.seats[slot][1]

    def stored(self, slot: int = 0) -> dict[str, Tensor]:
        """What is kept of one slot, by stored name: what trains, and of a reparametrised delta what it computes."""
        check_room(self.chosen, self.features)
        kept = {f"delta.{name}": tensor for name, tensor in self.adapted.stored(slot).items()}
        own = self.reader(slot).scorer.tensors.items()
        return kept | {f"verbalizer.{name}": tensor.detach()[self.seats[slot][1]] for name, tensor in own}

    def record(self, slot: int = 0) -> dict[str, Any]:
        """What is asked of a slot, as JSON from which it can be made again."""
        reader = self.reader(slot)
        calibration, shown = reader.task.calibration, reader.features.demonstrations
        return {
            "template": reader.task.template,
            "labels": reader.task.names,
            "verbalizer": described("verbalizers", reader.verbalizer),
            "calibration": None if calibration is None else described("calibrations", calibration),
            "demonstrations": None if shown is None else shown.as_json(),
            "max_length": reader.features.max_length,
            **({"several": True} if reader.task.several else {}),
        }


def read(
    backbone: Backbone,
    batch: Batch,
    repeated: Callable[[int], AbstractContextManager[None]] | None = None,
    once: Callable[[Batch], Tensor] | None = None,
    more: int | None = None,
) -> AtMask:
    """The states of a batch where the answer is read.

    Args:
        backbone: with deltas that know of the batch's rows.
        batch: b rows of v variants each.
        repeated: where answers of several tokens are scored, what tells the deltas that rows are repeated.
        once: what reads the states in place of the backbone, while those of frozen layers are kept.
        more: where all rows are of one adaptation, so that tokens which they share in front can be run once, the
            tokens of an answer that will follow.
    """
    b, v = batch.answer_at.shape[0] // batch.variants, batch.variants
    prompt = None
    front = _begun(backbone, batch.inputs, more) if more is not None and once is None else None
    if repeated is not None and backbone.kind in ("causal", "seq2seq"):
        prompt = prompted(backbone, batch.inputs if front is None else front.inputs, repeated, front)
    if once is not None and prompt is None:
        hidden = once(batch)
    elif front is not None:
        states = states_after(backbone, front) if prompt is None else prompt.states
        hidden = at_answers(states, batch.answer_at - front.length)
    else:
        states = backbone.states(batch.inputs) if prompt is None else prompt.states
        hidden = at_answers(states, batch.answer_at)
    return AtMask(
        hidden.unflatten(0, (b, v)),
        (batch.answer_at >= 0).unflatten(0, (b, v)),
        None if backbone.head is None else backbone.head.logits,
        None if prompt is None else lambda ids, lengths: prompt.log_likelihood(hidden[:, 0], ids, lengths),
        batch.answers,
    )


def _begun(backbone: Backbone, inputs: Mapping[str, Tensor], more: int) -> Begun | None:
    """A batch whose shared tokens have been run; not in training, where each row draws its own dropout."""
    if backbone.kind != "causal" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return begun(backbone, inputs, more=more)


def at_answers(states: Tensor, answer_at: Tensor) -> Tensor:
    """The states [b*v, m, d] at the answer positions [b*v, m] of states [b*v, s, d]."""
    rows = torch.arange(len(states), device=states.device)[:, None]
    return states[rows, answer_at.clamp(min=0)]


def adapt(backbone: Backbone, task: Task, deltas: Sequence[Delta] = (), seed: int = 0) -> Model:
    """A model for a task: the frozen backbone, its deltas in the order in which they act, and the task's verbalizer.

    Where labels are described by sentences it answers at once, from these alone; a calibration that needs no texts is
    measured at once too.
    """
    model = Model(backbone, task, deltas, [seed])
    if model.features.template.demos is None:  # else what it shows comes first
        starting.at_once(model)
    return model


def answer(task: Task, probabilities: Sequence[float]) -> dict[str, Any]:
    """The likeliest label, its probability, and every label's; of several labels also those taken to be right."""
    scores = dict(zip(task.names, probabilities, strict=True))
    label = max(scores, key=lambda name: scores[name])
    told = {"label": label, "score": scores[label], "scores": scores}
    if not task.several:
        return told
    best = sorted((name for name in scores if scores[name] > LEAST), key=lambda name: -scores[name])
    return {"labels": best or [label], **told}


def examples_of(given: Sequence[str | Mapping[str, str] | Example], asked: str) -> list[Example]:
    """What a function that is `asked` was given; a text in place of a list is an error."""
    if isinstance(given, str | Mapping | Example):
        raise ConfigError(f"{asked} takes a list, and got one text; write {asked}([text])")
    return [example_of(one) for one in given]


def example_of(given: str | Mapping[str, str] | Example) -> Example:
    if isinstance(given, Example):
        return given
    return Example({"text": given} if isinstance(given, str) else given)
