"""W' = m ⊙ (W + s B A) / ‖W + s B A‖, B = 0 and m = ‖W‖ at the start, norms by row (Liu et al. 2024, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import QUERIES, VALUES, After, Delta, Mergeable, Started, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, kaiming, zeros


@dataclass(frozen=True)
class DoRA(Delta, After, Mergeable, Started):
    """Weight-decomposed low-rank adaptation: r · (in + out) + out parameters a linear map.

    W' is never formed: with g = m / ‖W + s B A‖, y' = y + (g − 1)(y − bias) + g s B A x. To the gradient the norm is a
    constant (section 4.3). Dropout acts on the x of B A x alone; peft's also acts on the x of W x.

    Args:
        rank: r, the rank of the change of the weight's direction.
        alpha: α; s = α / r.
        dropout: of x on its way into A, while training.
        rank_stabilised: whether s = α / √r, so that the change does not vanish at high ranks.
        at: selectors of linear maps.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    at: tuple[str, ...] = (QUERIES, VALUES)
    taxonomy: ClassVar[Taxonomy] = "reparametrisation"

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"dora: got rank={self.rank}, dropout={self.dropout}; rank >= 1 and 0 <= dropout < 1 are possible"
            )

    @property
    def scale(self) -> float:
        """s, the factor on B A."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        return {
            "a": Param((self.rank, site.inputs), kaiming),
            "b": Param((site.outputs, self.rank), zeros),
            "magnitude": Param((1, site.outputs), zeros),
        }

    def start(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        return {"magnitude": self._norm(w)}

    @torch.no_grad()
    def _norm(self, w: Weights) -> Tensor:
        """‖W + s B A‖ of every row, [1, out]: ‖W‖² + 2 s Σ (W Aᵀ) ⊙ B + s² Σ (B A Aᵀ) ⊙ B is its square."""
        a, b, (weight, _) = w["a"], w["b"], w.frozen()
        cross = ((weight @ a.mT) * b).sum(-1)  # [out, r] -> [out]
        change = ((b @ (a @ a.mT)) * b).sum(-1)
        square = weight.square().sum(-1) + 2 * self.scale * cross + self.scale**2 * change
        return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()[..., None, :]  # a row of zeros stays one

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        gain, (_, bias) = w["magnitude"] / self._norm(w), w.frozen()
        low = self.scale * (w.dropped(x, self.dropout) @ w["a"].mT @ w["b"].mT)  # [b, s, out]
        return y + (gain - 1) * (y if bias is None else y - bias) + gain * low

    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain, (_, own) = w["magnitude"] / self._norm(w), w.frozen()
        new = gain.mT * (weight + self.scale * (w["b"] @ w["a"]))
        return new, bias if bias is None or own is None else own + gain[0] * (bias - own)  # bias may be a delta's too
