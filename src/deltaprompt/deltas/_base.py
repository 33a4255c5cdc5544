"""A delta is a function of what enters and what leaves a named site: `y' = after(x, y)`, optionally `x' = before(x)`.

A method is a frozen dataclass: its fields are its configuration, its command-line options and its stored form in one;
its methods are its maths on tensors that broadcast. Every parameter is stacked `[n, …]`, one slot per adaptation. The
maths sees either one slot (`a` of shape `[r, d]`) or one slot per row (`[rows, r, d]`) and must be right for both; a
vector is declared `[1, d]`, so that it broadcasts over the positions of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltaprompt.backbone.sites import Site

Init = Callable[[Tensor, torch.Generator], None]
Taxonomy = Literal["addition", "specification", "reparametrisation"]


@dataclass(frozen=True, slots=True)
class Param:
    """One trainable tensor of a patch: the shape of one slot, and what it starts as."""

    shape: tuple[int, ...]
    init: Init

    @property
    def size(self) -> int:
        """Numbers in one slot."""
        return torch.Size(self.shape).numel()


class Weights(Mapping[str, Tensor]):
    """A patch's tensors as its maths sees them (one slot, or one a row), and whether the model is training."""

    def __init__(self, tensors: Mapping[str, Tensor], training: bool) -> None:
        self._tensors = tensors
        self.training = training

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Delta(ABC):
    """What every method has: where it goes by default, its parameters at a site, and what it does there."""

    taxonomy: ClassVar[Taxonomy]
    acts_on: ClassVar[tuple[str, ...]] = ("linear",)  # kinds of sites
    identity_at_start: ClassVar[bool] = True

    @abstractmethod
    def selectors(self) -> Sequence[str]:
        """The selectors of the sites that it goes to."""

    @abstractmethod
    def params(self, site: Site) -> Mapping[str, Param]:
        """Its tensors at a site, by name. The closed form of the parameter count is the sum of their sizes."""


class After(ABC):
    """A delta that maps what leaves a site."""

    @abstractmethod
    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """y' from the site's input x [b, s, in] and output y [b, s, out]."""


class Before(ABC):
    """A delta that maps what enters a site."""

    @abstractmethod
    def before(self, w: Weights, site: Site, x: Tensor) -> Tensor:
        """x' from the site's input x [b, s, in]."""


class KeyValue(ABC):
    """A delta that maps the keys and values of an attention site."""

    @abstractmethod
    def key_value(self, w: Weights, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k', v' from k, v [b, heads, s, size]."""


class Mergeable(ABC):
    """A delta that a site's own weight can take up."""

    @abstractmethod
    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(W', b') of a linear map [out, in], [out] (or of a norm, [d]) that does what the map and the delta do."""


def zeros(t: Tensor, _: torch.Generator) -> None:
    """All zero."""
    t.zero_()


def ones(t: Tensor, _: torch.Generator) -> None:
    """All one."""
    t.fill_(1.0)


def normal(std: float) -> Init:
    """Independent normal numbers of mean 0."""
    return partial(_normal, std)  # a partial, and no inner function, so that it pickles


def _normal(std: float, t: Tensor, g: torch.Generator) -> None:
    t.normal_(0.0, std, generator=g)


def kaiming(t: Tensor, g: torch.Generator) -> None:
    """Uniform in ±1/√in, PyTorch's own start of a linear map (He et al. 2015 with a = √5); t is [..., out, in]."""
    bound = t.shape[-1] ** -0.5
    t.uniform_(-bound, bound, generator=g)
