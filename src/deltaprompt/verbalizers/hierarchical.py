"""score(t) = mean_{w ∈ words(t)} log p(w | prompt), a type's words being those of its path (PLET, Ding et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError, check_one_of, nearest
from deltaprompt.hierarchy import way
from deltaprompt.params import Param, Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Setting, Verbalizer, normalised, without_prior
from deltaprompt.verbalizers._likelihood import Mean, check_mean, scored
from deltaprompt.verbalizers._words import OfWords, apart, table, tuple_of, word_ids

SMALL = ("and", "of", "or")  # words that say nothing of a type: /WORK_OF_ART is work, art
REST = "other"  # the name of what is left of a type, and of no type: person-other is person


@dataclass(frozen=True)
class Hierarchical(OfWords, Verbalizer):
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

    def __post_init__(self) -> None:
        check_one_of("of", self.of, ("path", "leaf"))
        check_mean(self.mean)

    def shown(self, label: str) -> tuple[str, ...]:
        """The most special of its words."""
        return (self.named(label)[-1],)

    def named(self, label: str) -> tuple[str, ...]:
        """The words that stand for a label, the most general first."""
        if label in self.words:
            return tuple_of(self.words[label])
        path = way(label)
        path = tuple(part for part in path if part.lower() != REST) or path
        parts = re.split(r"[\W_]+", " ".join(path if self.of == "path" else path[-1:]))
        words = [part.lower() if part.isupper() else part for part in parts if part]
        return tuple(dict.fromkeys(word for word in words if word not in SMALL)) or (label,)

    def ids(self, s: Setting) -> list[tuple[int, list[int]]]:
        for label in self.words:
            if label not in s.labels:
                raise ConfigError(f"there is no label {label!r} to have words{nearest(label, s.labels)}")
        found = word_ids({label: self.named(label) for label in s.labels}, s)
        if not s.several:  # else what is learned of each label tells them apart
            apart(s.labels, found)
        return found

    def units(self, s: Setting) -> int:
        return len({tuple(ids) for _, ids in self.ids(s)})

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {}

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        """The distinct words; of each label which of them are its own, at [c, k], and how many it has, has [c, k]."""
        found = [(c, tuple(ids)) for c, ids in self.ids(s)]
        number = {ids: i for i, ids in enumerate(dict.fromkeys(ids for _, ids in found))}
        own = [[number[ids] for _, ids in of] for _, of in groupby(found, lambda word: word[0])]
        most = max(map(len, own))
        at = [numbers + [0] * (most - len(numbers)) for numbers in own]
        has = [[i < len(numbers) for i in range(most)] for numbers in own]
        words = table([(0, list(ids)) for ids in number], 1)
        return {"ids": words["ids"], "lengths": words["lengths"], "at": torch.tensor(at), "has": torch.tensor(has)}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        words = without_prior(w, scored(w, s, at))[:, w["at"]]  # [b, c, k]
        if self.mean == "arithmetic":
            each = words.masked_fill(~w["has"], -torch.inf).logsumexp(-1) - w["has"].sum(-1).log()
        else:
            each = words.masked_fill(~w["has"], 0.0).sum(-1) / w["has"].sum(-1)
        return normalised(each)
