"""Words that stand for classes: their token ids, their scores where the answer is read, and the scores of classes.

A word of several tokens has its whole probability: in a masked model with as many masks as tokens (each token at its
mask), in a causal model or an encoder-decoder as the likelihood of the sequence, the prompt being computed once.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError
from deltaprompt.params import Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Answers, Setting, Worded, normalised, of_each

Words: TypeAlias = Mapping[str, str | tuple[str, ...]]
Mean: TypeAlias = Literal["arithmetic", "geometric"]
LogitsOf = Callable[[Tensor, Tensor | None], Tensor]


def word_ids(words: Words, s: Setting, longest: int | None = None) -> list[tuple[int, list[int]]]:
    """(class, token ids) of every word; where `longest` is given, words of more tokens are left out."""
    if s.kind == "encoder":
        raise ConfigError("label words need a language model; for a plain encoder use label_descriptions or prototypes")
    of_each(words, s.labels, "words")
    found = [(c, word, s.answer_ids(word)) for c, label in enumerate(s.labels) for word in tuple_of(words[label])]
    if longest is None:
        return [(c, ids) for c, _, ids in found]
    kept = [(c, ids) for c, _, ids in found if len(ids) <= longest]
    for c, label in enumerate(s.labels):
        if all(other != c for other, _ in kept):
            raise ConfigError(
                f"no word of label {label!r} has {longest} tokens or fewer; allow longer ones or add some"
            )
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


class Wordable(Answers, Worded, ABC):
    """A verbalizer that reads states and may have label words beside them, in its field `words`."""

    words: Words

    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        if not self.words:
            return (1,)
        one_mask(s)
        return lengths_of(word_ids(self.words, s))

    def units(self, s: Setting) -> int:
        return len(word_ids(self.words, s)) if self.words else len(s.labels)

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        """What `scored` reads, where there are words."""
        return table(word_ids(self.words, s), len(s.labels)) if self.words else {}


def scored(w: Weights, s: Setting, at: AtMask) -> Tensor:
    """log p(word | prompt), up to a constant of the row: [b, u]."""
    if at.logits is None:
        raise ConfigError("label words need a language model's head, and this backbone has none")
    if w["ids"].shape[1] == 1:
        return at.logits(at.hidden[:, 0], w["ids"][:, 0])[:, 0]  # [b, 1, u] -> [b, u]
    if at.continued is not None:
        return at.continued(w["ids"], w["lengths"])
    return _at_masks(at.logits, at.hidden, w["ids"], w["lengths"])


def vocabulary(at: AtMask) -> Tensor:
    """log p of every token where the (first) answer token is read: [b, V]."""
    if at.logits is None:
        raise ConfigError("label words need a language model's head, and this backbone has none")
    return normalised(at.logits(at.hidden[:, 0, :1], None)[:, 0])


def of_classes(words: Tensor, member: Tensor, mean: Mean, weights: Tensor | None = None) -> Tensor:
    """Class scores [b, c] from words' [b, u]: log of the weighted mean of p, or the weighted mean of log p.

    Args:
        words: log p of each word, up to a constant of the row.
        member: which words are a class's, [c, u].
        mean: "arithmetic": log Σ α_v p_v; "geometric": Σ α_v log p_v.
        weights: log α_v up to a constant of the class, [u] or one a row [b, u]; all alike where not given. -inf leaves
            a word out.
    """
    log_alpha = words.new_zeros(words.shape[-1]) if weights is None else weights.to(words.dtype)
    each = log_alpha.unsqueeze(-2).masked_fill(~member, -torch.inf)  # [c, u] or [b, c, u]
    each = each - each.logsumexp(-1, keepdim=True)
    if mean == "arithmetic":
        return normalised((words[:, None] + each).logsumexp(-1))
    alpha = each.exp()
    finite = words[:, None].masked_fill(alpha == 0, 0.0)  # a word that does not count may have probability 0
    return normalised((alpha * finite).sum(-1))


def apart(labels: Sequence[str], words: Sequence[tuple[int, list[int]]]) -> None:
    """Checks that no two classes have the same words, which would always have the same score."""
    seen: dict[frozenset[tuple[int, ...]], str] = {}
    for c, label in enumerate(labels):
        own = frozenset(tuple(ids) for other, ids in words if other == c)
        if own in seen:
            raise ConfigError(
                f"labels {seen[own]!r} and {label!r} have the same words to this vocabulary; choose others for one"
            )
        seen[own] = label


def one_mask(s: Setting, what: str = "label words answer") -> None:
    """Checks that the template has no second mask."""
    if s.masks > 1:
        raise ConfigError(
            f"{what} at one {{mask}}, and the template has {s.masks}; leave one, or use rules (words at each mask), "
            "soft or prototypes (the mean of the states at all of them)"
        )


def _at_masks(logits: LogitsOf, hidden: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Σ_i log p(token i | at mask i), each word in the variant with as many masks as it has tokens: [b, u]."""
    made = hidden.new_empty(hidden.shape[0], len(ids), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for variant, length in enumerate(lengths.unique().tolist()):
        which = (lengths == length).nonzero()[:, 0]
        states = hidden[:, variant, :length]  # [b, t, d]
        every = normalised(logits(states, None))  # [b, t, vocabulary], at the masks only
        chosen = ids[which, :length].T.expand(len(hidden), -1, -1)  # [b, t, u']
        made = made.index_copy(1, which, every.gather(-1, chosen).sum(1).to(made.dtype))
    return made


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
