"""k' = l_k ⊙ k, v' = l_v ⊙ v, l_ff ⊙ what enters the last feed-forward map; l = 1 at first (Liu et al. 2022, 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import KEYS, VALUES, After, Before, Delta, Mergeable, Taxonomy
from deltaprompt.errors import SiteError
from deltaprompt.params import Param, Weights, ones


@dataclass(frozen=True)
class IA3(Delta, After, Before, Mergeable):
    """Rescaling of inner activations: `out` parameters a map in `at`, `in` a map in `at_input`.

    Args:
        at: selectors of linear maps whose output is rescaled.
        at_input: selectors of linear maps whose input is rescaled.
    """

    at: tuple[str, ...] = (KEYS, VALUES)
    at_input: tuple[str, ...] = ("ffn.down|shared.down|",)
    taxonomy: ClassVar[Taxonomy] = "addition"

    def selectors(self) -> Sequence[str]:
        return (*self.at, *self.at_input)

    def params(self, site: Site) -> Mapping[str, Param]:
        if site.among(self.at_input):
            if site.part is not None:
                raise SiteError(
                    f"ia3: what enters {site.name} also enters the other parts of {site.path}; rescale its output"
                )
            return {"l_in": Param((1, site.inputs), ones)}
        return {"l": Param((1, site.outputs), ones)}

    def before(self, w: Weights, site: Site, x: Tensor) -> Tensor:
        return x * w["l_in"] if "l_in" in w else x

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return y * w["l"] if "l" in w else y

    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if "l_in" in w:
            return weight * w["l_in"], bias  # [out, in] * [1, in]
        return weight * w["l"].mT, None if bias is None else bias * w["l"][0]
