"""score = W h + b: one learned row a class in place of a word's row (WARP, Hambardzumyan et al. 2021).

With words, score = mean_{w ∈ words(c)} logit(w) + W h + b and W starts at 0: the class begins as its words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from deltaprompt.params import Param, Weights, normal, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Setting, Verbalizer, check_weights, linear, pooled, without_prior
from deltaprompt.verbalizers._likelihood import of_classes, scored
from deltaprompt.verbalizers._words import Wordable


@dataclass(frozen=True)
class SoftVerbalizer(Wordable, Verbalizer):
    """A learned linear head on the state where the answer is read: c · (d + 1) parameters.

    Args:
        init_std: of the normal numbers that W starts from; 0.02 is what transformers' heads start from.
        words: the words that each label begins as; none for a head that begins from nothing.
    """

    init_std: float = 0.02
    words: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_weights("soft", init_std=self.init_std)

    def params(self, s: Setting) -> Mapping[str, Param]:
        classes, init = len(s.labels), zeros if self.words else normal(self.init_std)
        return {"weight": Param((classes, s.width), init), "bias": Param((classes,), zeros)}

    def word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return scored(w, s, at) if self.words else self._linear(w, at)

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        words = without_prior(w, self.word_scores(w, s, at))
        return of_classes(words, w["member"], "geometric") + self._linear(w, at) if self.words else words

    def _linear(self, w: Weights, at: AtMask) -> Tensor:
        return linear(w, pooled(at).to(w["weight"].dtype))
