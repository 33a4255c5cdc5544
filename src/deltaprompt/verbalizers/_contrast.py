"""The supervised contrast of a batch's examples (Khosla et al. 2020, eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def contrast(v: Tensor, classes: Tensor, scale: float, *, with_itself: bool = False) -> Tensor:
    """−mean_i mean_{j ~ i} log softmax_{j'}(scale · v_i·v_j')_j, j ~ i the others of i's class; 0 where there are none.

    Args:
        v: unit vectors [b, k].
        classes: of them [b].
        scale: the inverse temperature.
        with_itself: whether an example's pair with itself counts, among the j and among the j'.
    """
    itself = torch.eye(len(v), dtype=torch.bool, device=v.device)
    alike = classes[:, None] == classes
    sims = scale * (v @ v.mT)
    if not with_itself:
        alike, sims = alike & ~itself, sims.masked_fill(itself, -torch.inf)
    have = alike.any(-1)
    if not have.any():
        return v.sum() * 0.0
    log_p = sims.log_softmax(-1).masked_fill(~alike, 0.0)
    return -(log_p.sum(-1)[have] / alike.sum(-1)[have]).mean()
