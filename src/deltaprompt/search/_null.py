"""What is found where nothing is to be found: by guessing, 1 − (1 − 1/C)^M within M prompts; on labels dealt out anew.

A search over many prompts finds a right one for almost any row, whatever the model knows. So what it finds is told next
to what guesses would find (the null), and to what the same answers find where the labels are permuted.
"""

from __future__ import annotations

from math import exp, lgamma, log, sqrt
from random import Random
from typing import Final

import torch
from torch import Tensor

QUANTILE: Final = 1.96  # of the normal distribution: 95 of 100 lie within


def success(classes: int, prompts: int) -> float:
    """1 − (1 − 1/C)^M: the share of rows for which one of M guesses is right."""
    return 1 - (1 - 1 / classes) ** prompts


def calls(classes: int, prompts: int) -> float:
    """E[min(T, M)] = C · (1 − (1 − 1/C)^M): the guesses made on a row, until one is right or M are used up."""
    return classes * success(classes, prompts)


def within(classes: int, prompts: int, rows: int) -> float:
    """Half the width of the 95 % interval of that share on so many rows."""
    share = success(classes, prompts)
    return QUANTILE * sqrt(share * (1 - share) / rows)


def best_of(classes: int, rows: int, guessers: int) -> float:
    """E[max] = Σ_{k=1..n} (1 − F(k − 1)^g) / n: the best accuracy of g guessers on n rows, F binomial(n, 1/C)."""
    hit, miss = log(1 / classes), log(1 - 1 / classes)
    below, expected = 0.0, 0.0
    for k in range(rows):
        ways = lgamma(rows + 1) - lgamma(k + 1) - lgamma(rows - k + 1)
        below = min(below + exp(ways + k * hit + (rows - k) * miss), 1.0)  # F(k)
        expected += 1 - below**guessers
    return expected / rows


def permuted(classes: Tensor, times: int, seed: int) -> Tensor:
    """The classes [n] in new orders: [times, n]."""
    chance = Random(seed)
    orders = [sorted(range(len(classes)), key=[chance.random() for _ in classes].__getitem__) for _ in range(times)]
    return classes[torch.tensor(orders, dtype=torch.long).reshape(times, len(classes))]


def first_right(predicted: Tensor, labels: int) -> Tensor:
    """The number, from 1, of the first prompt that answers a class: predictions [p, n] -> [c, n]; p + 1 for none."""
    prompts = len(predicted)
    each = []
    for label in range(labels):
        hit = predicted == label  # [p, n]
        each.append(torch.where(hit.any(0), hit.int().argmax(0) + 1, prompts + 1))
    return torch.stack(each)


def needed(first: Tensor, classes: Tensor) -> Tensor:
    """The prompts that rows need until one is right, from `first_right` [c, n] and classes [..., n]: [..., n]."""
    return first[classes, torch.arange(first.shape[1])]
