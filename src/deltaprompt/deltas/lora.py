"""y' = y + s · B A x, s = α/r, B = 0 at the start (Hu et al. 2022, eq. 3); s = α/√r (Kalajdzievski 2023, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import QUERIES, VALUES, After, Delta, Mergeable, Padded, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, kaiming, plus, through, zeros


@dataclass(frozen=True)
class LoRA(Delta, After, Mergeable, Padded):
    """Low-rank adaptation: r · (in + out) parameters a linear map.

    Args:
        rank: r, the rank of the change of the weight.
        alpha: α; the change is scaled by α / r.
        dropout: of x on its way into A, while training.
        rank_stabilised: whether the change is scaled by α / √r, so that it does not vanish at high ranks.
        at: selectors of linear maps.
        freeze_a: whether A stays as it is drawn, so that r · out parameters train and of x only A x is kept for the
            backward pass (LoRA-FA: Zhang et al. 2023, section 3).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    at: tuple[str, ...] = (QUERIES, VALUES)
    freeze_a: bool = False
    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    width: ClassVar[str] = "rank"
    free: ClassVar[tuple[str, ...]] = ("alpha", "dropout", "rank_stabilised", "freeze_a")

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"lora: got rank={self.rank}, dropout={self.dropout}; rank >= 1 and 0 <= dropout < 1 are possible"
            )

    @property
    def scale(self) -> float:
        """s, the factor on B A."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        a = Param((self.rank, site.inputs), kaiming, trains=not self.freeze_a)
        return {"a": a, "b": Param((site.outputs, self.rank), zeros)}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        x = w.dropped(x, self.dropout)
        return plus(y, through(x, w["a"]), w["b"].mT, self.scale)  # [b, s, in] -> [b, s, r] -> [b, s, out]

    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (w["b"] @ w["a"]), bias

    def as_wide(self, wide: Self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**tensors, "b": tensors["b"] * (self.scale / wide.scale)}
