"""score = log p(answer | text) − log p(answer | domain): domain conditional PMI (Holtzman et al. 2021, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.calibrations._base import Calibration
from deltaprompt.errors import ConfigError
from deltaprompt.templates import parse
from deltaprompt.types import Example


@dataclass(frozen=True)
class DomainPMI(Calibration):
    """What the model answers where there is no text but what announces the answer.

    Args:
        domain: a template without fields, such as "The topic is {mask}.".
    """

    domain: str
    of_classes: ClassVar[bool] = False
    needs_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if found := parse(self.domain).fields:
            raise ConfigError(
                f"the domain of domain_pmi is a template without fields, got {', '.join(found)} in {self.domain!r}; "
                "write what announces the answer, such as 'The topic is {mask}.'"
            )

    def template(self) -> str | None:
        return self.domain

    def inputs(self, fields: Sequence[str], texts: Sequence[Example]) -> Sequence[Example]:
        return [Example({})]

    def prior(self, log_p: Tensor) -> Tensor:
        return log_p[0]
