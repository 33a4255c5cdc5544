"""y' = y + (a · y) v, v = 0 at the start: a shift v, weighted for every token (Fu et al. 2022, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import After, Delta, Taxonomy
from deltaprompt.params import Param, Weights, kaiming, zeros


@dataclass(frozen=True)
class AdapterBias(Delta, After):
    """AdapterBias: 2 · d parameters a site.

    Args:
        at: selectors of linear maps and feed-forward blocks.
    """

    at: tuple[str, ...] = ("ffn.down|ffn|mixer.out",)
    taxonomy: ClassVar[Taxonomy] = "addition"
    acts_on: ClassVar[tuple[str, ...]] = ("linear", "ffn")

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"a": Param((1, site.outputs), kaiming), "v": Param((1, site.outputs), zeros)}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return y + (y @ w["a"].mT) * w["v"]  # [b, s, d] -> [b, s, 1] -> [b, s, d]
