"""Several labels an example: each label's odds against all others, p / (1 − p), times a factor a label that is learned.

p is the softmax of a verbalizer's class scores, so that nothing is asked of a verbalizer: before anything is learned, a
label's probability is p itself. What a softmax shares between labels that are right together, the factors give back.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

ODDS: Final = "odds"  # the name of the logarithms of the factors [c], among a verbalizer's tensors
LEAST: Final = 0.5  # the probability above which a label is taken to be right


def log_odds(scores: Tensor) -> Tensor:
    """log p − log (1 − p) of the softmax p of class scores [b, c], in float32 or better.

    1 − p of the best class is the sum of the others' p, which does not round to 0 where p rounds to 1.
    """
    log_p = log_softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1)
    best = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, log_p.argmax(-1, keepdim=True), True)
    others = log_p.masked_fill(best, -torch.inf).logsumexp(-1, keepdim=True)  # [b, 1]
    rest = torch.log1p(-log_p.masked_fill(best, -torch.inf).exp())  # p is 1/2 at most where it is not the best
    return log_p - torch.where(best, others, rest)


def loss(scores: Tensor, classes: Tensor) -> Tensor:
    """The mean binary cross-entropy over rows and labels: log-odds [b, c], and which are right [b, c]."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return binary_cross_entropy_with_logits(scores, classes.to(scores.dtype))


def chosen(scores: Tensor, several: bool, least: float = 0.0) -> list[list[int]]:
    """The classes that scores [b, c] choose, the best first: the best; of several all above `least`, but never none."""
    best = scores.argmax(-1).tolist()
    if not several:
        return [[i] for i in best]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    count = (scores > least).sum(-1).tolist()
    return [row[:n].tolist() if n else [i] for row, n, i in zip(order, count, best, strict=True)]


def right(classes: Tensor) -> list[list[int]]:
    """The classes of rows: of indices [b], or of what is right [b, c]."""
    if classes.ndim == 1:
        return [[i] for i in classes.tolist()]
    return [row.nonzero()[:, 0].tolist() for row in classes]
