"""What a model is given before it answers or trains: starts of verbalizers, and priors of calibrations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaprompt.calibrations._base import spread
from deltaprompt.data.samplers import by_labels
from deltaprompt.errors import ConfigError
from deltaprompt.features import Features
from deltaprompt.templates import parse
from deltaprompt.types import AtMask, Example
from deltaprompt.verbalizers._base import PRIOR, Started, pooled

if TYPE_CHECKING:
    from deltaprompt.model.model import Model
    from deltaprompt.model.reader import Reader

BARE = "{text}"
Look = Callable[[AtMask], Tensor]  # what is kept of a batch's rows: [b, k]


@torch.no_grad()
def start(
    model: Model, examples: Sequence[Example], unlabelled: Sequence[Example], slot: int = 0, batch_size: int = 32
) -> None:
    """Gives one slot's verbalizer its start; see `Model.start`."""
    reader, place = model.reader(slot), model.seats[slot][1]
    verbalizer, scorer, features = reader.verbalizer, reader.scorer, reader.features
    if not isinstance(verbalizer, Started):
        return
    scorer.forget_prior(place)  # it was of another start
    for example in examples if verbalizer.labelled else []:
        check_labelled(example)
    rows = looked_at(verbalizer, examples, unlabelled)
    each = [features.classes_of(example) or (-1,) for example in rows]
    classes = torch.tensor([c for own in each for c in own], dtype=torch.long)
    numbers = [i for i, own in enumerate(each) for _ in own]  # a row of several labels is one of each
    w, s = scorer.slot(place), scorer.setting

    def look(at: AtMask) -> Tensor:
        return verbalizer.observed(scorer.seen(at, False), s, at)

    support = observed(model, features, rows, look, slot, batch_size)[numbers]
    plain = _plain(model, features)
    described = [Example(dict.fromkeys(plain.template.fields, text)) for text in verbalizer.texts(s)]
    texts = observed(model, plain, described, pooled, slot, batch_size)
    for name, tensor in verbalizer.start(w, s, texts, support, classes.to(model.device)).items():
        scorer.tensors[name][place].copy_(tensor)


def looked_at(verbalizer: Started, examples: Sequence[Example], unlabelled: Sequence[Example]) -> list[Example]:
    """The rows that a start looks at: as many of each label, or (where none is needed) evenly spaced of all."""
    most = verbalizer.most
    if not verbalizer.labelled:
        rows = [*examples, *unlabelled]
        return rows if most is None else list(spread(rows, most))
    if most is None or len(examples) <= most:
        return list(examples)
    each = by_labels(examples)
    return [examples[n] for own in each for n in spread(own, max(most // len(each), 1))]


@torch.no_grad()
def calibrate(model: Model, examples: Sequence[Example], slot: int = 0, batch_size: int = 32) -> None:
    """Measures one slot's prior, where its task has a calibration; see `Model.calibrate`."""
    reader, place = model.reader(slot), model.seats[slot][1]
    calibration, features, scorer = reader.task.calibration, reader.features, reader.scorer
    if calibration is None:
        return
    check_started(reader, place)
    own = calibration.template()
    asked = features if own is None else replace(features, template=parse(own))
    asked = asked if calibration.needs_texts else asked.seeded()  # a text without content is near to none
    inputs = calibration.inputs(features.template.fields, unlabelled_of(examples))
    log_p = observed(model, asked, inputs, scorer.answers, slot, batch_size)
    scorer.tensors[PRIOR][place].copy_(calibration.prior(log_p))


def at_once(model: Model, slot: int = 0) -> None:
    """What needs no examples: the start of a verbalizer that has descriptions, and a calibration without texts."""
    reader, place = model.reader(slot), model.seats[slot][1]
    verbalizer, calibration, scorer = reader.verbalizer, reader.task.calibration, reader.scorer
    waits = False
    if isinstance(verbalizer, Started):
        waits = bool(verbalizer.begun) and not scorer.tensors[verbalizer.begun][place].any()
        if verbalizer.texts(scorer.setting) and (waits or not verbalizer.begun):
            model.start([], slot)
            waits = False
    if calibration is not None and not calibration.needs_texts and not waits:
        calibrate(model, (), slot)


@torch.no_grad()
def observed(
    model: Model, features: Features, examples: Sequence[Example], look: Look, slot: int = 0, batch_size: int = 32
) -> Tensor:
    """What a function keeps of every example's answer positions, in their order: [n, k]; the model is not training."""
    from deltaprompt.model.trainable import evaluating

    if not examples:
        return torch.zeros(0, model.backbone.width, device=model.device)
    found: list[Tensor] = [torch.zeros(0)] * len(examples)
    with evaluating(model):
        for batch in features.batches(features.encode(unlabelled_of(examples)), batch_size):
            assert batch.index is not None
            at = model.at_mask(batch.to(model.device), slot)
            model.reader(slot).scorer.routing.index = model.seats[slot][1]
            for i, row in zip(batch.index.tolist(), look(at), strict=True):
                found[i] = row
    return torch.stack(found)


def check_ready(reader: Reader, place: int) -> None:
    """Raises where the verbalizer has no start, or its prior has not been measured."""
    check_started(reader, place)
    if reader.task.calibration is not None and not reader.scorer.tensors[PRIOR][place].any():
        raise ConfigError(
            f"the calibration {type(reader.task.calibration).__name__} has not been measured; give "
            "model.calibrate(examples) texts of the task (labels are not needed), or fit the model"
        )


def by_chance(model: Model) -> str | None:
    """The verbalizer, where its answers are chance until it has learned: it begins otherwise from every seed.

    Args:
        model: of one task, with two adaptations of different seeds and nothing learned.
    """
    one, other = (
        {name: tensor[model.seats[slot][1]] for name, tensor in model.reader(slot).scorer.tensors.items()}
        for slot in (0, 1)
    )
    drawn = any(not tensor.equal(other[name]) for name, tensor in one.items())
    return type(model.reader().verbalizer).__name__ if drawn else None


def check_started(reader: Reader, place: int) -> None:
    """Raises where the verbalizer has no start."""
    verbalizer, tensors = reader.verbalizer, reader.scorer.tensors
    if isinstance(verbalizer, Started) and verbalizer.begun and not tensors[verbalizer.begun][place].any():
        raise ConfigError(
            f"the verbalizer {type(verbalizer).__name__} has no start yet; give model.start(examples) "
            f"{'labelled ' if verbalizer.labelled else ''}examples, or fit the model"
        )


def _plain(model: Model, features: Features) -> Features:
    """How a description is read: by itself where states are means over tokens, otherwise through the template."""
    if model.backbone.kind != "encoder" or features.template.masks:
        return features
    return replace(features, template=parse(BARE), prepend_soft=0)


def unlabelled_of(examples: Iterable[Example]) -> list[Example]:
    """The same without labels."""
    return [Example(e.fields) for e in examples]


def check_labelled(example: Example) -> None:
    """An error where an example has no label."""
    if not example.gold:
        raise ConfigError(f"an example has no label, {dict(example.fields)}; every one needs one here")
