"""A verbalizer maps the states where the answer is read to class scores: `AtMask -> [b, c]`.

Like a delta it is a frozen dataclass (configuration, options, stored form in one) whose methods are maths on tensors.
Its tensors are stacked `[n, …]`, one slot per adaptation, whether they train or stay as their start made them; its
constants (ids of words) are worked out once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from deltaprompt.backbone import Kind
from deltaprompt.errors import ConfigError, nearest
from deltaprompt.params import Param, Weights
from deltaprompt.types import AtMask

PRIOR = "prior"  # the name of the tensor that a calibration measured


class AnswerIds(Protocol):
    """The token ids of a word as it stands at a mask."""

    def __call__(self, word: str, mask: int = 0) -> list[int]: ...


@dataclass(frozen=True)
class Setting:
    """What a verbalizer may know of its task: the classes in order, the kind and the width of the backbone's states."""

    labels: tuple[str, ...]
    kind: Kind
    width: int
    answer_ids: AnswerIds
    masks: int = 1  # `{mask}`s of the template
    vocabulary: int = 0  # rows of the output embedding
    several: bool = False  # whether an example may have several labels
    whole_words: Callable[[], list[int]] = list  # ids of the tokens that are words by themselves at the mask


@dataclass(frozen=True)
class Verbalizer(ABC):
    """What every verbalizer has."""

    @abstractmethod
    def params(self, s: Setting) -> Mapping[str, Param]:
        """Its own tensors, one slot of each: those that train, and those that only its start writes."""

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        """Its tensors that never change; none unless a class says so.

        A class without an entry, or a kind of backbone that does not fit, raises.
        """
        return {}

    @abstractmethod
    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        """Class scores [b, c] whose softmax is the prediction; `w` holds both kinds of tensors."""

    def shown(self, label: str) -> tuple[str, ...]:
        """What stands at each `{mask}` of the label's demonstrations: at one, its name, unless a class says better."""
        return (label.replace("_", " "),)


class Answers(ABC):
    """A verbalizer whose answers are tokens: it says how many a word may have."""

    @abstractmethod
    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        """The numbers of tokens that its words have."""


class Phrased(Answers, ABC):
    """A verbalizer whose answers are texts of the example itself."""

    @abstractmethod
    def phrases(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The text of each label, a template of fields. A text without one has its own length, not `answer_lengths`."""


class Worded(ABC):
    """A verbalizer whose class scores are made of words' scores; a calibration's prior is then one over these words.

    Its `scores` take the prior away by `without_prior`.
    """

    @abstractmethod
    def units(self, s: Setting) -> int:
        """u, the number of words."""

    @abstractmethod
    def word_scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        """log p(word | prompt), up to a constant of the row, before any calibration: [b, u]."""


class Started(ABC):
    """A verbalizer whose tensors start from what the frozen backbone makes of texts."""

    begun: ClassVar[str]  # a tensor that is all zero before the start, without which there is no answer; "" for none
    labelled: ClassVar[bool] = True  # whether the support needs labels
    most: ClassVar[int | None] = None  # examples of the support that it looks at, at most
    solved: ClassVar[bool] = False  # whether it is started again on what deltas have learned

    def texts(self, s: Setting) -> Sequence[str]:
        """The texts, besides the support, whose states it starts from; none unless a class says so."""
        return ()

    def observed(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        """What it keeps of a row, [b, k], of which the start is given all rows'; its states unless a class says so."""
        return pooled(at)

    @abstractmethod
    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        """Start values of some of its tensors.

        Args:
            w: its tensors as they are.
            texts: pooled states of `texts` [t, d].
            support: what was observed of n examples [n, k]; n may be 0.
            classes: of the examples [n]; -1 where there is no label.
        """


class Described(Started, ABC):
    """A verbalizer that may start from a sentence about each label, in its field `descriptions`."""

    descriptions: Mapping[str, str]

    def constants(self, s: Setting) -> Mapping[str, Tensor]:
        if self.descriptions:
            of_each(self.descriptions, s.labels, "description")
        return {}

    def texts(self, s: Setting) -> Sequence[str]:
        return [self.descriptions[label] for label in s.labels] if self.descriptions else []


class Trained(ABC):
    """A verbalizer with a loss of its own in place of the cross-entropy of its scores."""

    @abstractmethod
    def loss(self, w: Weights, s: Setting, at: AtMask, scores: Tensor, classes: Tensor) -> Tensor:
        """The loss of one adaptation's rows, a number: their class scores [b, c] and classes [b]."""


def without_prior(w: Weights, words: Tensor) -> Tensor:
    """log p(word | prompt) − log of its prior, normalised over the words: [b, u]; the former alone without a prior."""
    return normalised(normalised(words) - w[PRIOR].to(words.device)) if PRIOR in w else normalised(words)


def normalised(scores: Tensor) -> Tensor:
    """log softmax, in float32 or better."""
    return functional.log_softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1)


