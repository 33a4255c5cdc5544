"""score = W h + b: one learned row a class in place of a word's row (WARP, Hambardzumyan et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deltaprompt.params import Param, Weights, normal, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Setting, Verbalizer, pooled


@dataclass(frozen=True)
class SoftVerbalizer(Verbalizer):
    """A learned linear head on the state where the answer is read: c · (d + 1) parameters.

    Args:
        init_std: of the normal numbers that W starts from; 0.02 is what transformers' heads start from.
    """

    init_std: float = 0.02

    def params(self, s: Setting) -> Mapping[str, Param]:
        classes = len(s.labels)
        return {"weight": Param((classes, s.width), normal(self.init_std)), "bias": Param((classes,), zeros)}

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        return {}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        h = pooled(at).to(w["weight"].dtype)
        return (w["weight"] @ h[..., None]).squeeze(-1) + w["bias"]  # [c, d] @ [b, d, 1] -> [b, c]
