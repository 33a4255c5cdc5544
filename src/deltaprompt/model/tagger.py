"""The forward path of tagging: every word's state at its first token, class scores of words, and spans of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Index
from deltaprompt.compose.routing import check_slot, slots_of
from deltaprompt.data.tagged import in_words
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.features import Encoded
from deltaprompt.features.batching import bucketed
from deltaprompt.features.words import Words
from deltaprompt.features.writing import batches, collated
from deltaprompt.model import span_metrics
from deltaprompt.model.model import Model, example_of
from deltaprompt.model.starting import check_ready
from deltaprompt.model.tagging import Tagging
from deltaprompt.model.trainable import check_known, evaluating
from deltaprompt.model.transitions import paths_of
from deltaprompt.model.wrapped import Wrapped
from deltaprompt.types import AtMask, Batch, Example, Span
from deltaprompt.verbalizers._base import Started

Given: TypeAlias = str | Mapping[str, str] | Example
LEAST: Final = 1e-12  # of a probability whose logarithm is taken
AT_ONCE: Final = 256  # texts whose paths are searched together


class Tagger(Wrapped):
    """A backbone adapted to finding spans of texts. `forward` maps a `Batch` to `{"loss", "logits"}`.

    Args:
        backbone: a plain encoder (`kind="encoder"`); it is frozen until `adapted.remove()`.
        tagging: what is looked for.
        deltas: in the order in which they act.
        seeds: one an adaptation; what it starts from.
    """

    def __init__(
        self, backbone: Backbone, tagging: Tagging, deltas: Sequence[Delta] = (), seeds: Sequence[int] = (0,)
    ) -> None:
        if backbone.kind != "encoder":
            raise ConfigError(
                f"words are read from an encoder's states, and this backbone is {backbone.kind}; load it with "
                "kind='encoder'"
            )
        super().__init__(Model(backbone, tagging.task, deltas, seeds))
        reading = self.reader()
        if isinstance(reading.verbalizer, Started) and reading.verbalizer.texts(reading.scorer.setting):
            self.adapted.remove()
            raise ConfigError(
                f"{type(reading.verbalizer).__name__} starts from sentences about labels, and these are classes of "
                "words; leave them out"
            )
        self.tagging = tagging
        self.words = Words(self.model.features)
        self.transitions = tagging.transitions
        self.train(False)

    # Learning

    def forward(self, batch: Batch, adaptation: Index = None, sizes: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Class scores `logits` [n, c] of all words that are read and, where their classes are known, the `loss`.

        Args:
            batch: b rows, whose n words stand in the order of the rows.
            adaptation: whose they are: a slot, or one a row [b].
            sizes: where rows of several adaptations stand one after another, the rows of each; `losses` are theirs.
        """
        at, there = self.model.at_mask(batch, adaptation), batch.answer_at >= 0  # [b, m]
        words = of_words(at)
        slots = slots_of(adaptation, there.nonzero()[:, 0])
        logits = self.model.scores(words, slots)
        if batch.targets is None:
            return {"logits": logits}
        counts = [int(own.sum()) for own in there.sum(1).split(list(sizes or [len(there)]))]
        losses = self.model.losses(words, logits, batch.targets[there], slots, counts)
        return {"loss": losses.mean(), "losses": losses, "logits": logits}

    def encode(self, examples: Sequence[Example], slot: int = 0) -> list[Encoded]:
        """Examples as rows, each window of a text one, with the class of every word that is read there."""
        found, split = list[Encoded](), [self.words.split(example) for example in examples]
        for example, windows in zip(split, self.words.windows(split), strict=True):
            classes = self.tagging.classes(example)
            found += [Encoded((w.row,), targets=tuple(classes[n] for n in w.words)) for w in windows if w.words]
        return found

    def check(self, examples: Sequence[Example], name: str) -> None:
        """Raises where a span of an example is not what is looked for."""
        for number, example in enumerate(examples, 1):
            try:
                self.tagging.classes(self.words.split(example))
            except DataError as error:
                raise DataError(f"{name} example {number}: {error}") from error

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Rows as one batch."""
        return collated(self.features, rows)

    def batches(self, rows: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
        """Rows as batches, the longest first."""
        return batches(self.features, rows, batch_size)

    @torch.no_grad()
    def start(self, examples: Sequence[Example], slot: int = 0, batch_size: int = 32) -> None:
        """Gives a verbalizer that starts from examples its start: each of their words is one."""
        reader = self.reader(slot)
        verbalizer, scorer, place = reader.verbalizer, reader.scorer, self.model.seats[slot][1]
        if not isinstance(verbalizer, Started):
            return
        states, classes = self.observed(examples, slot, batch_size)
        none = states.new_zeros(0, self.backbone.width)
        w, s = scorer.slot(place), scorer.setting
        for name, tensor in verbalizer.start(w, s, none, states, classes).items():
            scorer.tensors[name][place].copy_(tensor)

    def observed(self, examples: Sequence[Example], slot: int = 0, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """What a verbalizer starts from: states of the examples' words [n, d], and their classes [n]."""
        reader, place = self.reader(slot), self.model.seats[slot][1]
        verbalizer, scorer = reader.verbalizer, reader.scorer
        if not isinstance(verbalizer, Started):
            raise ConfigError(f"{type(verbalizer).__name__} does not start from examples")
        states, classes = list[Tensor](), list[Tensor]()
        with evaluating(self):
            for batch in self.batches(self.encode(examples, slot), batch_size):
                batch = batch.to(self.device)
                at = of_words(self.model.at_mask(batch, slot))
                assert batch.targets is not None
                scorer.routing.index = place
                states.append(verbalizer.observed(scorer.seen(at, False), scorer.setting, at))
                classes.append(batch.targets[batch.answer_at >= 0])
        return torch.cat(states), torch.cat(classes)

    @torch.inference_mode()
    def measure(
        self, rows: Sequence[Encoded], batch_size: int = 32, slot: int = 0, through: nn.Module | None = None
    ) -> dict[str, float]:
        """`{"f1", "accuracy", "loss"}` of rows: of spans, of words, and the mean cross-entropy of words.

        Windows of one text are measured apart.

        Args:
            rows: with the classes of their words.
            batch_size: rows in one pass.
            slot: which adaptation.
            through: a module around this one that is called in its place.
        """
        check_known([bool(row.targets) for row in rows], "class of each word")
        loss, words, right, counts = 0.0, 0, 0, span_metrics.Counts()
        with evaluating(self):
            for batch in self.batches(rows, batch_size):
                out = (through or self)(batch.to(self.device), slot)
                assert batch.targets is not None
                lengths = (batch.targets >= 0).sum(1).tolist()
                gold, paths = (
                    batch.targets[batch.targets >= 0],
                    paths_of(out["logits"].cpu(), lengths, self.transitions),
                )
                loss, words = loss + float(out["loss"]) * len(gold), words + len(gold)
                right += int((torch.cat(paths) == gold).sum())
                told = [self.tagging.spans(own.tolist()) for own in gold.split(lengths)]
                counts += span_metrics.count(told, [self.tagging.spans(own.tolist()) for own in paths], lengths)
        return {"f1": counts.f1, "accuracy": right / max(words, 1), "loss": loss / max(words, 1)}

    # Finding

    def predict(self, examples: Sequence[Given], batch_size: int = 32, slot: int = 0) -> list[dict[str, Any]]:
        """`{"text", "entities"}` for each text; an entity is its start and end in characters, text, label and score."""
        if isinstance(examples, str | Mapping | Example):
            raise ConfigError("predict takes a list, and got one text; write predict([text])")
        rows = [self.words.split(example_of(given)) for given in examples]
        each = self.probabilities(rows, batch_size, slot)
        return [
            {"text": self.words.text(row), "entities": [self._told(row, span, p) for span in spans]}
            for row, p, spans in zip(rows, each, self._spans(each), strict=True)
        ]

    def _told(self, example: Example, span: Span, p: Tensor) -> dict[str, Any]:
        """What is said of a span, which is in words; its score is its label's mean probability at these words."""
        start, end = example.words[span.start][0], example.words[span.end - 1][1]
        own = self.tagging.of(span.label)
        score = float(p[span.start : span.end, own].sum(-1).mean())
        return {
            "start": start,
            "end": end,
            "text": self.words.text(example)[start:end],
            "label": span.label,
            "score": score,
        }

    def evaluate(self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> dict[str, float]:
        """Precision, recall and F1 of spans, pooled over all texts, and Few-NERD's analysis of errors."""
        if not examples:
            raise ConfigError("there are no examples to evaluate on")
        self.check(examples, "test")
        split = [self.words.split(example) for example in examples]
        found = self._spans(self.probabilities(split, batch_size, slot))
        return span_metrics.measures([in_words(row) for row in split], found, [len(row.words) for row in split])

    @torch.inference_mode()
    def probabilities(self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> list[Tensor]:
        """Class probabilities [n, c] of each example's words, on the CPU; a word without a token is outside."""
        check_slot(slot, self.adapted.slots)
        reader = self.reader(slot)
        check_ready(reader, self.model.seats[slot][1])
        split = [self.words.split(example) for example in examples]
        windows = [(n, window) for n, own in enumerate(self.words.windows(split)) for window in own if window.words]
        found = [outside(len(example.words), len(self.tagging.tags)) for example in split]
        with evaluating(self):
            for part in bucketed([len(window.row.ids) for _, window in windows], batch_size):
                batch = self.features.collate([Encoded((windows[i][1].row,)) for i in part]).to(self.device)
                p = reader.scorer.probabilities(self(batch, slot)["logits"]).cpu()
                for i, own in zip(part, p.split([len(windows[i][1].words) for i in part]), strict=True):
                    found[windows[i][0]][list(windows[i][1].words)] = own
        return found

    def _spans(self, probabilities: Sequence[Tensor]) -> list[list[Span]]:
        """The spans of each text, in words, from the class probabilities [n, c] of its words."""
        found: list[list[Span]] = [[] for _ in probabilities]
        lengths = [len(p) for p in probabilities]
        for part in bucketed(lengths, AT_ONCE):
            some = [i for i in part if lengths[i]]
            if some:
                scores = torch.cat([probabilities[i] for i in some]).clamp(min=LEAST).log()
                for i, path in zip(some, paths_of(scores, [lengths[i] for i in some], self.transitions), strict=True):
                    found[i] = self.tagging.spans(path.tolist())
        return found

    def record(self, slot: int = 0) -> dict[str, Any]:
        """What is looked for, as JSON from which it can be made again."""
        return {"template": str(self.features.template), "tagging": self.tagging.record()}


def of_words(at: AtMask) -> AtMask:
    """Every position that is read, [b, 1, m, d], as a row of its own: [n, 1, 1, d]."""
    hidden = at.hidden[:, 0][at.present[:, 0]]  # [n, d]
    return AtMask(hidden[:, None, None], at.present.new_ones(len(hidden), 1, 1), at.logits)


def outside(words: int, classes: int) -> Tensor:
    """Probabilities [n, c] of words that are of the first class."""
    p = torch.zeros(words, classes)
    p[:, 0] = 1.0
    return p
