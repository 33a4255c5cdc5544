"""x' = x + n at the position embedding: the text's positions begin at n, as they do behind a prefix in a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import Before, Delta, Shared, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights


@dataclass(frozen=True)
class PositionShift(Delta, Before, Shared):
    """No parameters: what makes a `Prefix` PEFT's where positions are learned (BERT, GPT-2), beside it.

    The text may then be as many tokens shorter as it is shifted by.

    Args:
        by: n, the length of the prefix.
        at: selector of the position embedding.
    """

    by: int = 10
    at: tuple[str, ...] = ("embed.position",)
    taxonomy: ClassVar[Taxonomy] = "addition"
    acts_on: ClassVar[tuple[str, ...]] = ("embed",)
    identity_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.by < 1:
            raise ConfigError(f"position_shift: got by={self.by}; by >= 1 is possible")

    def selectors(self) -> Sequence[str]:
        """The position embedding."""
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        """None."""
        return {}

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Param]:
        """None either: it has nothing to train."""
        return {}

    def before(self, w: Weights, site: Site, x: Tensor) -> Tensor:
        """The positions, further on."""
        return x + self.by