def pooled(at: AtMask) -> Tensor:
    """The mean of a row's states over its answer positions, in float32 or better: [b, v, m, d] -> [b, d]."""
    hidden = at.hidden[:, 0].to(torch.promote_types(at.hidden.dtype, torch.float32))
    present = at.present[:, 0, :, None]
    return (hidden * present).sum(1) / present.sum(1)


def linear(w: Weights, h: Tensor) -> Tensor:
    """W h + b [b, c] of states h [b, d], by one `weight` [c, d] and `bias` [c], or by those of each row."""
    return (w["weight"] @ h[..., None]).squeeze(-1) + w["bias"]


def cosine(z: Tensor, h: Tensor) -> Tensor:
    """cos(h, z_c) [b, c] of states h [b, d] and unit prototypes z [c, d], or one set a row [b, c, d]."""
    return (functional.normalize(z, dim=-1) @ functional.normalize(h, dim=-1)[..., None]).squeeze(-1)


def squared_distance(z: Tensor, h: Tensor) -> Tensor:
    """‖h − z_c‖² [b, c] of states h [b, d] and points z [c, d], for which no [b, c, d] is made, or a set a row."""
    if z.ndim == 3:
        return (h[:, None] - z).square().sum(-1)
    middle = z.detach().mean(0)  # distances stay as they are, and round less where all states are far from 0
    h, z = h - middle, z - middle
    return (h.square().sum(-1, keepdim=True) - 2 * h @ z.mT + z.square().sum(-1)).clamp(min=0)


def class_means(support: Tensor, classes: Tensor, count: int) -> Tensor:
    """The mean of each class's rows: [n, k], [n] -> [c, k]; 0 for a class without rows."""
    known = classes >= 0
    sums = support.new_zeros(count, support.shape[-1]).index_add(0, classes[known], support[known])
    return sums / torch.bincount(classes[known], minlength=count).clamp(min=1)[:, None]


def each_has_examples(s: Setting, classes: Tensor, what: str, mend: str = "") -> None:
    """Checks that every class has an example to start from."""
    counts = torch.bincount(classes[classes >= 0], minlength=len(s.labels)).tolist()
    if empty := [label for label, n in zip(s.labels, counts, strict=True) if not n]:
        raise ConfigError(f"no training example of {', '.join(map(repr, empty))} to start {what} from{mend}")


def check_positive(name: str, **options: float) -> None:
    """Checks numbers that may not be 0."""
    for option, value in options.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}: got {option}={value}; {option} > 0 is possible")


def check_weights(name: str, **options: float) -> None:
    """Checks numbers that may be 0."""
    for option, value in options.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}: got {option}={value}; {option} >= 0 is possible")


def of_each(given: Mapping[str, object], labels: Sequence[str], what: str) -> None:
    """Checks that every class, and nothing else, has an entry that is not empty."""
    for label in labels:
        if not given.get(label):
            full = ", ".join(repr(other) for other in given if given[other]) or "none"
            raise ConfigError(f"label {label!r} has no {what}; labels that have some: {full}")
    for label in given:
        if label not in labels:
            raise ConfigError(f"there is no label {label!r} to have {what}{nearest(label, labels)}")
