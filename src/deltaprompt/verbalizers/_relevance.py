"""What refines words: how likely their tokens are, and R(v) = r(v, own) / mean_{y ≠ own} r(v, y) (KPT, Hu et al. 2022).

R (equation 3) is how much more a word goes with its own class: r is the cosine of two words' scores over a support,
each centred; a word with R < 1 goes with other classes more. Their released code differs: a power mean of the others,
no word of R = 0, and one share of words for all classes, cut where R is nearest to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def frequent(every: Tensor, ids: Tensor, lengths: Tensor, share: float) -> Tensor:
    """The words [u] of which no token is among the least likely ones, a share of the vocabulary.

    Args:
        every: how likely each token is [V].
        ids: tokens of the words [u, t].
        lengths: how many each word has [u].
        share: of the vocabulary.
    """
    rank = every.argsort().argsort().float()  # 0 for the least likely token
    inside = torch.arange(ids.shape[1], device=every.device) < lengths[:, None]  # [u, t]
    return rank[ids].masked_fill(~inside, torch.inf).amin(-1) >= share * len(every)


def relevant(support: Tensor, member: Tensor, name: Tensor, kept: Tensor, legacy: bool = False) -> Tensor:
    """Which words to keep: [u].

    Args:
        support: log-probabilities (or logits, as in the released code) of the words, of n texts [n, u].
        member: which words are a class's [c, u].
        name: the word that is the class's name [c].
        kept: words that are still in question [u].
        legacy: whether to keep those that the released code keeps.
    """
    classes = len(member)
    d = 10 / (classes - 2 + 0.01) + 1 if legacy else 1.0
    score = _scores(support, member, name, d)
    if not legacy:
        return kept & (score >= 1)
    orders = [_by_score(score, own & kept & (score > 0)) for own in member]
    shares = [i / 100 for i in range(1, 101)]
    best = min(shares, key=lambda share: sum(_miss(score, order, share) for order in orders))
    found = torch.zeros_like(kept)
    for order in orders:
        found[order[: _count(order, best)]] = True
    return found


def _scores(support: Tensor, member: Tensor, name: Tensor, d: float) -> Tensor:
    """R of every word [u], the others' mean being the power mean of exponent d; where that is 0, the largest number.

    What is below 0 counts as 0: a word that goes against its own class has R = 0.
    """
    centred = normalize(support - support.mean(0), dim=0)  # [n, u]
    r, own = (centred.T @ centred[:, name]).clamp(min=0), member.T  # [u, c]
    others = r.masked_fill(own, 0.0)
    most = others.amax(-1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)  # d is 1001 for two classes
    mean = most[:, 0] * ((others / most).pow(d).sum(-1) / max(len(member) - 1, 1)).pow(1 / d)
    score = r.masked_fill(~own, 0.0).amax(-1) / mean
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
