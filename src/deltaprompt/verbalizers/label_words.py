"""score(c) = log mean_{w ∈ words(c)} p(w | prompt): the model's own scores of words (PET, Schick & Schütze 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deltaprompt.params import Param, Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Setting, Verbalizer, without_prior
from deltaprompt.verbalizers._likelihood import Mean, check_mean, of_classes, scored
from deltaprompt.verbalizers._words import OfWords, apart, word_ids


@dataclass(frozen=True)
class LabelWords(OfWords, Verbalizer):
    """Words that stand for classes; nothing is trained.

    Args:
        words: the words of each label; one, or several that count alike.
        mean: of several words: of their probabilities, or of their logarithms (as OpenPrompt takes it).
    """

    words: Mapping[str, str | tuple[str, ...]]
    mean: Mean = "arithmetic"

    def __post_init__(self) -> None:
        check_mean(self.mean)

    def ids(self, s: Setting) -> list[tuple[int, list[int]]]:
        """(class, token ids) of every word."""
        words = word_ids(self.words, s)
        apart(s.labels, words)
        return words

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return of_classes(without_prior(w, scored(w, s, at)), w["member"], self.mean)
