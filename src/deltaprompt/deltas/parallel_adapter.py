"""y' = y + s · (W_up σ(W_down x + b_down) + b_up), W_up = 0 at the start (He et al. 2022, table 1: Scaled PA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import SIGMA, Activation, After, Delta, Padded, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, kaiming, zeros


@dataclass(frozen=True)
class ParallelAdapter(Delta, After, Padded):
    """Scaled parallel adapter: m · (in + out) + m + out parameters a site.

    It reads what enters the whole feed-forward block and adds to what leaves it. The defaults are the paper's for a
    model 1024 wide; with a prefix they are its MAM adapter. The scale is of the bias too, as in the authors' code.

    Args:
        bottleneck: m, the width of the bottleneck.
        scale: s.
        activation: σ.
        at: selectors of feed-forward blocks or linear maps.
    """

    bottleneck: int = 512
    scale: float = 4.0
    activation: Activation = "relu"
    at: tuple[str, ...] = ("ffn",)
    taxonomy: ClassVar[Taxonomy] = "addition"
    width: ClassVar[str] = "bottleneck"
    acts_on: ClassVar[tuple[str, ...]] = ("ffn", "linear")

    def __post_init__(self) -> None:
        if self.bottleneck < 1 or not self.scale > 0 or self.activation not in SIGMA:
            raise ConfigError(
                f"parallel_adapter: got bottleneck={self.bottleneck}, scale={self.scale}, "
                f"activation={self.activation!r}; possible: bottleneck >= 1, scale > 0, activation in {list(SIGMA)}"
            )

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        return {
            "down": Param((self.bottleneck, site.inputs), kaiming),
            "down_bias": Param((1, self.bottleneck), zeros),
            "up": Param((site.outputs, self.bottleneck), zeros),
            "up_bias": Param((1, site.outputs), zeros),
        }

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        inner = SIGMA[self.activation](x @ w["down"].mT + w["down_bias"])  # [b, s, in] -> [b, s, m]
        return y + self.scale * (inner @ w["up"].mT + w["up_bias"])
