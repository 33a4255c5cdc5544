"""y' = y + W_up σ(W_down y + b_down) + b_up, W_up = 0 at the start (Houlsby et al. 2019, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import FED, MIXED, SIGMA, Activation, After, Delta, Padded, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, kaiming, zeros

PLACES = {"houlsby": (MIXED, FED), "pfeiffer": (FED,)}


@dataclass(frozen=True)
class Adapter(Delta, After, Padded):
    """Bottleneck adapter: 2 · d · m + d + m parameters a site, before the residual connection.

    Args:
        bottleneck: m, the width of the bottleneck.
        activation: σ.
        placement: "houlsby" after the attention and the feed-forward part (Houlsby et al. 2019), "pfeiffer" after the
            feed-forward part only (Pfeiffer et al. 2021).
        at: selectors of linear maps and feed-forward blocks; instead of a placement.
    """

    bottleneck: int = 24
    activation: Activation = "gelu"
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    at: tuple[str, ...] = ()
    taxonomy: ClassVar[Taxonomy] = "addition"
    width: ClassVar[str] = "bottleneck"
    acts_on: ClassVar[tuple[str, ...]] = ("linear", "ffn")

    def __post_init__(self) -> None:
        if self.bottleneck < 1 or self.activation not in SIGMA or self.placement not in PLACES:
            raise ConfigError(
                f"adapter: got bottleneck={self.bottleneck}, activation={self.activation!r}, "
                f"placement={self.placement!r}; possible: bottleneck >= 1, activation in {list(SIGMA)}, "
                f"placement in {list(PLACES)}"
            )

    def selectors(self) -> Sequence[str]:
        return self.at or PLACES[self.placement]

    def params(self, site: Site) -> Mapping[str, Param]:
        d, m = site.outputs, self.bottleneck
        return {
            "down": Param((m, d), kaiming),
            "down_bias": Param((1, m), zeros),
            "up": Param((d, m), zeros),
            "up_bias": Param((1, d), zeros),
        }

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        inner = SIGMA[self.activation](y @ w["down"].mT + w["down_bias"])  # [b, s, d] -> [b, s, m]
        return y + inner @ w["up"].mT + w["up_bias"]
