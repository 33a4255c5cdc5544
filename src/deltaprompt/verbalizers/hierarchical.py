"""score(t) = mean_{w ∈ words(t)} log p(w | prompt), a type's words being those of its path (PLET, Ding et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError, nearest
from deltaprompt.hierarchy import way
from deltaprompt.params import Param, Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Answers, Setting, Verbalizer, Worded, normalised, without_prior
from deltaprompt.verbalizers._words import Mean, lengths_of, one_mask, scored, table, tuple_of

Ids = tuple[int, ...]
SMALL = ("and", "of", "or")  # words that say nothing of a type: /WORK_OF_ART is work, art
REST = "other"  # the name of what is left of a type, and of no type: person-other is person


@dataclass(frozen=True)
class Hierarchical(Verbalizer, Answers, Worded):
    """Words of type paths such as "/person/artist/actor" or "person-artist/author"; nothing is trained.

    Words of several tokens count whole (the official code takes the first one); those that labels share, only once.

    Args:
        of: the words of a label: of its whole "path", as the paper takes OntoNotes, or of the "leaf", as it takes
            Few-NERD and BBN.
        mean: of a label's words: of their logarithms (as the official code has it), or of their probabilities.
        words: of labels whose own names do not say it, in place of those of their path.
    """

    of: Literal["path", "leaf"] = "path"
    mean: Mean = "geometric"
    words: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)

    def named(self, label: str) -> tuple[str, ...]:
        """The words that stand for a label, the most general first."""
        if label in self.words:
            return tuple_of(self.words[label])
        path = way(label)
        path = tuple(part for part in path if part.lower() != REST) or path
        parts = re.split(r"[\W_]+", " ".join(path if self.of == "path" else path[-1:]))
        words = [part.lower() if part.isupper() else part for part in parts if part]
        return tuple(dict.fromkeys(word for word in words if word not in SMALL)) or (label,)

    def _ids(self, s: Setting) -> dict[str, list[Ids]]:
        """The distinct words of every label, as token ids."""
        if s.kind == "encoder":
            raise ConfigError("type words need a language model; for an encoder use label_descriptions or prototypes")
        for label in self.words:
            if label not in s.labels:
                raise ConfigError(f"there is no label {label!r} to have words{nearest(label, s.labels)}")
        words = {label: self.named(label) for label in s.labels}
        known = {word: tuple(s.answer_ids(word)) for own in words.values() for word in own}
        found = {label: list(dict.fromkeys(known[word] for word in own)) for label, own in words.items()}
        first: dict[tuple[Ids, ...], str] = {}
        for label, own in found.items():  # of ice_water and water_ice the scores are alike, and what is learned is not
            if (other := first.setdefault(tuple(own), label)) != label:
                raise ConfigError(
                    f"labels {other!r} and {label!r} have the same words to this vocabulary; give one others"
                )
        return found

    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        one_mask(s, "type words answer")
        return lengths_of([(0, list(ids)) for own in self._ids(s).values() for ids in own])

    def units(self, s: Setting) -> int:
        return len({ids for own in self._ids(s).values() for ids in own})

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {}

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        """The distinct words; of each label which of them are its own, at [c, k], and how many it has, has [c, k]."""
        found = self._ids(s)
        number = {ids: i for i, ids in enumerate(dict.fromkeys(ids for own in found.values() for ids in own))}
        most = max(map(len, found.values()))
        at = [[number[ids] for ids in own] + [0] * (most - len(own)) for own in found.values()]
        has = [[i < len(own) for i in range(most)] for own in found.values()]
        words = table([(0, list(ids)) for ids in number], 1)
        return {"ids": words["ids"], "lengths": words["lengths"], "at": torch.tensor(at), "has": torch.tensor(has)}

    def word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return scored(w, s, at)

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        words = without_prior(w, scored(w, s, at))[:, w["at"]]  # [b, c, k]
        if self.mean == "arithmetic":
            each = words.masked_fill(~w["has"], -torch.inf).logsumexp(-1) - w["has"].sum(-1).log()
        else:
            each = words.masked_fill(~w["has"], 0.0).sum(-1) / w["has"].sum(-1)
        return normalised(each)
