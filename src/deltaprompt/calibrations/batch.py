"""score = log p(c | x) − log mean_x' p(c | x') over a batch of texts x' (Zhou et al. 2024, eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.calibrations._base import Calibration, mean_probability, some
from deltaprompt.errors import ConfigError
from deltaprompt.types import Example


@dataclass(frozen=True)
class BatchCalibration(Calibration):
    """The mean of the class probabilities of texts like those to be labelled; give it these, where they are at hand.

    Args:
        size: texts at most.
    """

    size: int = 1000
    of_classes: ClassVar[bool] = True
    needs_texts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"batch calibration: got size={self.size}; size >= 1 is possible")

    def template(self) -> str | None:
        return None

    def inputs(self, fields: Sequence[str], texts: Sequence[Example]) -> Sequence[Example]:
        return some(texts, self.size, "batch")

    def prior(self, log_p: Tensor) -> Tensor:
        return mean_probability(log_p)
