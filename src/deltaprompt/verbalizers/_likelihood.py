"""Scores of words where the answer is read, and the scores of classes that are made of them.

A word of several tokens has its whole probability: in a masked model with as many masks as tokens (each token at its
mask), in a causal model or an encoder-decoder as the likelihood of the sequence, the prompt being computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from deltaprompt.errors import ConfigError, check_one_of
from deltaprompt.params import Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Setting, normalised

Mean: TypeAlias = Literal["arithmetic", "geometric"]
LogitsOf = Callable[[Tensor, Tensor | None], Tensor]


def check_mean(mean: str) -> None:
    """Checks how the words of a class are brought together."""
    check_one_of("mean", mean, get_args(Mean))


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
