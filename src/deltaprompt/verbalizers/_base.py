"""A verbalizer maps the states where the answer is read to class scores: `AtMask -> [b, c]`.

Like a delta it is a frozen dataclass (configuration, options, stored form in one) whose methods are maths on tensors.
Its trainable tensors are stacked `[n, …]`, one slot per adaptation; its constants (ids of words) are worked out once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deltaprompt.backbone import Kind
from deltaprompt.errors import ConfigError, nearest
from deltaprompt.params import Param, Weights
from deltaprompt.types import AtMask


@dataclass(frozen=True)
class Setting:
    """What a verbalizer may know of its task: the classes in order, the kind and the width of the backbone's states."""

    labels: tuple[str, ...]
    kind: Kind
    width: int
    answer_ids: Callable[[str], list[int]]  # a word -> its token ids as it stands at the mask


@dataclass(frozen=True)
class Verbalizer(ABC):
    """What every verbalizer has."""

    @abstractmethod
    def params(self, s: Setting) -> Mapping[str, Param]:
        """Its trainable tensors, one slot of each."""

    @abstractmethod
    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        """Its tensors that never train. A class without an entry, or a kind of backbone that does not fit, raises."""

    @abstractmethod
    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        """Class scores [b, c] whose softmax is the prediction; `w` holds both kinds of tensors."""


class Answers(ABC):
    """A verbalizer whose answers are tokens: it says how many a word may have."""

    @abstractmethod
    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        """The numbers of tokens that its words have."""


class Started(ABC):
    """A verbalizer whose tensors start from states of the frozen backbone."""

    @abstractmethod
    def texts(self, s: Setting) -> Sequence[str]:
        """The texts, besides the training examples, whose states it starts from."""

    @abstractmethod
    def start(self, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        """Start values from the states of `texts` [t, d] and of the support [n, d] with its classes [n]; n may be 0."""


def pooled(at: AtMask) -> Tensor:
    """The mean of a row's states over its answer positions, in float32 or better: [b, v, m, d] -> [b, d]."""
    hidden = at.hidden[:, 0].to(torch.promote_types(at.hidden.dtype, torch.float32))
    present = at.present[:, 0, :, None]
    return (hidden * present).sum(1) / present.sum(1)


def cosine(z: Tensor, h: Tensor) -> Tensor:
    """cos(h, z_c) [b, c] of states h [b, d] and unit prototypes z [c, d], or one set a row [b, c, d]."""
    return (functional.normalize(z, dim=-1) @ functional.normalize(h, dim=-1)[..., None]).squeeze(-1)


def of_each(given: Mapping[str, object], labels: Sequence[str], what: str) -> None:
    """Checks that every class, and nothing else, has an entry that is not empty."""
    for label in labels:
        if not given.get(label):
            full = ", ".join(repr(other) for other in given if given[other]) or "none"
            raise ConfigError(f"label {label!r} has no {what}; labels that have some: {full}")
    for label in given:
        if label not in labels:
            raise ConfigError(f"there is no label {label!r} to have {what}{nearest(label, labels)}")
