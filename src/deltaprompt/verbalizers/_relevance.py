"""R(v) = r(v, own) / M_d(r(v, others)): how much more a word goes with its own class (KPT, Hu et al. 2022, eq. 3).

r is the cosine of two words' scores over a support, each centred; M_d the power mean of their released code, near the
largest for two classes and near the quadratic mean for ten.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def relevant(support: Tensor, member: Tensor, name: Tensor, kept: Tensor) -> Tensor:
    """Which words to keep: [n, u], [c, u], [c], [u] -> [u].

    One share is kept in all classes: the one at which the last word's R is nearest to 1, over the classes.

    Args:
        support: log-probabilities of the words, of n texts.
        member: which words are a class's.
        name: the word that is the class's name.
        kept: words that are still in question.
    """
    score = _scores(support, member, name)
    orders = [_by_score(score, own & kept) for own in member]
    shares = [i / 100 for i in range(1, 101)]
    miss = [sum(_miss(score, order, share) for order in orders) for share in shares]
    best = shares[min(range(len(shares)), key=miss.__getitem__)]
    found = torch.zeros_like(kept)
    for order in orders:
        found[order[: _count(order, best)]] = True
    return found


def _scores(support: Tensor, member: Tensor, name: Tensor) -> Tensor:
    """R of every word [u]; 0 where it goes against its own class, the largest number where no other class has part."""
    centred = normalize(support - support.mean(0), dim=0)  # [n, u]
    r = centred.T @ centred[:, name]  # [u, c]
    classes = len(member)
    own = member.T  # [u, c]
    d = 10 / (classes - 2 + 0.01) + 1
    others = r.clamp(min=0).masked_fill(own, 0.0).pow(d).sum(-1) / max(classes - 1, 1)
    score = r.masked_fill(~own, -torch.inf).amax(-1).clamp(min=0) / others.pow(1 / d)
    return score.nan_to_num(nan=0.0, posinf=torch.finfo(score.dtype).max)


def _by_score(score: Tensor, which: Tensor) -> Tensor:
    """The numbers of these words, the most relevant first."""
    numbers = which.nonzero()[:, 0]
    return numbers[score[numbers].argsort(descending=True)]


def _count(order: Tensor, share: float) -> int:
    """Words of a class at that share; one at least, where there is any."""
    return min(len(order), max(1, round(share * len(order))))


def _miss(score: Tensor, order: Tensor, share: float) -> float:
    """(R − 1)² of the last word that a share keeps."""
    return float((score[order[_count(order, share) - 1]].clamp(max=10.0) - 1) ** 2) if len(order) else 0.0
