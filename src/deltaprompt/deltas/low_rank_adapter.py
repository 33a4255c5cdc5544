"""y' = y + U_l U_r σ(D_l D_r y + b_down) + b_up, U_l = 0 at the start (Karimi Mahabadi et al. 2021, a baseline)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import FED, MIXED, SIGMA, Activation, After, Delta, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, kaiming, zeros


@dataclass(frozen=True)
class LowRankAdapter(Delta, After):
    """Low-rank adapter: 2 · k · (d + m) + d + m parameters a site, m = d / reduction_factor rounded down, 1 at least.

    Only the last of the four factors is zero at the start: were U_r zero too, neither would ever have a gradient.

    Args:
        reduction_factor: what the width d is divided by to give the bottleneck m.
        rank: k, the rank of the map down and of the map up.
        activation: σ.
        at: selectors of linear maps and feed-forward blocks.
    """

    reduction_factor: int = 32
    rank: int = 1
    activation: Activation = "gelu"
    at: tuple[str, ...] = (MIXED, FED)
    taxonomy: ClassVar[Taxonomy] = "addition"
    acts_on: ClassVar[tuple[str, ...]] = ("linear", "ffn")

    def __post_init__(self) -> None:
        if self.reduction_factor < 1 or self.rank < 1 or self.activation not in SIGMA:
            raise ConfigError(
                f"low_rank_adapter: got reduction_factor={self.reduction_factor}, rank={self.rank}, "
                f"activation={self.activation!r}; possible: reduction_factor >= 1, rank >= 1, "
                f"activation in {list(SIGMA)}"
            )

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        d, k = site.outputs, self.rank
        m = max(1, d // self.reduction_factor)
        return {
            "down_left": Param((m, k), kaiming),
            "down_right": Param((k, d), kaiming),
            "down_bias": Param((1, m), zeros),
            "up_left": Param((d, k), zeros),
            "up_right": Param((k, m), kaiming),
            "up_bias": Param((1, d), zeros),
        }

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        down = y @ w["down_right"].mT @ w["down_left"].mT  # [b, s, d] -> [b, s, k] -> [b, s, m]
        inner = SIGMA[self.activation](down + w["down_bias"])
        return y + inner @ w["up_right"].mT @ w["up_left"].mT + w["up_bias"]
