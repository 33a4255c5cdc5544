"""How good a model is on encoded examples: accuracy, macro F1 and the mean loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltaprompt.features import Encoded
from deltaprompt.model.model import Model, evaluating
from deltaprompt.trainer.accelerated import Lone


@torch.inference_mode()
def measured(module: Lone, model: Model, rows: Sequence[Encoded], batch_size: int, slot: int = 0) -> dict[str, float]:
    """`{"accuracy", "macro_f1", "loss"}` of labelled rows, by one slot of the model in a module."""
    from sklearn.metrics import accuracy_score, f1_score

    loss = 0.0
    gold, found = list[int](), list[int]()
    with evaluating(module):
        for batch in model.features.batches(rows, batch_size):
            out = module(batch.to(model.device), slot)
            assert batch.labels is not None
            loss += float(out["loss"]) * len(batch.labels)
            gold += batch.labels.tolist()
            found += out["logits"].argmax(-1).tolist()
    macro = f1_score(gold, found, average="macro", labels=range(len(model.task.names)), zero_division=0.0)
    return {"accuracy": float(accuracy_score(gold, found)), "macro_f1": float(macro), "loss": loss / len(gold)}
