"""y' = y + b ⊙ B (d ⊙ A x), A and B random, frozen and shared; b = 0 at the start (Kopiczko et al. 2024, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import QUERIES, VALUES, After, Delta, Fixed, Mergeable, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, constant, zeros


@dataclass(frozen=True)
class VeRA(Delta, After, Mergeable, Fixed):
    """Vector-based random matrix adaptation: r + out parameters a linear map.

    One A [r, in] and one B [out, r] are drawn for the widest of the sites; the others use their first columns and rows.

    Args:
        rank: r, the rank of the change of the weight.
        d_initial: what d starts as.
        dropout: of x on its way into A, while training.
        projection_seed: of A and B; a task's adaptations differ in b and d only.
        at: selectors of linear maps.
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_seed: int = 0
    at: tuple[str, ...] = (QUERIES, VALUES)
    taxonomy: ClassVar[Taxonomy] = "reparametrisation"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.d_initial == 0.0 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"vera: got rank={self.rank}, d_initial={self.d_initial}, dropout={self.dropout}; rank >= 1, "
                "d_initial other than 0 (nothing could learn) and 0 <= dropout < 1 are possible"
            )

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"d": Param((1, self.rank), constant(self.d_initial)), "b": Param((1, site.outputs), zeros)}

    def fixed(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        """Uniform numbers of variance 2 / in for A and 2 / r for B (He et al. 2015)."""
        chance = torch.Generator().manual_seed(self.projection_seed)
        widest = {"A": (self.rank, max(s.inputs for s in sites)), "B": (max(s.outputs for s in sites), self.rank)}
        bounds = {name: (6 / shape[1]) ** 0.5 for name, shape in widest.items()}
        return {n: torch.empty(s).uniform_(-bounds[n], bounds[n], generator=chance) for n, s in widest.items()}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        a, b = w["A"][:, : site.inputs], w["B"][: site.outputs]
        inner = w.dropped(x, self.dropout) @ a.mT * w["d"]  # [b, s, in] -> [b, s, r]
        return y + inner @ b.mT * w["b"]

    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = w["A"][:, : site.inputs], w["B"][: site.outputs]
        return weight + (w["b"].mT * b) @ (w["d"].mT * a), bias
