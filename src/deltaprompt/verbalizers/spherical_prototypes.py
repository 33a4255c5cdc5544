"""score(c) = τ cos(h, z_c), trained by ProtoRE's losses ½ S2Z + ½ CLS + S2S (Ding et al. 2021, eq. 3 to 6).

How near a statement is to its label's prototype, d = σ(τ cos(h, z_y)), tells right labels from wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, kaiming, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import (
    Setting,
    Started,
    Trained,
    Verbalizer,
    check_positive,
    class_means,
    each_has_examples,
    pooled,
)
from deltaprompt.verbalizers._contrast import log_odds, s2s, s2z, told_apart


@dataclass(frozen=True)
class SphericalPrototypes(Verbalizer, Started, Trained):
    """Learned directions for labels that may be wrong, and a layer that tells them apart: c · (2d + 1) parameters.

    Args:
        scale: τ, the inverse temperature; the paper's is 1.
        s2z: how much the loss of statements and prototypes counts, of each with the others.
        cls: how much the loss of that layer counts.
        s2s: how much the contrast of statements counts.
        legacy: as their code: (h·z − 384) / 100 of states as they are in place of τ cos, and S2Z in one direction.
    """

    scale: float = 10.0
    s2z: float = 0.5
    cls: float = 0.5
    s2s: float = 1.0
    legacy: bool = False
    begun: ClassVar[str] = "z"

    def __post_init__(self) -> None:
        check_positive("spherical_prototypes", scale=self.scale)
        if not (0 < self.s2z < torch.inf and 0 <= self.cls < torch.inf and 0 <= self.s2s < torch.inf):
            raise ConfigError(
                f"spherical_prototypes: got s2z={self.s2z}, cls={self.cls}, s2s={self.s2s}; possible: s2z > 0, without "
                "which no prototype is near its class, and cls and s2s >= 0"
            )

    def params(self, s: Setting) -> Mapping[str, Param]:
        shape = (len(s.labels), s.width)
        return {"z": Param(shape, zeros), "weight": Param(shape, kaiming), "bias": Param(shape[:1], zeros)}

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        each_has_examples(s, classes, "a prototype")
        if self.legacy:
            return {"z": class_means(support, classes, len(s.labels))}
        return {"z": normalize(class_means(normalize(support, dim=-1), classes, len(s.labels)), dim=-1)}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return self._odds(w, pooled(at))

    def loss(self, w: Weights, s: Setting, at: AtMask, scores: Tensor, classes: Tensor) -> Tensor:
        h = pooled(at).to(w["z"].dtype)
        odds = self._odds(w, h)
        near = s2z(odds, classes, "statements", legacy=self.legacy)
        near = near if self.legacy else near + s2z(odds, classes, "prototypes")
        z = w["z"] if self.legacy else normalize(w["z"], dim=-1)
        apart = told_apart(z, w["weight"], w["bias"], classes if self.legacy else torch.arange(len(z)).to(classes))
        return self.s2z * near + self.cls * apart + self.s2s * s2s(h, classes, self.scale, legacy=self.legacy)

    def noise_score(self, w: Weights, hidden: Tensor, classes: Tensor) -> Tensor:
        """1 − d(h, z_y) [b] of states [b, d] with labels [b]: near 1 where a label is likely wrong."""
        return 1 - self._odds(w, hidden).sigmoid().gather(1, classes[:, None])[:, 0]

    def _odds(self, w: Weights, h: Tensor) -> Tensor:
        """log d / (1 − d) of states and prototypes: [b, c]."""
        return log_odds(w["z"], h.to(w["z"].dtype), self.scale, legacy=self.legacy)
