"""Losses of states among each other and with prototypes: the supervised contrast (Khosla et al. 2020), ProtoRE's three.

ProtoRE (Ding et al. 2021): S2S, statements with each other (eq. 3); S2Z, statements with prototypes (eq. 4 and 5); CLS,
prototypes told apart (eq. 6). As legacy they have the constants of the official code, and its 1e-5 within logarithms.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from deltaprompt.verbalizers._base import cosine

SHIFT, WIDTH = 384.0, 100.0  # ProtoRE's code, for states of 1536 numbers
SMOOTH = 1e-5  # the same


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


def log_odds(z: Tensor, h: Tensor, scale: float, *, legacy: bool = False) -> Tensor:
    """log d / (1 − d) of the similarity d = σ(scale · cos(h, z)), as legacy σ((h·z − 384) / 100): [b, c].

    Args:
        z: prototypes [c, d], or one set a row [b, c, d].
        h: states [b, d].
        scale: the inverse temperature; 1 in the paper, where d is then at most σ(1) = 0.73.
        legacy: as the official code.
    """
    return ((z @ h[..., None]).squeeze(-1) - SHIFT) / WIDTH if legacy else scale * cosine(z, h)


def s2z(odds: Tensor, classes: Tensor, over: Literal["statements", "prototypes"], *, legacy: bool = False) -> Tensor:
    """−mean log d(own) − mean log(1 − d(foreign)), of each prototype over statements (eq. 4), or the reverse (eq. 5).

    The mean is over the prototypes that have statements; over the statements that have a prototype.

    Args:
        odds: log d / (1 − d) of statements and prototypes [b, c].
        classes: the statements' prototypes [b]; -1 for those of none of these.
        over: which of them the own and the foreign are.
        legacy: 1e-5 is added to what a logarithm is taken of.
    """
    dim = 0 if over == "statements" else 1
    own = classes[:, None] == torch.arange(odds.shape[1], device=odds.device)  # [b, c]
    if legacy:
        near, far = ((d + SMOOTH).log() for d in (odds.sigmoid(), 1 - odds.sigmoid()))
    else:
        near, far = logsigmoid(odds), logsigmoid(-odds)
    each = _mean(near, own, dim) + _mean(far, ~own, dim)
    have = own.any(dim)
    return -(each * have).sum() / have.sum().clamp(min=1)


def s2s(h: Tensor, classes: Tensor, scale: float, *, legacy: bool = False) -> Tensor:
    """The supervised contrast of directions; as legacy that of fixed pairs.

    There i' is the partner of i, the last of its class for the first and so on, and the j are all of other classes.

    That is −mean_i log(p + 1e-5), p = e^{h_i·h_i' / 100} / (e^{h_i·h_i' / 100} + Σ_j e^{h_i·h_j / 100}).

    Args:
        h: states [b, d].
        classes: of them [b]; those of -1 are, as legacy, of no class, and only contrasted with.
        scale: the inverse temperature, which legacy has not.
        legacy: as the official code.
    """
    if not legacy:
        return contrast(normalize(h, dim=-1), classes, scale)
    sims = h @ h.mT / WIDTH
    near = sims.gather(1, _partners(classes)[:, None])  # [b, 1]
    far = sims.masked_fill(classes[:, None] == classes, -torch.inf)
    p = (near - torch.cat([near, far], 1).logsumexp(1, keepdim=True)).exp()
    have = classes >= 0
    return -((p[:, 0] + SMOOTH).log() * have).sum() / have.sum().clamp(min=1)


def told_apart(z: Tensor, weight: Tensor, bias: Tensor, which: Tensor) -> Tensor:
    """CLS: −mean log p(r | W z_r + b) of these prototypes r; z [c, d], weight [c, d], bias [c], which [n]."""
    return cross_entropy(z[which] @ weight.mT + bias, which)


def _partners(classes: Tensor) -> Tensor:
    """Of each row the one of its class that is as far from the class's end as it is from its beginning: [b]."""
    order = classes.argsort(stable=True)
    back = len(classes) - 1 - classes.flip(0).argsort(stable=True)
    return torch.empty_like(order).scatter(0, order, back)


def _mean(x: Tensor, which: Tensor, dim: int) -> Tensor:
    """The mean over some entries of a dimension; 0 where there are none."""
    return (x * which).sum(dim) / which.sum(dim).clamp(min=1)
