"""How likely a label is wrong, seen by what has learned from it and others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltaprompt.errors import ConfigError
from deltaprompt.model.model import Model
from deltaprompt.model.starting import check_labelled, check_started
from deltaprompt.types import Example
from deltaprompt.verbalizers.spherical_prototypes import SphericalPrototypes


@torch.inference_mode()
def noise_scores(model: Model, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> list[float]:
    """Of each example how likely its label is wrong, from 0 to 1.

    With `SphericalPrototypes` it is 1 − d(h, z_y), the distance to its label's prototype (ProtoRE, Ding et al. 2021);
    else 1 − p(y). Rows that a model has learned by heart look right, so few epochs are better, or rows held out.

    Args:
        model: trained, or started, on these examples or others.
        examples: with one label each.
        batch_size: rows in one pass.
        slot: which adaptation.
    """
    if model.task.several:
        raise ConfigError("noise is told of one label an example, and this task gives several")
    for example in examples:
        check_labelled(example)
    reader, place = model.reader(slot), model.seats[slot][1]
    check_started(reader, place)
    classes = [reader.features.classes_of(example)[0] for example in examples]
    if not isinstance(reader.verbalizer, SphericalPrototypes):
        found = model.probabilities(examples, batch_size, slot)
        return [1 - float(p[y]) for p, y in zip(found, classes, strict=True)]
    states = model.embed(reader.features, [Example(example.fields) for example in examples], slot, batch_size)
    w = reader.scorer.slot(place)
    found = reader.verbalizer.noise_score(w, states, torch.tensor(classes, device=states.device))
    return [float(score) for score in found]
