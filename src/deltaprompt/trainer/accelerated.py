"""What the loop asks of accelerate and PyTorch: an accelerator where the model is, a module to train, an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaprompt.errors import ConfigError
from deltaprompt.model import Model
from deltaprompt.trainer.training import Precision, Training
from deltaprompt.types import Batch


class Lone(nn.Module):
    """The model behind one more module, on which accelerate leaves its marks; the model itself stays as it is."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """As the model's."""
        return self.model(batch)


def accelerator_for(model: Model, precision: Precision) -> Any:
    """An accelerator on the model's device (of several processes, each on its own)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    on_cpu = model.device.type == "cpu"
    if on_cpu and precision == "fp16":
        raise ConfigError("precision = 'fp16' needs a GPU and the model is on the CPU; possible here: no, bf16")
    try:
        return Accelerator(mixed_precision=precision, cpu=on_cpu)
    except ValueError:  # accelerate has one state a process, here of another precision or device: it makes way
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        return Accelerator(mixed_precision=precision, cpu=on_cpu)


def optimizer_for(model: Model, training: Training) -> torch.optim.Optimizer:
    """AdamW on two groups: the deltas' tensors, and the verbalizer's without weight decay."""
    deltas = [tensor for name, tensor in model.parts() if name.startswith("delta.")]
    verbalizer = [tensor for name, tensor in model.parts() if not name.startswith("delta.")]
    groups = [
        {"params": deltas, "weight_decay": training.weight_decay},
        {"params": verbalizer, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate)


@contextmanager
def recomputed(model: Model, on: bool) -> Iterator[None]:
    """Within it the backward pass computes the backbone's layers again, where that is asked for."""
    if not on:
        yield
        return
    model.adapted.checkpointing()
    try:
        yield
    finally:
        model.adapted.checkpointing(False)
