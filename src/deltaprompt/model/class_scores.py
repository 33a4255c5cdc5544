"""Class scores of texts by a model as it is: what probabilities, and the largest score, are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaprompt.compose.routing import check_slot
from deltaprompt.model.starting import check_ready, unlabelled_of
from deltaprompt.model.trainable import evaluating
from deltaprompt.types import Batch, Example

if TYPE_CHECKING:
    from deltaprompt.model.model import Model


@torch.inference_mode()
def class_scores(model: Model, examples: Sequence[Example], slots: Sequence[int], batch_size: int = 32) -> Tensor:
    """Class scores [s, n, c] of n examples by s slots, before the softmax, in float32 on the CPU, in their orders.

    A backbone on which nothing acts is run once for all slots of one task.
    """
    if len(slots) > 1 and (len(model.readers) > 1 or any(True for _ in model.adapted.parts())):
        return torch.cat([class_scores(model, examples, [slot], batch_size) for slot in slots])
    for slot in slots:
        check_slot(slot, model.adapted.slots)
        check_ready(model.reader(slot), model.seats[slot][1])
    found = torch.zeros(len(slots), len(examples), len(model.task.names))
    rows = model.encode(unlabelled_of(examples), slots[0]) if slots else []
    with evaluating(model):
        for batch in model.reader(slots[0]).features.batches(rows, batch_size) if rows else ():
            found[:, batch.index] = torch.stack(_scores(model, batch.to(model.device), slots)).float().cpu()
    return found


def _scores(model: Model, batch: Batch, slots: Sequence[int]) -> list[Tensor]:
    """The class scores [b, c] of a batch by each slot; of several slots from the same states."""
    if len(slots) == 1:
        return [model(batch, slots[0])["logits"]]
    at = model.at_mask(batch, slots[0])
    return [model.scores(at, slot) for slot in slots]
