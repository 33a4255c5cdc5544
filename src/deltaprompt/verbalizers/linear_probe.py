"""score = W h + b: logistic regression of states, solved before deltas train (LP-FT, Kumar et al. 2022) and after.

That after them is SetFit's second stage (Tunstall et al. 2022). W and b minimise

    Σ_i ω_i CE(W x_i + b, y_i) + λ / 2 ‖W‖²,   x = (h / |h| − μ) / σ,   λ = penalty / number of classes,

over the examples and, as examples of weight ω, the embedded descriptions of the labels; μ is the weighted mean of all
h / |h|, and σ² the mean squared distance to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from deltaprompt.params import Param, Weights, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import (
    Described,
    Setting,
    Verbalizer,
    check_positive,
    each_has_examples,
    linear,
    pooled,
)


@dataclass(frozen=True)
class LinearProbe(Described, Verbalizer):
    """A linear head of c · (d + 1) numbers, solved from the examples' states; deltas alone train.

    Args:
        descriptions: a sentence for each label, an example of it more; none for examples alone.
        description_weight: ω, the examples that a description counts as.
        penalty: λ times the number of classes.
    """

    descriptions: Mapping[str, str] = field(default_factory=dict)
    description_weight: float = 4.0
    penalty: float = 4.0
    begun: ClassVar[str] = "weight"
    solved: ClassVar[bool] = True
    most: ClassVar[int | None] = 10_000

    def __post_init__(self) -> None:
        check_positive("linear_probe", description_weight=self.description_weight, penalty=self.penalty)

    def params(self, s: Setting) -> Mapping[str, Param]:
        shapes = {"weight": (len(s.labels), s.width), "bias": (len(s.labels),)}
        return {name: Param(shape, zeros, trains=False) for name, shape in shapes.items()}

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        if len(texts) == 0:
            each_has_examples(s, classes, "a regression", "; give descriptions")
        known = classes >= 0
        h = torch.cat([support[known].to(texts), texts]).detach().cpu()  # [n + c or n, d]
        h, y = normalize(h.double(), dim=-1), torch.cat([classes[known].cpu(), torch.arange(len(texts))])
        weights = h.new_ones(len(h))
        weights[int(known.sum()) :] = self.description_weight
        middle = weights @ h / weights.sum()
        spread = (weights @ (h - middle).square().sum(1) / weights.sum()).sqrt().clamp(min=1e-6)
        found, bias = regression((h - middle) / spread, y, weights, len(s.labels), self.penalty / len(s.labels))
        return {"weight": found / spread, "bias": bias - found @ middle / spread}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return linear(w, normalize(pooled(at).to(w["weight"].dtype), dim=-1))


def regression(x: Tensor, y: Tensor, weights: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """W [c, d] and b [c] of the one minimum, by L-BFGS from 0, of rows x [n, d] of classes y and weights [n]."""
    with torch.inference_mode(False), torch.enable_grad():  # whatever holds where it is called
        x, y, weights = x.clone(), y.clone(), weights.clone()
        w, b = (x.new_zeros(shape, requires_grad=True) for shape in ((classes, x.shape[1]), (classes,)))
        optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = weights @ cross_entropy(x @ w.mT + b, y, reduction="none") + penalty / 2 * w.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    return w.detach(), b.detach()
