"""score(c) = Σ_m log p(words(c, m) | mask m), over the words that stand at mask m in any rule (PTR, Han et al. 2022).

A class is a rule, a conjunction: a word, or words that count alike, at every mask of the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, nll_loss

from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Setting, Trained, Verbalizer, check_weights, normalised, of_each
from deltaprompt.verbalizers._words import tuple_of


@dataclass(frozen=True)
class Rules(Verbalizer, Trained):
    """Words at several masks; nothing is trained. Masks are read side by side, so the backbone is a masked one.

    Args:
        rules: for each label what stands at each mask in turn: a word, or several that count alike; one token each.
        auxiliary: how much the loss of each mask's own words counts beside that of the classes (PTR, equation 7).
    """

    rules: Mapping[str, tuple[str | tuple[str, ...], ...]]
    auxiliary: float = 1.0

    def __post_init__(self) -> None:
        check_weights("rules", auxiliary=self.auxiliary)
        for label, rule in self.rules.items():
            given: object = rule
            if isinstance(given, str):
                raise ConfigError(
                    f"the rule of {label!r} is one text, {rule!r}; write what stands at each mask: a tuple"
                )

    def shown(self, label: str) -> tuple[str, ...]:
        """The first word at each mask."""
        return tuple(tuple_of(words)[0] for words in self.rules[label])

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {}

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        """Of mask m: its words ids_m [w], which of them a group has group_m [g, w], a class's group of_m [c]."""
        if s.kind != "masked":
            raise ConfigError(f"rules read several masks at once, which needs a masked model; this one is {s.kind}")
        of_each(self.rules, s.labels, "rule")
        made: dict[str, Tensor] = {}
        for m in range(s.masks):
            made |= self._mask(s, m)
        told = {tuple(int(made[f"of_{m}"][c]) for m in range(s.masks)): label for c, label in enumerate(s.labels)}
        for c, label in enumerate(s.labels):
            other = told[tuple(int(made[f"of_{m}"][c]) for m in range(s.masks))]
            if other != label:
                raise ConfigError(f"labels {label!r} and {other!r} have the same rule; let them differ at a mask")
        return made

    def _mask(self, s: Setting, m: int) -> dict[str, Tensor]:
        groups: dict[tuple[int, ...], int] = {}
        of = [groups.setdefault(self._ids(s, label, m), len(groups)) for label in s.labels]
        ids = sorted({i for group in groups for i in group})
        group = torch.tensor([[i in own for i in ids] for own in groups])
        return {f"ids_{m}": torch.tensor(ids), f"group_{m}": group, f"of_{m}": torch.tensor(of)}

    def _ids(self, s: Setting, label: str, m: int) -> tuple[int, ...]:
        rule = self.rules[label]
        if len(rule) != s.masks:
            raise ConfigError(f"the rule of {label!r} has words for {len(rule)} masks, and the template has {s.masks}")
        found = {word: s.answer_ids(word, m) for word in tuple_of(rule[m])}
        for word, ids in found.items():
            if len(ids) > 1:
                raise ConfigError(
                    f"{word!r}, in the rule of {label!r}, has {len(ids)} tokens; at each mask stands a word of one"
                )
        return tuple(sorted(ids[0] for ids in found.values()))

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        each = [self._groups(w, at, m)[:, w[f"of_{m}"]] for m in range(s.masks)]
        return torch.stack(each).sum(0)

    def loss(self, w: Weights, s: Setting, at: AtMask, scores: Tensor, classes: Tensor) -> Tensor:
        joint = cross_entropy(scores.float(), classes)
        own = [nll_loss(self._groups(w, at, m), w[f"of_{m}"][classes]) for m in range(s.masks)]
        return joint + self.auxiliary * torch.stack(own).mean()

    def _groups(self, w: Weights, at: AtMask, m: int) -> Tensor:
        """log p of each group of words at a mask, over all its words: [b, g]."""
        if at.logits is None:
            raise ConfigError("rules need a language model's head, and this backbone has none")
        words = normalised(at.logits(at.hidden[:, 0, m : m + 1], w[f"ids_{m}"])[:, 0])  # [b, w]
        return words[:, None].masked_fill(~w[f"group_{m}"], -torch.inf).logsumexp(-1)
