"""y' = y + b, b = 0 at the start: the bias terms alone are trained (Ben Zaken et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import After, Delta, Mergeable, Taxonomy
from deltaprompt.params import Param, Weights, zeros


@dataclass(frozen=True)
class BitFit(Delta, After, Mergeable):
    """Bias tuning: `out` parameters a site; a map without a bias gets one.

    Args:
        at: selectors of linear maps and norms.
    """

    at: tuple[str, ...] = ("attn.*|", "mixer.*|", "ffn.*|", "shared.*|")
    taxonomy: ClassVar[Taxonomy] = "specification"
    acts_on: ClassVar[tuple[str, ...]] = ("linear", "norm")

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"bias": Param((1, site.outputs), zeros)}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return y + w["bias"]

    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, w["bias"][0] + (torch.zeros_like(w["bias"][0]) if bias is None else bias)
