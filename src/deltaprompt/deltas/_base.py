"""A delta is a function of what enters and what leaves a named site: `y' = after(x, y)`, optionally `x' = before(x)`.

A method is a frozen dataclass: its fields are its configuration, its command-line options and its stored form in one;
its methods are its maths on tensors that broadcast. Every parameter is stacked `[n, …]`, one slot per adaptation. The
maths sees either one slot (`a` of shape `[r, d]`) or one slot per row (`[rows, r, d]`) and must be right for both; a
vector is declared `[1, d]`, so that it broadcasts over the positions of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.params import Param, Weights

Taxonomy = Literal["addition", "specification", "reparametrisation"]


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
