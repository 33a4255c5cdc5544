"""A model that also guesses masked tokens of its training texts, in one pass (ProtoRE's L_MLM, Ding et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaprompt.compose import Index
from deltaprompt.compose.routing import slots_of
from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded
from deltaprompt.model.generator import token_losses
from deltaprompt.model.model import Model
from deltaprompt.model.wrapped import Wrapped
from deltaprompt.params import noise
from deltaprompt.types import AtMask, Batch, Example


class WithMasks(Wrapped):
    """The loss is the model's own and `weight` times the mean cross-entropy of masked tokens; answers are the model's.

    While it trains each token is replaced by the mask with probability `rate`, but special ones and those where an
    answer is read. Their guesses keep the deltas near what the language model knows. What is kept is the model.

    Args:
        model: on a masked language model.
        weight: of the masked tokens' loss; the paper's is 0.5.
        rate: of tokens that are masked.
    """

    def __init__(self, model: Model, weight: float = 0.5, rate: float = 0.15) -> None:
        if model.backbone.kind != "masked":
            raise ConfigError(
                f"tokens are masked on a masked language model, and this backbone is {model.backbone.kind}; load it "
                "with kind='masked', or train the model by itself"
            )
        if not 0 < weight < math.inf or not 0 < rate < 1:
            raise ConfigError(f"got weight={weight}, rate={rate}; possible: weight above 0, rate between 0 and 1")
        super().__init__(model)
        self.weight, self.rate = weight, rate
        self.register_buffer("special", torch.tensor(sorted(self.features.tokenizer.all_special_ids)), persistent=False)
        self.train(False)

    def forward(self, batch: Batch, adaptation: Index = None, sizes: Sequence[int] | None = None) -> dict[str, Tensor]:
        """As the model's; see `Model.forward`."""
        if not self.training or batch.labels is None:
            return self.model(batch, adaptation) if sizes is None else self.model(batch, adaptation, sizes)
        ids, masked = batch.inputs["input_ids"], self._drawn(batch)  # [b * v, s]
        places, ends = _places(masked), batch.answer_at.shape[1]
        inputs = {**batch.inputs, "input_ids": ids.masked_fill(masked, int(self.features.tokenizer.mask_token_id))}
        read = replace(batch, inputs=inputs, answer_at=torch.cat([batch.answer_at, places], 1))
        at = self.model.at_mask(read, adaptation)
        answers = AtMask(at.hidden[:, :, :ends], at.present[:, :, :ends], at.logits)
        logits = self.model.scores(answers, adaptation)
        losses = self.model.losses(answers, logits, batch.labels, adaptation, sizes)
        losses = losses + self.weight * self._guessed(
            at.hidden[:, :, ends:], places, ids, adaptation, sizes or [len(logits)]
        )
        return {"loss": losses.mean(), "losses": losses, "logits": logits}

    def _drawn(self, batch: Batch) -> Tensor:
        """Which tokens are masked now [b * v, s]."""
        ids = batch.inputs["input_ids"]
        drawn = noise(torch.ones(ids.shape, device=ids.device), self.rate) == 0
        special = self.get_buffer("special")
        free = batch.inputs["attention_mask"].bool() & ~torch.isin(ids, special) & (ids < self.backbone.vocabulary)
        return drawn & free

    def _guessed(self, hidden: Tensor, places: Tensor, ids: Tensor, adaptation: Index, sizes: Sequence[int]) -> Tensor:
        """The mean loss of masked tokens of each adaptation's rows; 0 where none was masked."""
        assert self.backbone.head is not None  # of every masked language model
        there = places >= 0  # [b * v, k]
        right = ids.gather(1, places.clamp(min=0))[there]
        routing, whose = self.model.adapted.routing, slots_of(adaptation, there.nonzero()[:, 0] // hidden.shape[1])
        lost = token_losses(self.backbone.head, hidden.flatten(0, 1)[there], right, routing, whose)
        each = lost.new_zeros(there.shape).masked_scatter(there, lost)
        rows = [n * hidden.shape[1] for n in sizes]
        parts = zip(each.split(rows), there.split(rows), strict=True)
        return torch.stack([own.sum() / have.sum().clamp(min=1) for own, have in parts])

    # The model's own

    def encode(self, examples: Sequence[Any], slot: int = 0) -> list[Encoded]:
        """Examples as token ids."""
        return self.model.encode(examples, slot)

    def measure(
        self, rows: Sequence[Encoded], batch_size: int = 32, slot: int = 0, through: nn.Module | None = None
    ) -> dict[str, float]:
        """The model's metrics of labelled rows."""
        return self.model.measure(rows, batch_size, slot, through)

    def evaluate(self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> dict[str, float]:
        """How good the model is on labelled examples."""
        return self.model.evaluate(examples, batch_size, slot)

    def record(self, slot: int = 0) -> dict[str, Any]:
        """What is asked of the model, which is what is kept."""
        return self.model.record(slot)


def _places(masked: Tensor) -> Tensor:
    """The positions that are true [b, s] -> [b, k], -1 behind the last."""
    count = masked.sum(1)
    order = torch.where(masked, torch.arange(masked.shape[1], device=masked.device), masked.shape[1]).sort(1).values
    found = order[:, : max(int(count.max()), 1)]
    return found.masked_fill(found == masked.shape[1], -1)
