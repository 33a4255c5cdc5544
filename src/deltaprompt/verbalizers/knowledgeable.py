"""score(c) = log Σ_{v ∈ V_c} α_v p(v | prompt): many words a class, refined (KPT, Hu et al. 2022, section 3).

What is seen of a support, without its labels, refines the words: frequency drops those that the model hardly ever says,
relevance those that go with another class as much as with their own; α, learned, starts alike for those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, ones, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Setting, Started, Verbalizer, normalised, without_prior
from deltaprompt.verbalizers._likelihood import Mean, check_mean, of_classes, scored, vocabulary
from deltaprompt.verbalizers._relevance import frequent, relevant
from deltaprompt.verbalizers._words import OfWords, tuple_of, word_ids


@dataclass(frozen=True)
class Knowledgeable(OfWords, Verbalizer, Started):
    """Words from a knowledge base, the class's name the first; one learned weight a word.

    Calibrate it with `contextualised`, as the paper does; the refinement itself looks at uncalibrated scores.

    Args:
        words: of each label, the first being its name.
        longest: tokens of a word at most; longer ones are left out. Each length costs a masked model one more pass.
        frequency: words with a token in this share of the vocabulary, the least likely on average, are dropped.
        relevance: whether words that go with other classes are dropped.
        mean: of a class's words: of their probabilities (the paper's for no examples), or of their logarithms (its
            for few).
        legacy: relevance as their released code decides it.
    """

    words: Mapping[str, str | tuple[str, ...]]
    longest: int = 1
    frequency: float = 0.5
    relevance: bool = True
    mean: Mean = "arithmetic"
    legacy: bool = False
    begun: ClassVar[str] = "kept"
    labelled: ClassVar[bool] = False
    most: ClassVar[int] = 200  # the paper's number

    def __post_init__(self) -> None:
        check_mean(self.mean)
        if self.longest < 1 or not 0 <= self.frequency < 1:
            raise ConfigError(
                f"knowledgeable: got longest={self.longest}, frequency={self.frequency}; longest >= 1 and "
                "0 <= frequency < 1 are possible"
            )

    def ids(self, s: Setting) -> list[tuple[int, list[int]]]:
        found = word_ids(self.words, s, self.longest)
        for c, label in enumerate(s.labels):
            name = s.answer_ids(tuple_of(self.words[label])[0])
            if (c, name) not in found:
                raise ConfigError(
                    f"the name of {label!r}, its first word, has {len(name)} tokens; raise longest, or put a shorter "
                    "word first"
                )
        return found

    def params(self, s: Setting) -> Mapping[str, Param]:
        words, kept = self.units(s), zeros if self.frequency or self.relevance else ones
        return {"alpha": Param((words,), zeros), "kept": Param((words,), kept, trains=False)}

    def observed(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        words = scored(w, s, at)
        return torch.cat([words if self.legacy else normalised(words), vocabulary(at)], -1)

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        if not self.frequency and not self.relevance:
            return {}
        if len(support) < 2:
            raise ConfigError(
                f"words are refined by what a model says to texts, and got {len(support)}; give more, labelled or not, "
                "or frequency=0 and relevance=False"
            )
        known = {n: t.to(support.device) for n, t in self.constants(s).items()}
        member, (words, every) = known["member"], support.tensor_split([len(known["ids"])], dim=1)
        name = member.int().argmax(-1)  # [c], the first word of each class
        kept = frequent(every.mean(0), known["ids"], known["lengths"], self.frequency)
        kept[name] = True
        if self.relevance:
            kept &= relevant(words, member, name, kept, self.legacy)
            kept[name] = True
        return {"kept": kept.float()}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        weights = w["alpha"].masked_fill(w["kept"] == 0, -torch.inf)
        return of_classes(without_prior(w, scored(w, s, at)), w["member"], self.mean, weights)
