"""log p̂ = log mean_t p(answer | t) over content-free texts t (Zhao et al. 2021): these then say nothing, uniformly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.calibrations._base import Calibration, filled, mean_probability
from deltaprompt.errors import ConfigError
from deltaprompt.types import Example


@dataclass(frozen=True)
class Contextual(Calibration):
    """What the model answers to a text without content, in every field of the template; needs no data.

    Args:
        texts: content-free ones. With one, its answer becomes exactly uniform; with several, that of their mean does;
            on the model as it was when this was measured, which `fit` does before it trains.
    """

    texts: tuple[str, ...] = ("N/A",)
    of_classes: ClassVar[bool] = False
    needs_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given: object = self.texts
        if not given or isinstance(given, str):
            raise ConfigError(f'contextual calibration needs content-free texts, such as ("N/A",); got {given!r}')

    def template(self) -> str | None:
        return None

    def inputs(self, fields: Sequence[str], texts: Sequence[Example]) -> Sequence[Example]:
        return [filled(fields, text) for text in self.texts]

    def prior(self, log_p: Tensor) -> Tensor:
        return mean_probability(log_p)
