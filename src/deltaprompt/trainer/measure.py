"""How good a model is on encoded examples: accuracy, macro F1, those of typing, and the mean loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltaprompt.features import Encoded
from deltaprompt.model.label_metrics import measures
from deltaprompt.model.model import Model, evaluating
from deltaprompt.model.several import chosen, right
from deltaprompt.trainer.accelerated import Lone


@torch.inference_mode()
def measured(module: Lone, model: Model, rows: Sequence[Encoded], batch_size: int, slot: int = 0) -> dict[str, float]:
    """`{"accuracy", "macro_f1", …, "loss"}` of labelled rows, by one slot of the model in a module."""
    loss, several = 0.0, model.task.several
    gold, found = list[list[int]](), list[list[int]]()
    with evaluating(module):
        for batch in model.features.batches(rows, batch_size):
            out = module(batch.to(model.device), slot)
            assert batch.labels is not None
            loss += float(out["loss"]) * len(batch.labels)
            gold += right(batch.labels)
            found += chosen(out["logits"], several)
    return {**measures(model.task.names, gold, found, several), "loss": loss / len(gold)}
