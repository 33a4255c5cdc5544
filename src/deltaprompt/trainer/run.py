"""What a training run was: its course and its result, as Python has it and as the adaptation's record has it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from torch import Tensor

from deltaprompt.errors import ConfigError

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    steps: int  # optimizer steps made
    epochs: float  # passes over the training rows
    best_step: int  # the step after which the model is as it is kept
    best: Metrics  # accuracy, macro_f1 and loss on dev there; empty without dev
    history: Sequence[Mapping[str, Any]]  # step, epoch, loss, learning_rate and dev, at every evaluation
    seconds: float
    stopped: str  # "done", "early" where dev stopped getting better, or "failed"
    trainable: int  # numbers that were trained
    bytes: int = 0  # of the saved adaptation; 0 where it was not saved
    failed: str = ""  # what went wrong, where others were trained to their end

    def record(self) -> dict[str, Any]:
        """The run as JSON; a loss that is no number is left out (null)."""
        return {name: finite(value) for name, value in asdict(self).items() if name not in ("bytes", "failed")}


@dataclass
class State:
    """Where a run stands: with the optimizer, all that a later step depends on."""

    parts: Mapping[str, Tensor]  # the model's own tensors, live
    step: int = 0
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_parts: dict[str, Tensor] = field(default_factory=dict)
    waited: int = 0  # evaluations since the best
    losses: list[float] = field(default_factory=list)  # since the last evaluation
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    failed: str = ""  # what went wrong, where others go on
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.keep()

    def keep(self) -> None:
        """The model as it is becomes the best."""
        self.best_parts = {name: tensor.detach().clone() for name, tensor in self.parts.items()}
        self.best_step = self.step

    def restore(self) -> None:
        """The best becomes the model."""
        put(self.best_parts, self.parts)

    def take(self, metrics: dict[str, float]) -> bool:
        """Takes an evaluation's metrics (none without dev) in; true, and the model is kept, where it is the best."""
        better = not self.best or not metrics or rank(metrics) > rank(self.best)
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best = metrics
            self.keep()
        return better

    def state_dict(self) -> dict[str, Any]:
        """For accelerate, which writes it to disk."""
        return {name: _apart(value) for name, value in vars(self).items()}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """From disk; the model's own tensors are overwritten in place."""
        put(stored["parts"], self.parts)
        vars(self).update({name: value for name, value in stored.items() if name != "parts"})


def _apart(value: Any) -> Any:
    """A value to write, its tensors without their graph."""
    if not isinstance(value, Mapping):
        return value
    return {name: inner.detach() if isinstance(inner, Tensor) else inner for name, inner in value.items()}


def put(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copies tensors by name."""
    if values.keys() != into.keys():
        odd = sorted(values.keys() ^ into.keys())
        raise ConfigError(f"this model and the saved one do not have the same trainable tensors: {', '.join(odd[:4])}")
    for name, tensor in into.items():
        tensor.data.copy_(values[name])


def finite(value: Any) -> Any:
    """JSON that has no form for numbers that are not finite: null stands for them."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


CHOOSES: Final = ("f1", "accuracy")  # the first that is measured is what the best is chosen by


def rank(metrics: Metrics) -> tuple[float, float]:
    """By what chooses, where it is measured, then by the lower loss; nothing measured is all the same."""
    if not metrics:
        return 0.0, 0.0
    loss, name = metrics["loss"], chooser(metrics)
    return 0.0 if name == "loss" else metrics[name], -loss if math.isfinite(loss) else -math.inf


def chooser(metrics: Metrics) -> str:
    """The metric that the best is chosen by."""
    return next((name for name in CHOOSES if name in metrics), "loss")


def headline(metrics: Metrics) -> str:
    """The metric that the best is chosen by, and its value."""
    return f"{chooser(metrics)} {metrics[chooser(metrics)]:.3f}"
