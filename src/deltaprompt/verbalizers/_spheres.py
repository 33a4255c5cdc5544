"""Spheres, cones and Gaussians around centres (HyperProto, Ding et al. 2023): what is how far, and how wide."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltaprompt.verbalizers._base import class_means, cosine, squared_distance

Metric: TypeAlias = Literal["distance", "cone", "gaussian"]
SMOOTH = 1e-12  # keeps the gradient of a distance finite where a state lies on its centre
FLAT = 1e-6  # of the widest class's spread: what is below it is rounding, of copies of one example


def measured(metric: Metric, z: Tensor, e: Tensor, h: Tensor) -> Tensor:
    """M [b, c] of states h [b, d], centres z [c, d] and radii e [c], or a set of both a row.

    distance: ‖h − z‖ − ε; cone: −cos(max(0, ∠(h, z) − |ε|)); gaussian: ‖h − z‖² / 2ε² + d log ε.
    """
    if metric == "cone":
        near = 1 - torch.finfo(h.dtype).eps  # where the angle has a gradient
        angle = cosine(z, h).clamp(-near, near).acos()
        return -(angle - e.abs()).clamp(min=0).cos()
    squared = squared_distance(z, h)
    if metric == "gaussian":
        return (squared / e.square() + h.shape[-1] * e.square().log()) / 2
    return (squared + SMOOTH).sqrt() - e


def centres(metric: Metric, support: Tensor, classes: Tensor, count: int) -> Tensor:
    """The mean of each class's states [c, d], for a cone of their directions."""
    return class_means(normalize(support, dim=-1) if metric == "cone" else support, classes, count)


def radii(
    metric: Metric, z: Tensor, support: Tensor, classes: Tensor, one_shot: float | None, unbiased: bool
) -> Tensor:
    """The mean distance from the centre, mean angle to it or standard deviation of each class's states: [c].

    Args:
        metric: which of these.
        z: the centres [c, d].
        support: states [n, d].
        classes: of them [n].
        one_shot: of a class whose states are one point; none for the mean of the others', where there are some.
        unbiased: times √((k + 1) / (k − 1)): what is expected of a new state, as the k themselves made the centre.
    """
    apart = _apart(metric, z[classes], support)  # [n]
    spread = class_means(apart[:, None], classes, len(z))[:, 0]
    k = torch.bincount(classes[classes >= 0], minlength=len(z))
    flat = (k < 2) | (spread <= FLAT * spread.max())
    spread = spread.masked_fill(flat, 1.0)  # whose root has a gradient
    if metric == "gaussian":
        spread = spread.sqrt()
    if unbiased:
        spread = spread * ((k + 1) / (k - 1).clamp(min=1)).sqrt()
    if one_shot is not None:
        return spread.masked_fill(flat, one_shot)
    if flat.all():
        return torch.full_like(spread, 1.0 if metric == "gaussian" else 0.0)
    return torch.where(flat, spread[~flat].mean(), spread)


def _apart(metric: Metric, z: Tensor, x: Tensor) -> Tensor:
    """‖x − z‖, ∠(x, z) by its chord, which is exact where it is small, or the mean of (x − z)²: [n, d] twice -> [n]."""
    if metric == "cone":
        chord = (normalize(x, dim=-1) - normalize(z, dim=-1)).norm(dim=-1)
        return 2 * (chord / 2).clamp(max=1 - FLAT).asin()
    return (x - z).square().mean(-1) if metric == "gaussian" else (x - z).norm(dim=-1)
