"""y' = y + Rᵀ (W y + b − R y), R Rᵀ = 1, W = R and b = 0 at the start (Wu et al. 2024, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import After, Computed, Delta, Started, Taxonomy
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.params import Param, Weights, normal, zeros


@dataclass(frozen=True)
class LoReFT(Delta, After, Computed, Started):
    """Low-rank linear subspace finetuning of representations: 2 · r · d + r parameters a site.

    It acts at all positions. pyreft starts W at random, so that its first output is not the backbone's.

    Args:
        rank: r, the number of directions that are edited.
        at: selectors of layers, feed-forward blocks or linear maps.
    """

    rank: int = 4
    at: tuple[str, ...] = ("layers[:]",)
    taxonomy: ClassVar[Taxonomy] = "addition"
    acts_on: ClassVar[tuple[str, ...]] = ("layer", "ffn", "linear")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"loreft: got rank={self.rank}; rank >= 1 is possible")

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        r, d = self.rank, site.outputs
        if r > d:
            raise SiteError(
                f"loreft: there are no {r} orthogonal directions in the {d} outputs of {site.name}; rank "
                f"<= {d} is possible"
            )
        return {"raw": Param((r, d), normal(d**-0.5)), "w": Param((r, d), zeros), "b": Param((1, r), zeros)}

    def start(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        return {"w": _orthonormal(w["raw"])}

    def computed(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        return {"r": _orthonormal(w["raw"]), "w": w["w"], "b": w["b"]}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        edit = y @ (w["w"] - w["r"]).mT + w["b"]  # [b, s, d] -> [b, s, r]
        return y + edit @ w["r"]


def _orthonormal(raw: Tensor) -> Tensor:
    """The rows of raw [..., r, d] made orthonormal one after another, by QR with a positive diagonal (Gram-Schmidt)."""
    wide = raw if raw.dtype == torch.float64 else raw.float()  # there is no QR in half precision
    q, upper = torch.linalg.qr(wide.mT)  # [..., d, r], [..., r, r]
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)  # [..., r]
    return (q * signs[..., None, :]).mT.to(raw.dtype)
