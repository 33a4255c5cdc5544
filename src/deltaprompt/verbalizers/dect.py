"""score(c) = −‖x̂ − z_c‖ + λ s_c + r_c, x̂ = W h / ‖W h‖: spheres around prototypes, and words (DecT, Cui et al. 2023).

s_c is the label words' log-probability; r_c, the radius of a class's sphere, starts as its examples' mean distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, normal, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import (
    Setting,
    Started,
    Verbalizer,
    check_weights,
    class_means,
    each_has_examples,
    pooled,
    without_prior,
)
from deltaprompt.verbalizers._likelihood import of_classes, scored
from deltaprompt.verbalizers._words import Wordable

SMOOTH = 1e-12  # keeps a distance's gradient finite where an example lies on its prototype, as that of one shot does


@dataclass(frozen=True)
class DecT(Wordable, Verbalizer, Started):
    """Decoder tuning on a frozen model: d · k + c · (k + 1) parameters.

    Calibrate it, as the paper does its word scores; train it without a delta and the backbone runs once a text.

    Args:
        words: words of each label; none for the spheres alone.
        dim: k, of the space of the spheres.
        word_weight: λ.
        legacy: as their code: prototypes stay where chance has put them, and only W and r train.
    """

    words: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    dim: int = 128
    word_weight: float = 1.0
    legacy: bool = False
    begun: ClassVar[str] = "r"

    def __post_init__(self) -> None:
        check_weights("dect", word_weight=self.word_weight)
        if self.dim < 1:
            raise ConfigError(f"dect: got dim={self.dim}; dim >= 1 is possible")

    def params(self, s: Setting) -> Mapping[str, Param]:
        classes = len(s.labels)
        z = Param((classes, self.dim), normal((2 / (classes + self.dim)) ** 0.5), trains=not self.legacy)  # Xavier
        return {"w": Param((self.dim, s.width), normal(s.width**-0.5)), "z": z, "r": Param((classes,), zeros)}

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        each_has_examples(s, classes, "a sphere")
        x = normalize(support.to(w["w"].dtype) @ w["w"].mT, dim=-1)  # [n, k]
        z = w["z"] if self.legacy else class_means(x, classes, len(s.labels))
        distance = (x - z[classes]).norm(dim=-1, keepdim=True)  # [n, 1]
        least = torch.finfo(x.dtype).tiny  # one example a class lies on its prototype
        return {"z": z, "r": class_means(distance, classes, len(s.labels))[:, 0].clamp(min=least)}

    def word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return scored(w, s, at) if self.words else self._spheres(w, at)

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        if not self.words:
            return without_prior(w, self._spheres(w, at))
        words = of_classes(without_prior(w, scored(w, s, at)), w["member"], "arithmetic")
        return self._spheres(w, at) + self.word_weight * words

    def _spheres(self, w: Weights, at: AtMask) -> Tensor:
        """r − ‖x̂ − z‖: [b, c]."""
        h = pooled(at).to(w["w"].dtype)
        x = normalize((w["w"] @ h[..., None]).squeeze(-1), dim=-1)  # [b, k]
        return w["r"] - ((x[:, None] - w["z"]).square().sum(-1) + SMOOTH).sqrt()
