"""y' = y + U σ(D y + b) + c, U and D = Σ_i A_i ⊗ (s_i t_iᵀ), U = 0 at the start (Karimi Mahabadi et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import FED, MIXED, SIGMA, Activation, After, Delta, Shared, Taxonomy
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.params import Param, Weights, normal, zeros


@dataclass(frozen=True)
class Compacter(Delta, After, Shared):
    """Compacter: 3 · (d + m) parameters a site, m = d / reduction_factor rounded up to a multiple of n, and n³ in all.

    As in the authors' code, the n matrices A_i are one set: for all sites, and for the maps down and up alike. D starts
    as large as a dense map; the authors start all factors near zero, which is not quite the identity.

    Args:
        phm_dim: n, the number of Kronecker products and the size of their shared factor.
        reduction_factor: what the width d is divided by to give the bottleneck m.
        activation: σ.
        at: selectors of linear maps and feed-forward blocks; `("ffn.down",)` alone is Compacter++.
    """

    phm_dim: int = 4
    reduction_factor: int = 16
    activation: Activation = "gelu"
    at: tuple[str, ...] = (MIXED, FED)
    taxonomy: ClassVar[Taxonomy] = "addition"
    acts_on: ClassVar[tuple[str, ...]] = ("linear", "ffn")

    def __post_init__(self) -> None:
        if self.phm_dim < 1 or self.reduction_factor < 1 or self.activation not in SIGMA:
            raise ConfigError(
                f"compacter: got phm_dim={self.phm_dim}, reduction_factor={self.reduction_factor}, "
                f"activation={self.activation!r}; possible: phm_dim >= 1, reduction_factor >= 1, "
                f"activation in {list(SIGMA)}"
            )

    def selectors(self) -> Sequence[str]:
        return self.at

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Param]:
        return {"a": Param((self.phm_dim,) * 3, normal(self.phm_dim**-0.5))}

    def params(self, site: Site) -> Mapping[str, Param]:
        n, d = self.phm_dim, site.outputs
        if d % n:
            raise SiteError(
                f"compacter: phm_dim={n} does not divide the {d} outputs of {site.name}; "
                f"possible: {', '.join(str(i) for i in range(1, min(d, 16) + 1) if d % i == 0)}, or choose other sites"
            )
        m = -(-d // (self.reduction_factor * n)) * n
        return {
            "down_s": Param((n, m // n), normal(1.0)),
            "down_t": Param((n, d // n), normal(d**-0.5)),
            "down_bias": Param((1, m), zeros),
            "up_s": Param((n, d // n), zeros),
            "up_t": Param((n, m // n), normal(m**-0.5)),
            "up_bias": Param((1, d), zeros),
        }

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        inner = SIGMA[self.activation](_map(y, w["a"], w["down_s"], w["down_t"]) + w["down_bias"])  # [b, s, m]
        return y + _map(inner, w["a"], w["up_s"], w["up_t"]) + w["up_bias"]


def _map(x: Tensor, a: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Σ_i (A_i ⊗ s_i t_iᵀ) x for x [b, s, in], A [..., n, n, n], s [..., n, out/n], t [..., n, in/n]."""
    # A sum of n² rank-one maps, never written out as [out, in]: a token costs n² · in + n · out instead of in · out.
    n = a.shape[-1]
    right = torch.einsum("...ipq,...ij->...piqj", a, t).flatten(-2).flatten(-3, -2)  # [..., n · n, in]
    inner = (x @ right.mT).unflatten(-1, (n, n))  # [b, s, p, i]
    return (inner @ s[..., None, :, :]).flatten(-2)
