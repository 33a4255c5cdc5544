"""score(c) = max_{s of c} −τ ‖h − s‖²: the nearest stored example of a class (NNShot, Yang & Katiyar 2020, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError, check_one_of
from deltaprompt.params import Param, Weights, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import (
    Setting,
    Started,
    Verbalizer,
    check_positive,
    cosine,
    each_has_examples,
    pooled,
    squared_distance,
)


@dataclass(frozen=True)
class NNShot(Verbalizer, Started):
    """States of examples, which are kept with the adaptation: c · each · d numbers, none of which trains unless asked.

    Args:
        each: states that a class has at most; of more examples those that are evenly spaced in their order.
        metric: "euclidean", the squared distance; or "cosine".
        scale: τ, the inverse temperature.
        trains: whether the stored states train.
    """

    each: int = 16
    metric: Literal["euclidean", "cosine"] = "euclidean"
    scale: float = 1.0
    trains: bool = False
    begun: ClassVar[str] = "has"

    def __post_init__(self) -> None:
        check_one_of("metric", self.metric, ("euclidean", "cosine"))
        check_positive("nn_shot", scale=self.scale)
        if self.each < 1:
            raise ConfigError(f"nn_shot: got each={self.each}; each >= 1 is possible")

    def params(self, s: Setting) -> Mapping[str, Param]:
        room = (len(s.labels), self.each)
        return {"s": Param((*room, s.width), zeros, trains=self.trains), "has": Param(room, zeros, trains=False)}

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        each_has_examples(s, classes, "a search for the nearest")
        known = (classes >= 0).nonzero()[:, 0]
        rows = known[classes[known].argsort(stable=True)]  # class by class
        counts = torch.bincount(classes[known], minlength=len(s.labels))[:, None]  # [c, 1]
        at = torch.arange(self.each, device=support.device) * counts.clamp(min=self.each) // self.each  # [c, each]
        has = at < counts
        chosen = rows[(at + counts.cumsum(0) - counts).clamp(max=len(rows) - 1)]
        return {"s": support[chosen] * has[..., None], "has": has.to(support.dtype)}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        h, stored = pooled(at).to(w["s"].dtype), w["s"].flatten(-3, -2)  # [c * each, d], or one set a row
        near = cosine(stored, h) if self.metric == "cosine" else -squared_distance(stored, h)
        near = near.unflatten(-1, (-1, self.each)).masked_fill(w["has"] == 0, -torch.inf)  # [b, c, each]
        return self.scale * near.amax(-1)
