"""What the loop asks of accelerate and PyTorch: an accelerator where the model is, a module to train, optimizers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deltaprompt.backbone.fingerprint import fingerprint
from deltaprompt.backbone.layers import is_spread, spread
from deltaprompt.compose import Index
from deltaprompt.errors import ConfigError
from deltaprompt.model.trainable import Trainable
from deltaprompt.trainer.training import Precision, Training
from deltaprompt.types import Batch

FSDP = "ACCELERATE_USE_FSDP"  # what `accelerate launch --use_fsdp` sets


class Lone(nn.Module):
    """The model behind one more module, on which accelerate leaves its marks; the model itself stays as it is."""

    def __init__(self, model: Trainable) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, adaptation: Index = None, sizes: Sequence[int] | None = None) -> dict[str, Tensor]:
        """As the model's."""
        return self.model(batch, adaptation) if sizes is None else self.model(batch, adaptation, sizes)


def accelerator_for(device: torch.device, precision: Precision) -> Any:
    """An accelerator on a model's device (of several processes, each on its own)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    on_cpu = device.type == "cpu"
    if on_cpu and precision == "fp16":
        raise ConfigError("precision = 'fp16' needs a GPU and the model is on the CPU; possible here: no, bf16")
    with _without_its_fsdp():
        try:
            accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
        except ValueError:  # accelerate has one state a process, here of another precision or device: it makes way
            accelerator = None
        if accelerator is None or accelerator.distributed_type == "FSDP":
            AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
            accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
        return accelerator


def prepared(accelerator: Any, model: Trainable) -> Any:
    """The module to train. Of several processes each has the deltas, and all learn the same.

    Where FSDP is asked for, the backbone's layers are spread over the processes, and stay so; accelerate's own FSDP
    would spread the deltas as well, which are small, and does not run on CPUs.
    """
    several = accelerator.num_processes > 1
    lone, backbone = Lone(model), model.backbone
    if several and os.environ.get(FSDP, "").lower() in ("1", "true") and not is_spread(backbone.model):
        spread(backbone.model, accelerator.device, fingerprint(backbone.model))
    if is_spread(backbone.model):
        frozen = [name for name, p in lone.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(lone, frozen)
    return accelerator.prepare(lone, device_placement=[several])


@contextmanager
def _without_its_fsdp() -> Iterator[None]:
    """Within it accelerate is not asked for its own FSDP."""
    asked = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[FSDP] = asked


def is_main() -> bool:
    """Whether this is the only process, or of several the one that writes and speaks."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes train: those that are joined, or that a launcher has announced."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def optimizer_for(parts: Mapping[str, Tensor], training: Training) -> torch.optim.Optimizer:
    """AdamW on two groups: the deltas' tensors, and the verbalizer's without weight decay."""
    deltas = [tensor for name, tensor in parts.items() if name.startswith("delta.")]
    verbalizer = [tensor for name, tensor in parts.items() if not name.startswith("delta.")]
    groups = [
        {"params": deltas, "weight_decay": training.weight_decay},
        {"params": verbalizer, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate)


@contextmanager
def recomputed(model: Trainable, on: bool) -> Iterator[None]:
    """Within it the backward pass computes the backbone's layers again, where that is asked for."""
    if not on:
        yield
        return
    model.adapted.checkpointing()
    try:
        yield
    finally:
        model.adapted.checkpointing(False)
