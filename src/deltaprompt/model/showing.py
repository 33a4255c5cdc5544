"""What a task's `{demos}` shows: words of its verbalizer; and the states by which the nearest examples are found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.fused import at_rest
from deltaprompt.compose import patches_on
from deltaprompt.errors import ConfigError
from deltaprompt.features import Features
from deltaprompt.features.demonstrations import Demonstrations, drawn, from_json
from deltaprompt.model.starting import at_once
from deltaprompt.model.task import Task
from deltaprompt.templates import Demos, Field, Literal, Template, parse
from deltaprompt.types import Batch, Example
from deltaprompt.verbalizers._base import Verbalizer

if TYPE_CHECKING:
    from deltaprompt.model.model import Model

ROWS = 32  # texts in one pass


def shows(task: Task) -> bool:
    """Whether a task's template shows demonstrations."""
    return parse(task.template).demos is not None


def demonstrate(model: Model, examples: Sequence[Example], slot: int = 0, seed: int = 0) -> None:
    """Gives one slot's template labelled examples to show; see `Model.demonstrate`."""
    reader = model.reader(slot)
    reader.scorer.forget_prior(model.seats[slot][1])  # it was of another prompt
    rows = drawn(asked_by(reader.features), reader.features.template.fields, examples, seed)
    reader.show(showing(model.backbone, reader.features, reader.verbalizer, rows))
    at_once(model, slot)


def asked_by(features: Features) -> Demos:
    """What a template asks for, or an error where it shows nothing."""
    if features.template.demos is None:
        raise ConfigError(
            f"the template {str(features.template)!r} shows no demonstrations; write {{demos:4}} where they stand"
        )
    return features.template.demos


def showing(backbone: Backbone, features: Features, verbalizer: Verbalizer, rows: Sequence[Example]) -> Features:
    """The features of a task whose template shows demonstrations, with these rows to choose from.

    Raises:
        ConfigError: the template shows none.
        DataError: a row has a label that is none of the task's.
        TemplateError: not one of them has room.
    """
    asked, fields = asked_by(features), features.template.fields
    for row in rows:
        features.label_index(str(row.label))
    if features.phrases:
        words = dict(zip(features.labels, fixed_texts(features.phrases), strict=True))
    else:
        words = {label: words_of(verbalizer, label, features.template.masks) for label in features.labels}
    states = MeanStates(backbone, _plain(features)) if asked.by == "nearest" else None
    return replace(features, demonstrations=Demonstrations(asked, fields, words, tuple(rows), states)).checked()


def restored(backbone: Backbone, features: Features, verbalizer: Verbalizer, record: Mapping[str, Any]) -> Features:
    """The features with the demonstrations of a saved record; as they are where it has none."""
    rows = record.get("demonstrations")
    return features if rows is None else showing(backbone, features, verbalizer, from_json(rows))


def words_of(verbalizer: Verbalizer, label: str, masks: int) -> tuple[str, ...]:
    """What stands at each mask of a label's demonstration."""
    words = verbalizer.shown(label)
    if len(words) != max(masks, 1):
        raise ConfigError(
            f"a demonstration shows a word at each {{mask}}, and only rules say which stands at which of {masks}; use "
            "them, or leave one {mask}"
        )
    return words


def fixed_texts(phrases: Sequence[Template]) -> list[tuple[str, ...]]:
    """The texts of labels, which are the same in every example."""
    if odd := [str(phrase) for phrase in phrases if phrase.fields]:
        raise ConfigError(
            f"a demonstration shows a label's text, and {odd[0]!r} is another one in every example; leave {{demos}} out"
        )
    return [(phrase.filled({}).strip(),) for phrase in phrases]


@dataclass(frozen=True)
class MeanStates:
    """The mean over a text's tokens of the backbone's last states; of an encoder-decoder the encoder's.

    No delta acts, so that what is near stays so while a model trains, and wherever it is opened.
    """

    backbone: Backbone
    features: Features  # of the fields alone

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Examples -> [n, d], on the CPU."""
        rows = self.features.encode([Example(example.fields) for example in examples])
        found = torch.zeros(len(rows), self.backbone.width)
        device = next(self.backbone.model.parameters()).device
        with without_deltas(self.backbone), at_rest(self.backbone.model):
            for batch in self.features.batches(rows, ROWS):
                found[batch.index] = self._means(batch.to(device)).float().cpu()
        return found

    def _means(self, batch: Batch) -> Tensor:
        backbone = self.backbone
        states = backbone.encoded(batch.inputs) if backbone.kind == "seq2seq" else backbone.states(batch.inputs)
        seen = batch.inputs["attention_mask"][..., None]
        return (states * seen).sum(1) / seen.sum(1)


@contextmanager
def without_deltas(backbone: Backbone) -> Iterator[None]:
    """Within it nothing that is attached to a backbone acts."""
    routings = {id(patch.routing): patch.routing for patch in patches_on(backbone.model)}.values()
    before = [routing.resting for routing in routings]
    for routing in routings:
        routing.resting = True
    try:
        yield
    finally:
        for routing, resting in zip(routings, before, strict=True):
            routing.resting = resting


def _plain(features: Features) -> Features:
    """How a text is read by itself: its fields with blanks between, no soft tokens, no answer."""
    pieces = [piece for name in features.template.fields for piece in (Literal(" "), Field(name))]
    template = Template(tuple(pieces[1:]))
    return replace(features, template=template, kind="encoder", answer_lengths=(1,), prepend_soft=0)
