"""The loss where tokens are guessed: the head sees those states only, and holds the scores of some at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Adapted
from deltaprompt.errors import BackboneError
from deltaprompt.pretrain.objectives import Objective, Scored

SCORES = 2**26  # vocabulary scores at once where it is not told: 256 MiB in float32, and as much again for gradients


class Scorer(nn.Module):
    """A language model whose forward pass is the sum of its losses.

    Args:
        backbone: a language model.
        adapted: what carries the deltas on it, so that whoever trains the module sees them; or its model itself.
        at_once: positions whose scores are held at once.
    """

    def __init__(self, backbone: Backbone, adapted: Adapted | None, at_once: int | None = None) -> None:
        super().__init__()
        if backbone.head is None:
            raise BackboneError(f"{backbone.name} has no head; load it with a kind that has one")
        self.backbone = backbone
        self.head = backbone.head
        self.trained: nn.Module = backbone.model if adapted is None else adapted
        self.at_once = at_once or max(SCORES // self.head.size, 1)

    def forward(self, scored: Scored) -> Tensor:
        """Σ −log p(token) over the positions that count."""
        states, labels = self._counted(scored)
        if len(states) <= self.at_once:
            return self._loss(states, labels)
        parts = [
            torch.as_tensor(checkpoint(self._loss, some, own, use_reentrant=False))
            for some, own in zip(states.split(self.at_once), labels.split(self.at_once), strict=True)
        ]
        return torch.stack(parts).sum()

    @torch.inference_mode()
    def guessed(self, scored: Scored) -> tuple[float, int, int]:
        """The sum of the losses, how many tokens are guessed right, and of how many."""
        states, labels = self._counted(scored)
        loss, right = 0.0, 0
        for some, own in zip(states.split(self.at_once), labels.split(self.at_once), strict=True):
            scores = self.head.logits(some).float()
            loss += float(cross_entropy(scores, own, reduction="sum"))
            right += int((scores.argmax(-1) == own).sum())
        return loss, right, len(labels)

    def _counted(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """The states [n, d] that guess, and the tokens [n] that are right."""
        return self.backbone.states(scored.inputs)[scored.at], scored.labels[scored.at]

    def _loss(self, states: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.head.logits(states).float(), labels, reduction="sum")  # [n, V]


def measured(
    scorer: Scorer,
    objective: Objective,
    rows: Tensor,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[None]],
) -> dict[str, float]:
    """Accuracy and mean loss of the tokens that are guessed in rows [n, room]; always the same ones are hidden."""
    hidden = objective.scored(rows.long(), torch.Generator().manual_seed(0))
    device = next(scorer.parameters()).device
    loss, right, tokens = 0.0, 0, 0
    for first in range(0, len(rows), batch_size):
        with autocast():
            found = scorer.guessed(hidden.rows(first, first + batch_size).to(device))
        loss, right, tokens = loss + found[0], right + found[1], tokens + found[2]
    return {"accuracy": right / max(tokens, 1), "loss": loss / max(tokens, 1), "tokens": float(tokens)}
