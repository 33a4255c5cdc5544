"""How a model is trained: the recipe's `[training]` table, the CLI's options and the constructor in one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deltaprompt.errors import ConfigError
from deltaprompt.trainer.possible import RATE, SHARED, Possible, check, count_or_none, number, rate, truth

Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["no", "bf16", "fp16"]

LEAST_STEPS, LEAST_EPOCHS = 30, 6  # where neither is given: measured on few-shot sets of 16 to 224 rows
EVALUATIONS = 10  # of a run that is given in steps


@dataclass(frozen=True)
class Training:
    """AdamW on the trainable tensors (Loshchilov & Hutter 2019), with warm-up and decay.

    Args:
        epochs: passes over the training rows. With neither this nor `steps`: 30 steps or 6 epochs, the longer.
        steps: optimizer steps, instead of epochs.
        batch_size: rows in one pass through the backbone.
        accumulate: batches to one optimizer step; 2 × 8 rows are the same step as 1 × 16.
        per_class: so many rows of one class stand together, so that a batch has pairs even among many classes, as
            losses that contrast rows need; where not given rows are drawn one by one.
        learning_rate: of the deltas, at its highest.
        verbalizer_learning_rate: of the verbalizer's tensors.
        weight_decay: of the deltas; the verbalizer's tensors have none.
        warmup: the fraction of the steps in which the learning rate rises, linearly.
        schedule: how it goes on: "linear" or "cosine" fall towards 0.
        clip: the largest norm of all gradients together.
        precision: "bf16" or "fp16" for mixed precision; "fp16" needs a GPU.
        patience: evaluations on dev without a better one before training stops; None for never.
        backbone_dropout: the frozen backbone's own dropout while training; off was better in few-shot trials.
        checkpointing: the backward pass computes three quarters of the backbone's layers again instead of keeping what
            they had: less memory, about a third more time, the same numbers.
        keep: what the layers below the lowest delta make of a text is computed once and kept, in memory and then on the
            disk; the same numbers up to rounding.
        checkpoint_every: optimizer steps between checkpoints on disk; every epoch where not given.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    per_class: int | None = None
    learning_rate: float = 5e-4
    verbalizer_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: Schedule = "linear"
    clip: float = 1.0
    precision: Precision = "no"
    patience: int | None = 10
    backbone_dropout: bool = False
    checkpointing: bool = False
    keep: bool = True
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        check(vars(self), POSSIBLE)
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(f"epochs = {self.epochs} and steps = {self.steps} were both given; give one of them")

    @property
    def rows(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.accumulate

    def total(self, epoch: int) -> int:
        """Optimizer steps in all, of which an epoch has `epoch`."""
        if self.steps is not None:
            return self.steps
        return self.epochs * epoch if self.epochs is not None else max(LEAST_STEPS, LEAST_EPOCHS * epoch)

    def evaluate_every(self, epoch: int) -> int:
        """Optimizer steps between evaluations."""
        return epoch if self.steps is None else math.ceil(self.steps / EVALUATIONS)

    def rate(self, step: int, total: int) -> float:
        """The learning rate of the step of that number, from 0, as a share of the highest."""
        rising = round(self.warmup * total)
        if step < rising:
            return (step + 1) / rising
        past = (step - rising) / max(total - rising, 1)
        return {"constant": 1.0, "linear": 1.0 - past, "cosine": (1 + math.cos(math.pi * past)) / 2}[self.schedule]


POSSIBLE: Possible = {
    **SHARED,
    "epochs": (count_or_none, "a whole number, 1 or more, or left out"),
    "steps": (count_or_none, "a whole number, 1 or more, or left out"),
    "per_class": (count_or_none, "a whole number of rows, 1 or more, or left out"),
    "verbalizer_learning_rate": (rate, RATE),
    "warmup": (lambda v: number(v) and 0 <= v <= 1, "a fraction of the steps, 0 to 1"),
    "patience": (count_or_none, "a whole number of evaluations, 1 or more, or none"),
    "checkpointing": (truth, "true or false"),
    "keep": (truth, "true or false"),
    "checkpoint_every": (count_or_none, "a whole number of steps, 1 or more, or left out"),
}
