"""The forward path: template and deltas in front, states where the answer is read, the verbalizer behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.continuation import prompted
from deltaprompt.backbone.shared import Begun, begun, states_after
from deltaprompt.compose import Adapted, Index, carries_deltas, instances
from deltaprompt.compose.routing import check_slot
from deltaprompt.deltas._base import Delta, VirtualTokens
from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded, Features
from deltaprompt.model.reader import Reader, Scorer, of_rows, placed
from deltaprompt.model.task import Task
from deltaprompt.templates import parse
from deltaprompt.types import AtMask, Batch, Example
from deltaprompt.verbalizers._base import Started, Verbalizer, pooled

BARE = "{text}"


class Model(nn.Module):
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
        self.once: Callable[[Batch], Tensor] | None = None  # while it trains: reads states, of which it keeps some
        tasks = [task] * len(seeds) if isinstance(task, Task) else list(task)
        if len(tasks) != len(seeds):
            raise ConfigError(f"{len(tasks)} tasks for {len(seeds)} seeds; give one task for all, or one a seed")
        told = [(task, task.names) for task in tasks]  # equal labels may stand in another order
        distinct = [one for i, one in enumerate(told) if one not in told[:i]]
        numbers = [distinct.index(one) for one in told]
        made = [Reader(backbone, task, instances(deltas), numbers.count(n)) for n, (task, _) in enumerate(distinct)]
        _check_alike(made)  # whatever is wrong is said before anything is attached
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
        self._begin_soft_words()
        self.train(False)

    @property
    def chosen(self) -> tuple[Delta, ...]:
        """The task's deltas; the soft tokens of its template are one more, the first of all."""
        return self.adapted.deltas[1 if self.features.soft_rows else 0 :]

    def reader(self, slot: int = 0) -> Reader:
        """How an adaptation's texts are read and scored."""
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

    def forward(self, batch: Batch, adaptation: Index = None) -> dict[str, Tensor]:
        """Class scores `logits` [b, c] and, where the batch has labels, the mean cross-entropy `loss`."""
        logits = self._scores(self.at_mask(batch, adaptation), adaptation)
        if batch.labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits.float(), batch.labels), "logits": logits}

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

    def _scores(self, at: AtMask, adaptation: Index) -> Tensor:
        """Class scores [b, c], of each row by its own task's verbalizer."""
        if len(self.readers) == 1:
            return self.readers[0](at, adaptation)
        if not isinstance(adaptation, Tensor):
            number, place = self.seats[adaptation or 0]
            return self.readers[number](at, place)
        seats = torch.tensor(self.seats, device=adaptation.device)[adaptation]  # [b, 2]
        each = [(n, (seats[:, 0] == n).nonzero()[:, 0]) for n in self._numbers(adaptation)]
        found = torch.cat([self.readers[n](of_rows(at, rows), seats[rows, 1]) for n, rows in each])
        return found[torch.cat([rows for _, rows in each]).argsort()]

    def encode(self, examples: Sequence[Example], slot: int = 0) -> list[Encoded]:
        """Examples as token ids."""
        return self.reader(slot).features.encode(examples)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.model.parameters()).device

    @torch.no_grad()
    def start(self, examples: Sequence[Example], slot: int = 0, batch_size: int = 32) -> None:
        """Gives a verbalizer that starts from states (prototypes, descriptions) its start from training examples."""
        reader, place = self.reader(slot), self.seats[slot][1]
        verbalizer, setting, features = reader.verbalizer, reader.scorer.setting, reader.features
        if not isinstance(verbalizer, Started):
            return
        classes = torch.tensor([features.label_index(_label(e)) for e in examples], dtype=torch.long)
        support = self.embed(features, examples, slot, batch_size)
        plain = self._plain(features)
        described = [Example(dict.fromkeys(plain.template.fields, text)) for text in verbalizer.texts(setting)]
        texts = self.embed(plain, described, slot, batch_size)
        for name, tensor in verbalizer.start(setting, texts, support, classes.to(self.device)).items():
            reader.scorer.tensors[name][place].copy_(tensor)

    def _plain(self, features: Features) -> Features:
        """How a description is read: by itself where states are means over tokens, otherwise through the template."""
        if self.backbone.kind != "encoder" or features.template.masks:
            return features
        return replace(features, template=parse(BARE), prepend_soft=0)

    @torch.no_grad()
    def embed(self, features: Features, examples: Sequence[Example], slot: int = 0, batch_size: int = 32) -> Tensor:
        """The pooled states [n, d] of examples, in their order; the model is not training."""
        out = torch.zeros(len(examples), self.backbone.width, device=self.device)
        with evaluating(self):
            for batch in features.batches(features.encode(unlabelled(examples)), batch_size):
                at = self.at_mask(batch.to(self.device), slot)
                out[batch.index] = pooled(at).float()
        return out

    def predict(
        self, examples: Sequence[str | Mapping[str, str] | Example], batch_size: int = 32, slot: int = 0
    ) -> list[dict[str, Any]]:
        """`{"label", "score", "scores"}` for each text: the likeliest label, its probability, and every label's."""
        if isinstance(examples, str | Mapping | Example):
            raise ConfigError("predict takes a list, and got one text; write predict([text])")
        found = self.probabilities([example_of(e) for e in examples], batch_size, slot)
        return [answer(self.task.names, p) for p in found.tolist()]

    @torch.inference_mode()
    def probabilities(self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> Tensor:
        """Class probabilities [n, c] on the CPU, in the order of the examples."""
        reader, place = self._at(slot), self.seats[slot][1]
        if isinstance(reader.verbalizer, Started) and not any(t[place].any() for t in reader.scorer.tensors.values()):
            raise ConfigError(
                "the prototypes have no start yet; give model.start(examples) labelled examples, or fit the model"
            )
        out = torch.zeros(len(examples), len(self.task.names))
        with evaluating(self):
            for batch in reader.features.batches(reader.features.encode(unlabelled(examples)), batch_size):
                logits = self(batch.to(self.device), slot)["logits"]
                out[batch.index] = logits.float().softmax(-1).cpu()
        return out

    def evaluate(self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> dict[str, float]:
        """Accuracy and macro F1 on labelled examples."""
        from sklearn.metrics import accuracy_score, f1_score

        if not examples:
            raise ConfigError("there are no examples to evaluate on")
        gold = [self.features.label_index(_label(e)) for e in examples]
        predicted = self.probabilities(examples, batch_size, slot).argmax(-1).tolist()
        macro = f1_score(gold, predicted, average="macro", labels=range(len(self.task.names)), zero_division=0.0)
        return {"accuracy": float(accuracy_score(gold, predicted)), "macro_f1": float(macro)}

    def _at(self, slot: int) -> Reader:
        """The reader of a slot that somebody named."""
        check_slot(slot, self.adapted.slots)
        return self.reader(slot)

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
        if sum(d.length for d in self.chosen if isinstance(d, VirtualTokens)) != self.features.prepend_soft:
            raise ConfigError(
                "virtual tokens were attached or detached after the model was made, and its texts have as many as "
                "before; make a new one with dp.adapt(backbone, task, deltas)"
            )
        kept = {f"delta.{name}": tensor for name, tensor in self.adapted.stored(slot).items()}
        own = self.reader(slot).scorer.tensors.items()
        return kept | {f"verbalizer.{name}": tensor.detach()[self.seats[slot][1]] for name, tensor in own}

    def settle(self) -> None:
        """Every reparametrised delta becomes the plain one that it computes, as `save` keeps it; answers stay."""
        self.adapted.settle()

    def parameter_count(self, slot: int = 0) -> int:
        """Trainable numbers of one adaptation."""
        return sum(tensor[at].numel() for _, tensor, at in self.slot_parts(slot) if tensor.requires_grad)

    def save(
        self,
        folder: str | Path,
        slot: int = 0,
        training: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> int:
        """Keeps one adaptation in a folder, with a record of its training; the bytes written. See `saved.save`."""
        from deltaprompt.model.saved import save

        return save(self, folder, slot, training, metrics)

    @torch.no_grad()
    def _begin_soft_words(self) -> None:
        """Soft tokens that begin from words take these words' embeddings."""
        parts, name = dict(self.adapted.parts()), f"0.{self.backbone.input_embedding}.p"
        for slot in range(self.adapted.slots):
            features, row = self.reader(slot).features, 0
            for block in features.soft_blocks:
                if block.words is not None:
                    ids = torch.tensor(features.word_ids(block.words), device=self.device)
                    words = self.backbone.model.get_input_embeddings()(ids)
                    parts[name][slot, row : row + block.size] = words.to(parts[name].dtype)
                row += block.size


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


def _check_alike(readers: Sequence[Reader]) -> None:
    """The tasks of one model have the same labels, and as many soft tokens, which are a delta of all."""
    first = readers[0]
    for other in readers[1:]:
        if other.task.names != first.task.names:
            raise ConfigError(
                f"the tasks of one model have the same labels in the same order; got {list(first.task.names)} and "
                f"{list(other.task.names)}"
            )
        if other.features.soft_rows != first.features.soft_rows:
            raise ConfigError(
                f"the templates of one model have as many soft tokens each; got {first.features.soft_rows} and "
                f"{other.features.soft_rows}. Put those that differ in a model each"
            )


def adapt(backbone: Backbone, task: Task, deltas: Sequence[Delta] = (), seed: int = 0) -> Model:
    """A model for a task: the frozen backbone, its deltas in the order in which they act, and the task's verbalizer.

    Where labels are described by sentences it answers at once, from these alone.
    """
    model = Model(backbone, task, deltas, [seed])
    if isinstance(model.verbalizer, Started) and model.verbalizer.texts(model.scorer.setting):
        model.start([])
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model, each module of which then goes back to its own mode, is in evaluation mode."""
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training


def answer(names: Sequence[str], probabilities: Sequence[float]) -> dict[str, Any]:
    """The likeliest label, its probability, and every label's."""
    scores = dict(zip(names, probabilities, strict=True))
    label = max(scores, key=lambda name: scores[name])
    return {"label": label, "score": scores[label], "scores": scores}


def example_of(given: str | Mapping[str, str] | Example) -> Example:
    if isinstance(given, Example):
        return given
    return Example({"text": given} if isinstance(given, str) else given)


def unlabelled(examples: Iterable[Example]) -> list[Example]:
    return [Example(e.fields) for e in examples]


def _label(example: Example) -> str:
    if example.label is None:
        raise ConfigError(f"an example has no label, {dict(example.fields)}; every one needs one here")
    return example.label
