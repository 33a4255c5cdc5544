"""How a language model is trained on text: the recipe's `[pretraining]` table and the constructor in one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deltaprompt.errors import ConfigError
from deltaprompt.trainer.possible import (
    COUNT,
    RATE,
    SHARED,
    Possible,
    check,
    count,
    count_or_none,
    number,
    rate,
    truth,
    whole,
)
from deltaprompt.trainer.training import Precision, Schedule

Kind = Literal["masked", "causal", "spans"]


@dataclass(frozen=True)
class Pretraining:
    """AdamW on what trains (Loshchilov & Hutter 2019), rows of tokens without padding, losses where tokens are guessed.

    Args:
        objective: "masked" (Devlin et al. 2019), "causal", or "spans" (Raffel et al. 2020, section 3.1.4); told by the
            backbone's kind where not given.
        steps: optimizer steps in all.
        length: tokens of a row as the model sees it.
        batch_size: rows in one pass.
        accumulate: passes to one optimizer step; 2 × 8 rows are the same step as 1 × 16.
        rate: the share of tokens that are masked (0.2 where not given), or in spans (0.15).
        span: the mean length of a span, in tokens (3 where not given).
        learning_rate: of all parameters, or of deltas that name none of their own, at its highest.
        head: whether the head's own tensors train in full beside the deltas (not an output embedding that is tied to
            the input's).
        head_learning_rate: theirs; `learning_rate` where not given. They have no weight decay.
        weight_decay: of matrices; with deltas, of those that name none of their own.
        beta2: of AdamW; 0.95 is usual for training from the start.
        warmup: steps in which the learning rate rises, linearly.
        schedule: what it is multiplied by over all steps: "linear" or "cosine" fall to 0.
        clip: the largest norm of all gradients together.
        precision: "bf16" or "fp16" for mixed precision; "fp16" needs a GPU.
        backbone_dropout: a frozen backbone's own dropout while deltas train.
        scored_at_once: positions whose vocabulary scores are held at once; more are scored again in the backward pass.
            As many as make 2^26 scores where not given.
        evaluate_every: steps between evaluations on dev.
        dev_rows: rows of each dev file at most, spread over it.
        checkpoint_every: steps between checkpoints on disk; at every evaluation where not given.
        seed: of the order of rows, of what is masked, of the deltas' or the new model's start.
    """

    objective: Kind | None = None
    steps: int = 1000
    length: int = 128
    batch_size: int = 32
    accumulate: int = 1
    rate: float | None = None
    span: float | None = None
    learning_rate: float = 1e-3
    head: bool = False
    head_learning_rate: float | None = None
    weight_decay: float = 0.01
    beta2: float = 0.999
    warmup: int = 100
    schedule: Schedule = "cosine"
    clip: float = 1.0
    precision: Precision = "no"
    backbone_dropout: bool = False
    scored_at_once: int | None = None
    evaluate_every: int = 200
    dev_rows: int = 200
    checkpoint_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check(vars(self), POSSIBLE)
        if self.head_learning_rate is not None and not self.head:
            raise ConfigError("head_learning_rate is of a head that trains; give head = true, or leave it out")
        if self.objective is not None:
            self.check_for(self.objective)

    def check_for(self, objective: Kind) -> None:
        """Raises at an option that the objective has no use for."""
        if objective == "causal" and self.rate is not None:
            raise ConfigError(
                f"rate = {self.rate} is for masked tokens and spans; leave it out of the causal objective"
            )
        if objective != "spans" and self.span is not None:
            raise ConfigError(f"span = {self.span} is the length of spans; leave it out of the {objective} objective")

    @property
    def rows(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.accumulate

    def factor(self, step: int) -> float:
        """The learning rate of the step of that number, from 0, as a share of the highest."""
        past = step / self.steps
        falling = {"constant": 1.0, "linear": 1.0 - past, "cosine": 0.5 * (1 + math.cos(math.pi * past))}
        return min(1.0, (step + 1) / self.warmup if self.warmup else 1.0) * falling[self.schedule]


POSSIBLE: Possible = {
    **SHARED,
    "objective": (lambda v: v in (None, "masked", "causal", "spans"), "masked, causal or spans, or left out"),
    "steps": (count, COUNT),
    "length": (lambda v: count(v) and v >= 8, "a whole number of tokens, 8 or more"),
    "rate": (lambda v: v is None or (number(v) and 0 < v < 1), "a share of the tokens, between 0 and 1, or left out"),
    "span": (lambda v: v is None or (number(v) and 1 <= v < math.inf), "a number of tokens, 1 or more, or left out"),
    "head": (truth, "true or false"),
    "head_learning_rate": (lambda v: v is None or rate(v), f"{RATE}, or left out"),
    "beta2": (lambda v: number(v) and 0 < v < 1, "a number between 0 and 1"),
    "warmup": (whole, "a whole number of steps, 0 or more"),
    "scored_at_once": (count_or_none, f"{COUNT}, or left out"),
    "evaluate_every": (count, COUNT),
    "dev_rows": (count, COUNT),
    "checkpoint_every": (count_or_none, f"{COUNT}, or left out"),
    "seed": (whole, "a whole number, 0 or more"),
}
