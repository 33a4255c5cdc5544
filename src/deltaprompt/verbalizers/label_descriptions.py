"""score(c) = τ · cos(h, e_c), e_c the embedded description of class c: answers before training (Yin et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.params import Param, Weights, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Described, Setting, Verbalizer, check_positive, cosine, of_each, pooled


@dataclass(frozen=True)
class LabelDescriptions(Described, Verbalizer):
    """A plain sentence for each class, embedded by the backbone; the embeddings then train: c · d parameters.

    Args:
        descriptions: a sentence for each label, as one would tell a colleague what belongs there.
        scale: τ, the inverse temperature of the softmax over cosines.
    """

    descriptions: Mapping[str, str]
    scale: float = 20.0
    begun: ClassVar[str] = "z"
    labelled: ClassVar[bool] = False
    most: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_positive("label_descriptions", scale=self.scale)

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {"z": Param((len(s.labels), s.width), zeros)}

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        of_each(self.descriptions, s.labels, "description")  # also where there is none at all
        return {}

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        return {"z": texts}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return self.scale * cosine(w["z"], pooled(at).to(w["z"].dtype))
