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
from deltaprompt.verbalizers._base import Answers, Setting, Started, Verbalizer, Worded, normalised, without_prior
from deltaprompt.verbalizers._relevance import relevant
from deltaprompt.verbalizers._words import Mean, lengths_of, of_classes, one_mask, scored, table, vocabulary, word_ids


@dataclass(frozen=True)
class Knowledgeable(Verbalizer, Answers, Worded, Started):
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
    begun: ClassVar[str] = ""
    labelled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.longest < 1 or not 0 <= self.frequency < 1:
            raise ConfigError(
                f"knowledgeable: got longest={self.longest}, frequency={self.frequency}; longest >= 1 and "
                "0 <= frequency < 1 are possible"
            )

    def _ids(self, s: Setting) -> list[tuple[int, list[int]]]:
        return word_ids(self.words, s, self.longest)

    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        one_mask(s)
        return lengths_of(self._ids(s))

    def units(self, s: Setting) -> int:
        return len(self._ids(s))

    def params(self, s: Setting) -> Mapping[str, Param]:
        words = self.units(s)
        return {"alpha": Param((words,), zeros), "kept": Param((words,), ones, trains=False)}

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        return table(self._ids(s), len(s.labels))

    def observed(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return torch.cat([normalised(scored(w, s, at)), vocabulary(at)], -1)

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        if len(support) < 2:
            return {}
        known = {n: t.to(support.device) for n, t in self.constants(s).items()}
        member, (words, every) = known["member"], support.tensor_split([len(known["ids"])], dim=1)
        every = every.mean(0)  # [V]
        name = member.int().argmax(-1)  # [c], the first word of each class
        rank = every.argsort().argsort().float()  # 0 for the least likely token
        inside = torch.arange(known["ids"].shape[1], device=every.device) < known["lengths"][:, None]  # [u, t]
        lowest = rank[known["ids"]].masked_fill(~inside, torch.inf).amin(-1)
        kept = lowest >= self.frequency * len(every)
        kept[name] = True
        if self.relevance:
            kept &= relevant(words, member, name, kept, self.legacy)
            kept[name] = True
        return {"kept": kept.float()}

    def word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return scored(w, s, at)

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        weights = w["alpha"].masked_fill(w["kept"] == 0, -torch.inf)
        return of_classes(without_prior(w, scored(w, s, at)), w["member"], self.mean, weights)
