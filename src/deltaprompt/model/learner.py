"""Learning to learn from few examples: in each episode a verbalizer starts from the support and answers the query.

The loss is that of the query, and its gradient goes through the start into the deltas (Vinyals et al. 2016, Snell et
al. 2017). What starts may first take some steps on the support's own loss, the gradient going through these too (Finn
et al. 2017): the radii and centres of HyperProto "adapted", without steps "amortised" (Ding et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.nn.utils.rnn import pad_sequence

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Index
from deltaprompt.compose.routing import check_slot, slots_of
from deltaprompt.data.episodes import Episode
from deltaprompt.data.tagged import in_words
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded
from deltaprompt.features.batching import bucketed
from deltaprompt.features.rows import Row
from deltaprompt.model import queries, span_metrics
from deltaprompt.model.episode_rows import EpisodeRows
from deltaprompt.model.episodic import Episodic
from deltaprompt.model.model import Model
from deltaprompt.model.queries import Answered
from deltaprompt.model.reader import of_rows
from deltaprompt.model.span_metrics import Spans
from deltaprompt.model.tagger import Tagger, of_words
from deltaprompt.model.tagging import Tagging
from deltaprompt.model.task import Task
from deltaprompt.model.trainable import check_known, evaluating
from deltaprompt.model.wrapped import Wrapped
from deltaprompt.params import Weights
from deltaprompt.types import AtMask, Batch, Example
from deltaprompt.verbalizers._base import Setting, Started, Verbalizer, normalised


class Learner(Wrapped):
    """A backbone that learns from episodes. `forward` maps a `Batch` of episodes to `{"loss", "logits"}`.

    Args:
        backbone: an encoder or a language model; it is frozen until `adapted.remove()`.
        episodic: what is asked.
        deltas: in the order in which they act.
        seeds: one an adaptation; what it starts from.
    """

    def __init__(
        self, backbone: Backbone, episodic: Episodic, deltas: Sequence[Delta] = (), seeds: Sequence[int] = (0,)
    ) -> None:
        if episodic.spans and backbone.kind != "encoder":
            raise ConfigError(f"words are read from an encoder's states, and this backbone is {backbone.kind}")
        task = Task(episodic.template, ("O", "1"), episodic.verbalizer, episodic.max_length)
        super().__init__(Model(backbone, task, deltas, seeds))
        self.episodic = episodic
        self.rows = EpisodeRows(self.model.features, episodic)
        self.begun = _begun(episodic.verbalizer, self.reader().scorer.setting)
        self.train(False)

    # Learning

    def forward(self, batch: Batch, adaptation: Index = None, sizes: Sequence[int] | None = None) -> dict[str, Any]:
        """Class scores `logits`, of each episode's queries [n, c], and where these have classes the mean `loss`.

        Args:
            batch: episodes, each with all of its rows.
            adaptation: whose they are: a slot, or one an episode.
            sizes: where episodes of several adaptations stand one after another, those of each; `losses` are theirs.
        """
        if batch.episodes is None or batch.targets is None:
            raise ConfigError("these rows are no episodes; encode them with learner.encode(episodes)")
        number, support = batch.episodes[:, 0], batch.episodes[:, 1].bool()  # [rows]
        count = int(number[-1]) + 1
        slots = [int(n) for n in adaptation] if isinstance(adaptation, Tensor) else [adaptation or 0] * count
        at = self.model.at_mask(batch, slots_of(adaptation, number))
        items, rows = self._items(at)
        classes = batch.targets[batch.targets >= 0]  # [n] of the items
        logits, each = list[Tensor](), list[Tensor]()
        for n, slot in enumerate(slots):
            own, learnt = number[rows] == n, support[rows]
            given, asked = (own & learnt).nonzero()[:, 0], (own & ~learnt).nonzero()[:, 0]
            learnt_from = self._learnt(of_rows(items, given), classes[given], slot)
            logits.append(self._answered(*learnt_from, of_rows(items, asked)))
            each.append(nll_loss(normalised(logits[-1]), classes[asked]))
        losses = torch.stack([own.mean() for own in torch.stack(each).split(list(sizes or [count]))])
        return {"loss": losses.mean(), "losses": losses, "logits": logits}

    def _items(self, at: AtMask) -> tuple[AtMask, Tensor]:
        """What has a class: texts, or words; and the row that each is in."""
        if not self.episodic.spans:
            return at, torch.arange(len(at.hidden), device=at.hidden.device)
        return of_words(at), at.present[:, 0].nonzero()[:, 0]

    def _learnt(
        self, given: AtMask, classes: Tensor, slot: int, names: Sequence[str] | None = None
    ) -> tuple[Weights, Setting, Mapping[str, Tensor]]:
        """The verbalizer's tensors, its setting, and what starts in it from what is given."""
        verbalizer, scorer = self.episodic.verbalizer, self.reader(slot).scorer
        assert isinstance(verbalizer, Started)  # see Episodic
        setting = replace(scorer.setting, labels=tuple(names or map(str, range(int(classes.max()) + 1))))
        scorer.routing.index = self.model.seats[slot][1]
        w = scorer.seen(given, False)
        states = verbalizer.observed(w, setting, given)
        begun = verbalizer.start(w, setting, states.new_zeros(0, states.shape[-1]), states, classes)
        if self.episodic.steps:
            begun = self._adapted(w, setting, given, classes, begun)
        return w, setting, begun

    def _answered(self, w: Weights, s: Setting, begun: Mapping[str, Tensor], asked: AtMask) -> Tensor:
        """The scores of what is asked [n, c] by the verbalizer that has started."""
        return self.episodic.verbalizer.scores(w | begun, s, asked)

    def _adapted(
        self, w: Weights, s: Setting, given: AtMask, classes: Tensor, begun: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """What started, after steps down the support's own loss."""
        learning, at = torch.is_grad_enabled(), dict(begun)
        with torch.enable_grad():
            for _ in range(self.episodic.steps):
                at = {
                    n: t if t.requires_grad else t.detach().requires_grad_(t.is_floating_point()) for n, t in at.items()
                }
                free = {n: t for n, t in at.items() if t.requires_grad}
                loss = nll_loss(normalised(self.episodic.verbalizer.scores(w | at, s, given)), classes)
                slopes = torch.autograd.grad(loss, list(free.values()), create_graph=learning, allow_unused=True)
                moved = {
                    n: t - self.episodic.rate * g
                    for (n, t), g in zip(free.items(), slopes, strict=True)
                    if g is not None
                }
                at |= moved if learning else {n: t.detach() for n, t in moved.items()}
        return at

    # Episodes as rows

    def encode(self, examples: Sequence[Any], slot: int = 0) -> list[Encoded]:
        """Episodes as rows of their texts; texts that many episodes have are read once."""
        return self.rows.encode(examples)

    def check(self, episodes: Sequence[Any], name: str) -> None:
        """Raises where an episode cannot be learned from."""
        self.rows.check(episodes, name)

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Episodes as one batch: their rows one after another."""
        return self.rows.collate(rows)

    def batches(self, rows: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
        """Episodes as batches, those with the longest texts first."""
        for part in bucketed([row.length for row in rows], batch_size):
            yield replace(self.collate([rows[i] for i in part]), index=torch.tensor(part))

    # Telling

    @torch.no_grad()
    def answered(self, rows: Sequence[Encoded], batch_size: int = 32, slot: int = 0) -> list[Answered]:
        """What each encoded episode's queries are given."""
        states = self._states([row for episode in rows for row in episode.variants], batch_size, slot)
        found = list[Answered]()
        with evaluating(self):
            for episode in rows:
                sides = episode.variants[: episode.support], episode.variants[episode.support :]
                given, asked = (self._gathered([states[id(row)] for row in side]) for side in sides)
                classes = torch.tensor(episode.targets)
                n = len(given.hidden)
                scores = self._answered(*self._learnt(given, classes[:n].to(self.device), slot), asked)
                found.append(Answered(scores.float().cpu(), classes[n:]))
        return found

    def _states(self, rows: Sequence[Row], batch_size: int, slot: int) -> dict[int, Tensor]:
        """The states [m, d] that are read of each row, by its identity."""
        each, found = list({id(row): row for row in rows}.values()), dict[int, Tensor]()
        with evaluating(self):
            for part in bucketed([len(row.ids) for row in each], batch_size):
                batch = self.features.collate([Encoded((each[i],)) for i in part]).to(self.device)
                at = self.model.at_mask(batch, slot)
                for i, hidden, there in zip(part, at.hidden[:, 0], at.present[:, 0], strict=True):
                    found[id(each[i])] = hidden[there]
        return found

    def _gathered(self, states: Sequence[Tensor]) -> AtMask:
        """What has a class in rows of which these states [m, d] are read: texts, or words."""
        if self.episodic.spans:
            states = list(torch.cat(list(states))[:, None])  # a word a row
        sizes = torch.tensor([len(own) for own in states], device=self.device)
        hidden = pad_sequence(list(states), batch_first=True)[:, None]  # [n, 1, m, d]
        there = torch.arange(hidden.shape[2], device=self.device) < sizes[:, None]
        head = self.backbone.head
        return AtMask(hidden, there[:, None], None if head is None else head.logits)

    def measure(
        self, rows: Sequence[Encoded], batch_size: int = 4, slot: int = 0, through: nn.Module | None = None
    ) -> dict[str, float]:
        """`{"accuracy", "loss"}` of queries, with spans also their pooled `f1`, windows of one text apart."""
        check_known([bool(row.targets) for row in rows], "class of its texts")
        each = self._measured(rows, batch_size, slot, through or self)
        told = queries.means(each)
        if not self.episodic.spans:
            return told
        taggings = [self._tagging(tuple(map(str, range(1, own.scores.shape[1])))) for own in each]
        counts = [queries.counts_of(*own) for own in zip(rows, each, taggings, strict=True)]
        return {"f1": span_metrics.pooled(counts).f1, **told}

    def evaluate(self, examples: Sequence[Any], batch_size: int = 32, slot: int = 0) -> dict[str, float]:
        """The mean accuracy of episodes, or the F1 pooled over them, and its 95 % interval (`low`, `high`).

        Of spans also precision, recall and Few-NERD's analysis of errors.

        Args:
            examples: episodes.
            batch_size: texts in one pass; each is read once, however many episodes have it.
            slot: which adaptation.
        """
        if not examples:
            raise ConfigError("there are no episodes to evaluate on")
        check_slot(slot, self.adapted.slots)
        each = self.answered(self.encode(examples, slot), batch_size, slot)
        if not self.episodic.spans:
            return queries.with_interval(each)
        gold, found, lengths = list[Spans](), list[Spans](), list[list[int]]()
        for episode, own in zip(examples, each, strict=True):
            texts = [self.rows.words.split(text) for text in episode.query]
            windows = [[words for _, words in read] for read in self.rows.rows(texts)]
            lengths.append([len(text.words) for text in texts])
            gold.append([in_words(text) for text in texts])
            found.append(queries.spans_of(own.scores, windows, lengths[-1], self._tagging(episode.labels)))
        return queries.span_measures(gold, found, lengths, self.episodic.legacy)

    @torch.no_grad()
    def _measured(self, rows: Sequence[Encoded], batch_size: int, slot: int, module: nn.Module) -> list[Answered]:
        """The same as `answered`, through a module, episode by episode."""
        found: dict[int, Answered] = {}
        with evaluating(self):
            for batch in self.batches(rows, batch_size):
                assert batch.index is not None
                scores = [own.float().cpu() for own in module(batch.to(self.device), slot)["logits"]]
                for i, own in zip(batch.index.tolist(), scores, strict=True):
                    found[i] = Answered(own, torch.tensor(rows[i].targets[-len(own) :]))
        return [found[i] for i in range(len(rows))]

    def _tagging(self, labels: Sequence[str]) -> Tagging:
        tagging = self.episodic.task(labels)
        assert isinstance(tagging, Tagging)
        return tagging

    def learned(
        self, examples: Sequence[Example], labels: Sequence[str] | None = None, slot: int = 0
    ) -> Model | Tagger:
        """A model of labels or spans, started from a few examples of its own as an episode's support starts it.

        It takes the backbone over; this learner's deltas are off it then.

        Args:
            examples: labelled, a few of each label.
            labels: in their order; the examples' own where not given.
            slot: which adaptation.
        """
        from deltaprompt.data import labels_of
        from deltaprompt.data.tagged import span_labels

        kept = self.stored(slot)
        names = labels or (span_labels(examples) if self.episodic.spans else labels_of(examples))
        task = self.episodic.task(tuple(names))
        begun = self._begun_by(Episode(tuple(examples), tuple(examples), tuple(names)), slot)
        self.adapted.remove()
        model = (
            Tagger(self.backbone, task, self.chosen)
            if isinstance(task, Tagging)
            else Model(self.backbone, task, self.chosen)
        )
        model.settle()
        with torch.no_grad():
            for name, tensor, at in model.slot_parts():
                if name in kept:
                    tensor[at].copy_(kept[name])
            scorer = model.reader().scorer
            for name, learnt in begun.items():
                scorer.tensors[name][0].copy_(learnt)
        return model

    def _begun_by(self, episode: Episode, slot: int) -> Mapping[str, Tensor]:
        """What starts from an episode's support."""
        [encoded] = self.encode([episode], slot)
        rows = encoded.variants[: encoded.support]
        states = self._states(rows, 32, slot)
        given = self._gathered([states[id(row)] for row in rows])
        classes = torch.tensor(encoded.targets[: len(given.hidden)], device=self.device)
        names = ("O", *episode.labels) if self.episodic.spans else episode.labels
        with evaluating(self), torch.no_grad():
            return self._learnt(given, classes, slot, names)[2]

    def record(self, slot: int = 0) -> dict[str, Any]:
        """What is asked, as JSON from which it can be made again."""
        return {"template": str(self.features.template), "episodic": self.episodic.record()}

    # Its tensors: what starts in every episode is none of them

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable tensor by stored name."""
        return ((name, tensor) for name, tensor in self.model.parts() if name not in self.begun)

    def slot_parts(self, slot: int = 0) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Every tensor that an adaptation has a part of, by stored name, and which part it is."""
        return (part for part in self.model.slot_parts(slot) if part[0] not in self.begun)

    def stored(self, slot: int = 0) -> dict[str, Tensor]:
        """What is kept of one slot, by stored name."""
        return {name: tensor for name, tensor in self.model.stored(slot).items() if name not in self.begun}


def _begun(verbalizer: Verbalizer, setting: Setting) -> frozenset[str]:
    """The stored names of what the verbalizer starts, which must be all that it has of labels."""
    assert isinstance(verbalizer, Started)  # see Episodic
    if verbalizer.texts(setting):
        raise ConfigError(
            f"{type(verbalizer).__name__} starts from sentences about labels, and those of episodes are not known; "
            "leave them out"
        )
    own = verbalizer.params(setting)
    more = verbalizer.params(replace(setting, labels=(*setting.labels, "2")))
    of_labels = {name for name in own if own[name].shape != more[name].shape}
    states = torch.eye(2, max(setting.width, 2))[:, : setting.width]
    ones = {name: torch.ones(p.shape) for name, p in own.items()}
    begun = verbalizer.start(Weights(ones, False), setting, states[:0], states, torch.arange(2))
    if missing := sorted(of_labels - set(begun)):
        raise ConfigError(
            f"{type(verbalizer).__name__} learns {', '.join(missing)} for each label, which no episode gives; choose "
            "proto_net, hyper_proto, nn_shot, prototypes or another that starts whole from examples"
        )
    return frozenset(f"verbalizer.{name}" for name in begun)
