"""y' = y ⊙ l + b at the norms, l = 1 and b = 0 at the start (Qi et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import After, Delta, Mergeable, Taxonomy
from deltaprompt.params import Param, Weights, ones, zeros


@dataclass(frozen=True)
class LNTuning(Delta, After, Mergeable):
    """LN tuning: d parameters a norm, 2 · d where it has a bias.

    A norm's scale becomes γ' = γ ⊙ l and its bias β' = β ⊙ l + b: wherever γ is not 0, l and b reach every γ', β' that
    training γ and β themselves would.

    Args:
        at: selectors of norms; all of them by default.
    """

    at: tuple[str, ...] = ("*norm",)
    taxonomy: ClassVar[Taxonomy] = "specification"
    acts_on: ClassVar[tuple[str, ...]] = ("norm",)

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        bias = {"b": Param((1, site.outputs), zeros)} if site.biased else {}
        return {"l": Param((1, site.outputs), ones), **bias}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return y * w["l"] + w["b"] if "b" in w else y * w["l"]

    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = w["l"][0]
        return weight * scale, None if bias is None else bias * scale + (w["b"][0] if "b" in w else 0.0)
