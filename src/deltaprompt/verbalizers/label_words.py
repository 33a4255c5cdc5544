"""score(c) = log mean_{w ∈ words(c)} p(w | prompt): the model's own scores of words (PET, Schick & Schütze 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deltaprompt.params import Param, Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Answers, Setting, Verbalizer, Worded, without_prior
from deltaprompt.verbalizers._words import Mean, apart, lengths_of, of_classes, one_mask, scored, table, word_ids


@dataclass(frozen=True)
class LabelWords(Verbalizer, Answers, Worded):
    """Words that stand for classes; nothing is trained.

    Args:
        words: the words of each label; one, or several that count alike.
        mean: of several words: of their probabilities, or of their logarithms (as OpenPrompt takes it).
    """

    words: Mapping[str, str | tuple[str, ...]]
    mean: Mean = "arithmetic"

    def _ids(self, s: Setting) -> list[tuple[int, list[int]]]:
        """(class, token ids) of every word."""
        words = word_ids(self.words, s)
        apart(s.labels, words)
        return words

    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        one_mask(s)
        return lengths_of(self._ids(s))

    def units(self, s: Setting) -> int:
        return len(self._ids(s))

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {}

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        return table(self._ids(s), len(s.labels))

    def word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return scored(w, s, at)

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return of_classes(without_prior(w, scored(w, s, at)), w["member"], self.mean)
