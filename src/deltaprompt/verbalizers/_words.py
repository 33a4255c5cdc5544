"""Words that stand for classes: their token ids, which class each is of, and what is wrong with them."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError
from deltaprompt.params import Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Answers, Setting, Worded, of_each
from deltaprompt.verbalizers._likelihood import scored

Words: TypeAlias = Mapping[str, str | tuple[str, ...]]


def word_ids(words: Words, s: Setting, longest: int | None = None) -> list[tuple[int, list[int]]]:
    """(class, token ids) of every word; where `longest` is given, words of more tokens are left out."""
    if s.kind == "encoder":
        raise ConfigError("label words need a language model; for a plain encoder use label_descriptions or prototypes")
    of_each(words, s.labels, "words")
    each = [(c, label, word) for c, label in enumerate(s.labels) for word in tuple_of(words[label])]
    if (blank := next((label for _, label, word in each if not word.strip()), None)) is not None:
        raise ConfigError(f"a word of label {blank!r} is empty; leave it out, or write a word")
    found = dict.fromkeys((c, tuple(s.answer_ids(word))) for c, _, word in each)  # "Good" may be "good"
    kept = [(c, list(ids)) for c, ids in found if longest is None or len(ids) <= longest]
    if lack := set(range(len(s.labels))) - {c for c, _ in kept}:
        label = s.labels[min(lack)]
        raise ConfigError(f"no word of label {label!r} has {longest} tokens or fewer; allow longer ones or add some")
    return kept


def tuple_of(words: str | Sequence[str]) -> tuple[str, ...]:
    """One word, or several."""
    return (words,) if isinstance(words, str) else tuple(words)


def lengths_of(words: Sequence[tuple[int, list[int]]]) -> tuple[int, ...]:
    """The numbers of tokens that words have."""
    return tuple(sorted({len(ids) for _, ids in words}))


def table(words: Sequence[tuple[int, list[int]]], classes: int) -> dict[str, Tensor]:
    """The constants that `scored` reads: ids [u, t], lengths [u], and which class a word is of, member [c, u]."""
    longest = max(len(ids) for _, ids in words)
    member = torch.zeros(classes, len(words), dtype=torch.bool)
    member[[c for c, _ in words], range(len(words))] = True
    return {
        "ids": torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in words]),
        "lengths": torch.tensor([len(ids) for _, ids in words]),
        "member": member,
    }


class OfWords(Answers, Worded, ABC):
    """A verbalizer with words of each label in its field `words`."""

    words: Words

    def ids(self, s: Setting) -> list[tuple[int, list[int]]]:
        """(class, token ids) of every word."""
        return word_ids(self.words, s)

    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        one_mask(s)
        return lengths_of(self.ids(s))

    def units(self, s: Setting) -> int:
        return len(self.ids(s))

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        """What `scored` reads."""
        return table(self.ids(s), len(s.labels))

    def word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        return scored(w, s, at)

    def shown(self, label: str) -> tuple[str, ...]:
        """The first of its words; of a label without any its name."""
        return (tuple_of(self.words.get(label) or label.replace("_", " "))[0].strip(),)


class Wordable(OfWords, ABC):
    """A verbalizer that reads states and may have label words beside them."""

    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        return super().answer_lengths(s) if self.words else (1,)

    def units(self, s: Setting) -> int:
        return super().units(s) if self.words else len(s.labels)

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        return super().constants(s) if self.words else {}


def apart(labels: Sequence[str], words: Sequence[tuple[int, list[int]]]) -> None:
    """Checks that no two classes have the same words (class after class), which would always have the same score."""
    seen: dict[frozenset[tuple[int, ...]], str] = {}
    for label, (_, own) in zip(labels, groupby(words, lambda word: word[0]), strict=True):
        other = seen.setdefault(frozenset(tuple(ids) for _, ids in own), label)
        if other != label:
            raise ConfigError(
                f"labels {other!r} and {label!r} have the same words to this vocabulary; choose others for one"
            )


def one_mask(s: Setting, what: str = "label words answer") -> None:
    """Checks that the template has no second mask."""
    if s.masks > 1:
        raise ConfigError(
            f"{what} at one {{mask}}, and the template has {s.masks}; leave one, or use rules (words at each mask), "
            "soft or prototypes (the mean of the states at all of them)"
        )


def best_apart(scores: Tensor, size: int) -> Tensor:
    """The best words of each class [c, size], each word in the class where it is best: the best pair is taken first."""
    found = [list[int]() for _ in scores]
    taken = set[int]()
    for place in scores.flatten().argsort(descending=True).tolist():
        c, word = divmod(place, scores.shape[1])
        if word not in taken and len(found[c]) < size:
            found[c].append(word)
            taken.add(word)
    return torch.tensor(found)
