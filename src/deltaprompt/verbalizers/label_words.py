"""score(c) = log mean_{w ∈ words(c)} p(w | prompt): the language model's own word scores (PET, Schick & Schütze 2021).

A word of several tokens has its whole probability: in a masked model with as many masks as tokens (each token at its
mask), in a causal model or an encoder-decoder as the likelihood of the sequence, the prompt being computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Answers, Setting, Verbalizer, of_each

LogitsOf = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class LabelWords(Verbalizer, Answers):
    """Words that stand for classes; nothing is trained.

    Args:
        words: the words of each label; one, or several that count alike.
    """

    words: Mapping[str, str | tuple[str, ...]]

    def _of(self, label: str) -> tuple[str, ...]:
        words = self.words[label]
        return (words,) if isinstance(words, str) else tuple(words)

    def _ids(self, s: Setting) -> list[tuple[int, list[int]]]:
        """(class, token ids) of every word."""
        if s.kind == "encoder":
            raise ConfigError(
                "label words need a language model; for a plain encoder use label_descriptions or prototypes"
            )
        of_each(self.words, s.labels, "words")
        words = [(c, s.answer_ids(word)) for c, label in enumerate(s.labels) for word in self._of(label)]
        _apart(s.labels, words)
        return words

    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        return tuple(sorted({len(ids) for _, ids in self._ids(s)}))

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {}

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        words = self._ids(s)
        longest = max(len(ids) for _, ids in words)
        member = torch.zeros(len(s.labels), len(words), dtype=torch.bool)  # [c, w]
        member[[c for c, _ in words], range(len(words))] = True
        return {
            "ids": torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in words]),  # [w, t]
            "lengths": torch.tensor([len(ids) for _, ids in words]),  # [w]
            "member": member,
        }

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        words = self._word_scores(w, s, at).float()  # [b, w]
        member = w["member"]
        each = words[:, None].masked_fill(~member, -torch.inf).logsumexp(-1)  # [b, c]
        return log_softmax(each - member.sum(-1).log(), dim=-1)

    def _word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        """log p(word | prompt) up to a constant of the row: [b, w]."""
        if at.logits is None:
            raise ConfigError("label words need a language model's head, and this backbone has none")
        if w["ids"].shape[1] == 1:
            return at.logits(at.hidden[:, 0], w["ids"][:, 0])[:, 0]  # [b, 1, w] -> [b, w]
        if at.continued is not None:
            return at.continued(w["ids"], w["lengths"])
        return _at_masks(at.logits, at.hidden, w["ids"], w["lengths"])


def _apart(labels: Sequence[str], words: Sequence[tuple[int, list[int]]]) -> None:
    """Checks that no two classes have the same words, which would always have the same score."""
    seen: dict[frozenset[tuple[int, ...]], str] = {}
    for c, label in enumerate(labels):
        own = frozenset(tuple(ids) for other, ids in words if other == c)
        if own in seen:
            raise ConfigError(
                f"labels {seen[own]!r} and {label!r} have the same words to this vocabulary; choose others for one"
            )
        seen[own] = label


def _at_masks(logits: LogitsOf, hidden: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Σ_i log p(token i | at mask i), each word in the variant with as many masks as it has tokens: [b, w]."""
    made = hidden.new_empty(hidden.shape[0], len(ids), dtype=torch.float32)
    for variant, length in enumerate(lengths.unique().tolist()):
        which = (lengths == length).nonzero()[:, 0]
        states = hidden[:, variant, :length]  # [b, t, d]
        every = log_softmax(logits(states, None).float(), dim=-1)  # [b, t, vocabulary], at the masks only
        chosen = ids[which, :length].T.expand(len(hidden), -1, -1)  # [b, t, w']
        made = made.index_copy(1, which, every.gather(-1, chosen).sum(1))
    return made
