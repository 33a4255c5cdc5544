"""What training, saving and opening ask of a model, whatever it answers with: labels, spans or texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded, Features
from deltaprompt.types import Batch


def check_known(known: Sequence[bool], what: str = "label") -> None:
    """Raises where there is nothing to measure on, or a row has nothing to be compared with."""
    if not known:
        raise ConfigError("there are no rows to measure on")
    if not all(known):
        raise ConfigError(f"row {known.index(False) + 1} of {len(known)} has no {what} to be compared with")


class Trainable(nn.Module, ABC):
    """A backbone with deltas that learns from examples. `forward` maps a `Batch` to what has the `loss`."""

    backbone: Backbone
    adapted: Adapted
    once: Callable[[Batch], Tensor] | None  # while it trains: reads states, of which it keeps some

    @property
    @abstractmethod
    def chosen(self) -> tuple[Delta, ...]:
        """The task's deltas; those that its template asks for come before them."""

    @property
    @abstractmethod
    def features(self) -> Features:
        """How texts become token ids."""

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.model.parameters()).device

    @abstractmethod
    def encode(self, examples: Sequence[Any], slot: int = 0) -> list[Encoded]:
        """Examples as rows to train or to be measured on."""

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Rows as one batch."""
        return self.features.collate(rows)

    def batches(self, rows: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
        """Rows as batches, the longest first; `index` says which they are."""
        return self.features.batches(rows, batch_size)

    @abstractmethod
    def measure(
        self, rows: Sequence[Encoded], batch_size: int = 32, slot: int = 0, through: nn.Module | None = None
    ) -> dict[str, float]:
        """How good it is on rows, by metric; the mean `loss` among them.

        Args:
            rows: with what they are to give.
            batch_size: rows in one pass.
            slot: which adaptation.
            through: a module around this one that is called in its place.
        """

    @abstractmethod
    def evaluate(self, examples: Sequence[Any], batch_size: int = 32, slot: int = 0) -> dict[str, float]:
        """How good it is on examples whose answers are known, by metric."""

    @abstractmethod
    def record(self, slot: int = 0) -> dict[str, Any]:
        """What is asked of a slot, as JSON from which it can be made again."""

    # Its tensors

    @abstractmethod
    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable tensor `[slots, …]` by stored name."""

    @abstractmethod
    def slot_parts(self, slot: int = 0) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Every tensor that an adaptation has a part of, by stored name, and which part it is."""

    @abstractmethod
    def stored(self, slot: int = 0) -> dict[str, Tensor]:
        """What is kept of one slot, by stored name: what trains, and of a reparametrised delta what it computes."""

    def settle(self) -> None:
        """Every reparametrised delta becomes the plain one that it computes, as `save` keeps it; answers stay."""
        self.adapted.settle()

    def parameter_count(self, slot: int = 0) -> int:
        """Trainable numbers of one adaptation."""
        return sum(tensor[at].numel() for _, tensor, at in self.slot_parts(slot) if tensor.requires_grad)

    def save(
        self,
        folder: str | Path,
        slot: int = 0,
        training: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> int:
        """Keeps one adaptation in a folder, with a record of its training; the bytes written. See `saved.save`."""
        from deltaprompt.model.saved import save

        return save(self, folder, slot, training, metrics)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model, each module of which then goes back to its own mode, is in evaluation mode."""
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training
