"""Types without labels: s = 1 − JS(h, h') of two texts' distributions h over the labels (PLET, Ding et al. 2022, 3.3).

JS is in base 2, so that it lies between 0, where h and h' are equal, and 1, where they have nothing in common; s is
then the probability that both mention one entity. The official code has a Sinkhorn divergence in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from deltaprompt.compose import Index
from deltaprompt.data.linked import APART, SAME, rows_of_pair
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.features import Encoded
from deltaprompt.model.model import Model
from deltaprompt.model.starting import calibrate
from deltaprompt.model.trainable import check_known, evaluating
from deltaprompt.model.wrapped import Wrapped
from deltaprompt.types import Batch, Example
from deltaprompt.verbalizers._base import Started

LEAST: Final = 1e-6  # is added to s and to 1 − s in their logarithms, as in the official code


class Similar(Wrapped):
    """A model that learns from pairs of texts; what it learns is the model's own, which then answers without examples.

    `forward` maps a `Batch` of pairs to `{"loss", "similarity"}`: any trainer can train it.

    Args:
        model: its verbalizer needs no labelled examples to start from.
    """

    def __init__(self, model: Model) -> None:
        for slot in range(model.adapted.slots):
            verbalizer = model.reader(slot).verbalizer
            if isinstance(verbalizer, Started) and verbalizer.labelled:
                raise ConfigError(
                    f"{type(verbalizer).__name__} starts from labelled examples, and pairs have no labels; choose "
                    "words, as hierarchical and label_words have them"
                )
        super().__init__(model)
        self.train(False)

    def forward(self, batch: Batch, adaptation: Index = None, sizes: Sequence[int] | None = None) -> dict[str, Tensor]:
        """`similarity` s [b] and, of pairs that are known to be the same or not, the mean of −log s or −log (1 − s).

        Args:
            batch: b pairs, the two texts' variants one after another.
            adaptation: whose they are: a slot, or one a pair [b].
            sizes: where pairs of several adaptations stand one after another, the pairs of each; `losses` are theirs.
        """
        answers = None if batch.answers is None else (_each(batch.answers[0]), _each(batch.answers[1]))
        texts = Batch(batch.inputs, batch.answer_at, batch.variants // 2, answers=answers)
        slots = adaptation.repeat_interleave(2) if isinstance(adaptation, Tensor) else adaptation
        log_h = self.model.log_distributions(texts, slots).unflatten(0, (-1, 2))  # [b, 2, c]
        apart = jensen_shannon(log_h[:, 0], log_h[:, 1])  # [b]
        found = {"similarity": 1 - apart}
        if batch.labels is None:
            return found
        each = torch.where(batch.labels > 0, (1 - apart + LEAST).log(), (apart + LEAST).log()).neg()
        losses = torch.stack([own.mean() for own in each.split(list(sizes or [len(each)]))])
        return {"loss": losses.mean(), "losses": losses, **found}

    def encode(self, examples: Sequence[Example], slot: int = 0) -> list[Encoded]:
        """Pairs as rows that hold the variants of both their texts; class 1 is the same entity."""
        texts = self.model.encode([row for pair in examples for row in rows_of_pair(pair)], slot)
        return [
            Encoded((*one.variants, *other.variants), label_of(pair), answers=(*one.answers, *other.answers))
            for pair, one, other in zip(examples, texts[::2], texts[1::2], strict=True)
        ]

    @torch.inference_mode()
    def measure(
        self, rows: Sequence[Encoded], batch_size: int = 32, slot: int = 0, through: nn.Module | None = None
    ) -> dict[str, float]:
        """`{"accuracy", "loss"}` of encoded pairs; a pair is taken for the same where s is above 1/2."""
        check_known([row.label is not None for row in rows])
        right, loss = 0, 0.0
        with evaluating(self):
            for batch in self.batches(rows, batch_size):
                out = (through or self)(batch.to(self.device), slot)
                assert batch.labels is not None
                right += int(((out["similarity"].cpu() > 0.5) == (batch.labels > 0)).sum())
                loss += float(out["loss"]) * len(batch.labels)
        return {"accuracy": right / len(rows), "loss": loss / len(rows)}

    def start(self, pairs: Sequence[Example], slot: int, batch_size: int, unlabelled: Sequence[Example]) -> None:
        """A verbalizer without labels is given its start, and a calibration is measured, on texts of the pairs."""
        texts = unlabelled or [rows_of_pair(pair)[0] for pair in pairs]
        self.model.start([], slot, batch_size, texts)
        calibrate(self.model, texts, slot, batch_size)

    def evaluate(self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> dict[str, float]:
        """How good the model is on labelled examples, none of which it has seen."""
        return self.model.evaluate(examples, batch_size, slot)

    def record(self, slot: int = 0) -> dict[str, Any]:
        """What is asked of the model within, which is what is kept."""
        return self.model.record(slot)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2, in base 2: [..., c], [..., c] -> [...], from 0 to 1."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    each = [(h.exp() * (h - log_m).nan_to_num(0.0)).sum(-1) for h in (log_p, log_q)]  # 0 log 0 is 0
    return ((each[0] + each[1]) / (2 * math.log(2.0))).clamp(0.0, 1.0)


def _each(of_pairs: Tensor) -> Tensor:
    """What rows of two texts have of both, [b, 2 c, …], of each text: [2 b, c, …]."""
    return of_pairs.unflatten(1, (2, -1)).flatten(0, 1)


def label_of(pair: Example) -> int:
    """Whether a pair is the same entity: 1 or 0."""
    if pair.label not in (SAME, APART):
        raise DataError(f"a pair is {SAME!r} or {APART!r}, got {pair.label!r}; make pairs with Linked().pairs(rows)")
    return int(pair.label == SAME)
