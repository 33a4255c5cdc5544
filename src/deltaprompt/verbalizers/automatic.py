"""Label words found from labelled examples: those with the largest likelihood ratio (PETAL, Schick et al. 2020, eq. 4).

s(w, c) = Σ_{x of c} log p(w | x)/(1 − p(w | x)) / n_c − Σ_{x not of c} the same / (n − n_c), classes thus balanced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError, check_one_of
from deltaprompt.params import Param, Weights, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import (
    Setting,
    Started,
    Verbalizer,
    Worded,
    class_means,
    each_has_examples,
    without_prior,
)
from deltaprompt.verbalizers._likelihood import Mean, check_mean, of_classes, vocabulary
from deltaprompt.verbalizers._words import best_apart, one_mask

LEAST = 1e-30  # of 1 − p, where one word has all of it


@dataclass(frozen=True)
class Automatic(Verbalizer, Worded, Started):
    """The words of each class are chosen from the vocabulary's whole words; nothing else is trained.

    Args:
        size: words a class; no word is of two classes.
        candidates: words that are looked at: the likeliest on average over the examples.
        score: "ratio" of likelihoods, one class against the others; or "likelihood": the mean log p of the class's own.
        mean: of several words: of their probabilities, or of their logarithms.
    """

    size: int = 3
    candidates: int = 1000
    score: str = "ratio"
    mean: Mean = "arithmetic"
    begun: ClassVar[str] = "ids"
    most: ClassVar[int] = 2000  # of each it is given a row as wide as the vocabulary

    def __post_init__(self) -> None:
        check_mean(self.mean)
        check_one_of("score", self.score, ("ratio", "likelihood"))
        if self.size < 1 or self.candidates < 1:
            raise ConfigError(f"automatic: got size={self.size}, candidates={self.candidates}; both >= 1 are possible")

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {"ids": Param((len(s.labels), self.size), zeros, trains=False)}  # float32 holds every id below 2^24

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        one_mask(s, "words that are chosen answer")
        if s.kind == "encoder":
            raise ConfigError("label words need a language model; for a plain encoder use prototypes")
        classes = len(s.labels)
        return {"member": torch.eye(classes, dtype=torch.bool).repeat_interleave(self.size, 1)}  # [c, c * size]

    def units(self, s: Setting) -> int:
        return self.size * len(s.labels)

    def observed(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return vocabulary(at)

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        each_has_examples(s, classes, "the choice of words")
        whole = torch.tensor(s.whole_words(), device=support.device)
        whole = whole[support[:, whole].mean(0).argsort(descending=True)[: self.candidates]]
        if len(whole) < self.size * len(s.labels):
            raise ConfigError(
                f"{len(whole)} candidates are too few for {len(s.labels)} classes of {self.size} words each; look at "
                "more candidates, or choose fewer words"
            )
        each = self._each(support[:, whole].double(), classes, len(s.labels))  # [c, words]
        return {"ids": whole[best_apart(each, self.size)].float()}

    def _each(self, log_p: Tensor, classes: Tensor, count: int) -> Tensor:
        """s(w, c) of words [n, w] -> [c, w]."""
        if self.score == "likelihood":
            return class_means(log_p, classes, count)
        odds = log_p - (-log_p.exp()).log1p().clamp(min=torch.tensor(LEAST).log().item())
        own = class_means(odds, classes, count)
        counts = torch.bincount(classes, minlength=count)[:, None]
        others = (own * counts).sum(0) - own * counts
        return own - others / (counts.sum() - counts)

    def word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        every, ids = vocabulary(at), w["ids"].long().flatten(-2)  # [c * size], or one set a row
        return every[:, ids] if ids.ndim == 1 else every.gather(-1, ids)

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return of_classes(without_prior(w, self.word_scores(w, s, at)), w["member"], self.mean)
