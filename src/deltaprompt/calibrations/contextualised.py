"""p̂ = softmax(mean_x log p(answer | x)) over texts x of the task (Hu et al. 2022, section 3.2.1, as in their code)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.calibrations._base import Calibration, mean_probability, some
from deltaprompt.errors import ConfigError
from deltaprompt.types import Example
from deltaprompt.verbalizers._base import normalised


@dataclass(frozen=True)
class Contextualised(Calibration):
    """What the model answers on average to texts of the task, whose labels it does not see.

    Args:
        size: texts at most.
        mean: "logits": of the scores, as OpenPrompt and KPT's code take it; "probability": of the probabilities, as
            KPT's equation 1 reads.
    """

    size: int = 200
    mean: str = "logits"
    of_classes: ClassVar[bool] = False
    needs_texts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.mean not in ("logits", "probability"):
            raise ConfigError(
                f"contextualised calibration: got size={self.size}, mean={self.mean!r}; possible: size >= 1, mean "
                "logits or probability"
            )

    def template(self) -> str | None:
        return None

    def inputs(self, fields: Sequence[str], texts: Sequence[Example]) -> Sequence[Example]:
        return some(texts, self.size, "contextualised")

    def prior(self, log_p: Tensor) -> Tensor:
        return normalised(log_p.mean(0)) if self.mean == "logits" else mean_probability(log_p)
