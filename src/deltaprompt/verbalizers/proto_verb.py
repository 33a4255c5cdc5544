"""score(c) = τ cos(W h, z_c), W and z learned by contrast (ProtoVerb, Cui et al. 2022, section 3).

loss = −mean_i [mean_{j ~ i} log softmax_{j' ≠ i}(τ cos(v_i, v_j'))_j + log softmax_c(τ cos(v_i, z_c))_{c_i}], v = W h;
j ~ i are the other examples of i's class in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

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
    cosine,
    each_has_examples,
    normalised,
    pooled,
    without_prior,
)
from deltaprompt.verbalizers._contrast import contrast
from deltaprompt.verbalizers._likelihood import of_classes, scored
from deltaprompt.verbalizers._words import Wordable


@dataclass(frozen=True)
class ProtoVerb(Wordable, Verbalizer, Started, Trained):
    """Prototypes in a learned space of a few dimensions: d · k + c · k parameters; any number of examples a class.

    Args:
        dim: k, of that space.
        scale: τ, the inverse temperature of the cosines.
        words: words of each label, whose log-probabilities then count as much as the prototypes'; none for
            prototypes alone. (The paper standardises the scores of both, which of two classes leaves only a sign.)
        legacy: the loss as in their code: no temperature, an example's pair with itself counts as one of its class, and
            all is divided by the number of classes.
    """

    dim: int = 64
    scale: float = 10.0
    words: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    legacy: bool = False
    begun: ClassVar[str] = "z"

    def __post_init__(self) -> None:
        check_positive("proto_verb", scale=self.scale)
        if self.dim < 1:
            raise ConfigError(f"proto_verb: got dim={self.dim}; dim >= 1 is possible")

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {"w": Param((self.dim, s.width), kaiming), "z": Param((len(s.labels), self.dim), zeros)}

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        each_has_examples(s, classes, "a prototype")
        v = normalize(support.to(w["w"].dtype) @ w["w"].mT, dim=-1)  # [n, d] -> [n, k]
        return {"z": normalize(class_means(v, classes, len(s.labels)), dim=-1)}

    def word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return scored(w, s, at) if self.words else self._prototypes(w, at)

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        if not self.words:
            return without_prior(w, self._prototypes(w, at))
        words = of_classes(without_prior(w, scored(w, s, at)), w["member"], "arithmetic")
        return (normalised(self._prototypes(w, at)) + words) / 2

    def loss(self, w: Weights, s: Setting, at: AtMask, scores: Tensor, classes: Tensor) -> Tensor:
        v = normalize(self._embedded(w, at), dim=-1)  # [b, k]
        found = contrast(v, classes, self._scale, with_itself=self.legacy)
        found = found + cross_entropy(self._prototypes(w, at), classes)
        return found / len(s.labels) if self.legacy else found

    @property
    def _scale(self) -> float:
        return 1.0 if self.legacy else self.scale

    def _embedded(self, w: Weights, at: AtMask) -> Tensor:
        """W h: [b, d] -> [b, k]."""
        h = pooled(at).to(w["w"].dtype)
        return (w["w"] @ h[..., None]).squeeze(-1)

    def _prototypes(self, w: Weights, at: AtMask) -> Tensor:
        return self._scale * cosine(w["z"], self._embedded(w, at))
