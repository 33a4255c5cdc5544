"""score(c) = −τ ‖h − z_c‖², z_c the mean of the class's states: prototypical networks (Snell et al. 2017, eq. 2).

As a dot product τ h·z_c, which Few-NERD's code offers beside it (Ding et al. 2021), long prototypes are nearer to all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import normalize

from deltaprompt.errors import check_one_of
from deltaprompt.params import Param, Weights, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import (
    Setting,
    Started,
    Verbalizer,
    check_positive,
    class_means,
    each_has_examples,
    pooled,
    squared_distance,
)


@dataclass(frozen=True)
class ProtoNet(Verbalizer, Started):
    """One learnable point a class, anywhere in the space of states: c · d parameters; `prototypes` are on its sphere.

    Args:
        metric: "euclidean", the squared distance; or "dot", the product.
        unit: whether states are taken to the unit sphere first; their means are not, and are within it.
        scale: τ, the inverse temperature; on the unit sphere distances are short, and 20 is a start.
    """

    metric: Literal["euclidean", "dot"] = "euclidean"
    unit: bool = False
    scale: float = 1.0
    begun: ClassVar[str] = "z"

    def __post_init__(self) -> None:
        check_one_of("metric", self.metric, ("euclidean", "dot"))
        check_positive("proto_net", scale=self.scale)

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {"z": Param((len(s.labels), s.width), zeros)}

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        each_has_examples(s, classes, "a prototype")
        return {"z": class_means(self._placed(support), classes, len(s.labels))}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        h = self._placed(pooled(at).to(w["z"].dtype))
        near = (w["z"] @ h[..., None]).squeeze(-1) if self.metric == "dot" else -squared_distance(w["z"], h)
        return self.scale * near

    def _placed(self, h: Tensor) -> Tensor:
        return normalize(h, dim=-1) if self.unit else h
