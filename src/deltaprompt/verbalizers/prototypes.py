"""score(c) = τ · cos(h, z_c): spherical prototypes, which start as class means of states (Ding et al. 2021, eq. 4).

With descriptions, z_c starts as mean_c / |mean_c| + β / √n_c · e_c / |e_c|, e_c being the embedded description and n_c
the number of the class's examples: what a label says counts most where they are few, as their mean varies by 1 / √n_c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltaprompt.params import Param, Weights, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import (
    Described,
    Setting,
    Verbalizer,
    check_positive,
    check_weights,
    class_means,
    cosine,
    each_has_examples,
    pooled,
)


@dataclass(frozen=True)
class Prototypes(Described, Verbalizer):
    """One learnable point on the unit sphere a class: c · d parameters.

    Args:
        scale: τ, the inverse temperature of the softmax over cosines.
        descriptions: a sentence for each label, to start from together with the class means; none for means alone.
        description_weight: β; beside 16 examples a class 4 makes a description count as much as their mean.
    """

    scale: float = 10.0
    descriptions: Mapping[str, str] = field(default_factory=dict)
    description_weight: float = 4.0
    begun: ClassVar[str] = "z"

    def __post_init__(self) -> None:
        check_positive("prototypes", scale=self.scale)
        check_weights("prototypes", description_weight=self.description_weight)

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {"z": Param((len(s.labels), s.width), zeros)}

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        if len(texts) == 0:
            each_has_examples(s, classes, "a prototype", "; give descriptions")
        z = normalize(class_means(normalize(support, dim=-1), classes, len(s.labels)), dim=-1)  # [c, d]
        if len(texts) == 0:
            return {"z": z}
        count = torch.bincount(classes[classes >= 0], minlength=len(s.labels)).clamp(min=1).to(texts)  # [c]
        return {"z": z + self.description_weight * count.rsqrt()[:, None] * normalize(texts, dim=-1)}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return self.scale * cosine(w["z"], pooled(at).to(w["z"].dtype))
