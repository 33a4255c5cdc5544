"""A delta is a function of what enters and what leaves a named site: `y' = after(x, y)`, optionally `x' = before(x)`.

A method is a frozen dataclass: its fields are its configuration, its command-line options and its stored form in one;
its methods are its maths on tensors that broadcast. Every parameter is stacked `[n, …]`, one slot per adaptation. The
maths sees either one slot (`a` of shape `[r, d]`) or one slot per row (`[rows, r, d]`) and must be right for both; a
vector is declared `[1, d]`, so that it broadcasts over the positions of a row.

`Delta` is what every method has; the other classes here are abilities, of which a method takes those it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from deltaprompt.backbone.sites import Site
from deltaprompt.params import Param, Weights

# Where methods go by default, whatever sort of layers a model has: of alternatives, a layer's first is meant.
QUERIES = "attn.q|attn.qkv|attn.qk|attn.q_b|attn.q_a|attn.kv|mixer.q|mixer.in|cross.q|ffn.up"
KEYS = "attn.k|attn.qkv|attn.qk|attn.kv_b|attn.kv|mixer.k|mixer.in|"
VALUES = "attn.v|attn.qkv|attn.v_*|attn.kv_b|attn.kv|mixer.v|mixer.out|cross.v|ffn.down"
MIXED = "attn.o|attn.o_b|mixer.out|"  # what leaves the attention, or what there is in its place
FED = "ffn.down|ffn|mixer.out"  # what leaves the feed-forward block

Taxonomy = Literal["addition", "specification", "reparametrisation"]
Activation = Literal["gelu", "relu", "silu", "tanh"]
SIGMA: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": functional.tanh,
}


@dataclass(frozen=True)
class Delta(ABC):
    """What every method has: where it goes by default, its parameters at a site, and what it does there.

    Args:
        gated: whether what it changes is weighted by a learned gate in (0, 1): y + σ(w x + b) (y' − y) at every token;
            a prefix, which sees no input, is weighted by σ(b) (UniPELT: Mao et al. 2022, section 3).
    """

    taxonomy: ClassVar[Taxonomy]
    acts_on: ClassVar[tuple[str, ...]] = ("linear",)  # kinds of sites
    identity_at_start: ClassVar[bool] = True
    gated: bool = field(default=False, kw_only=True)

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
        """k', v' from k, v [b, heads, s, size]; further ones are put in front."""


class Mergeable(ABC):
    """A delta that a site's own weight can take up."""

    @abstractmethod
    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(W', b') of a linear map [out, in], [out] (or of a norm, [d]) that does what the map and the delta do."""


class Shared(ABC):
    """A delta with trainable tensors that all its sites share; its maths finds them in `w` beside the site's own."""

    @abstractmethod
    def shared(self, sites: Sequence[Site]) -> Mapping[str, Param]:
        """The tensors that the sites share, by name; counted and saved once."""


class Fixed(ABC):
    """A delta with numbers that do not train, drawn from a seed of its options: the same in all slots, never saved."""

    @abstractmethod
    def fixed(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        """The numbers by name, without an axis for the slots; a site's own may go by the site's name."""


class Started(ABC):
    """A delta that starts from the frozen weight of its site."""

    @abstractmethod
    def start(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        """What tensors of one slot begin as, by name, given their first values in `w` and the site's `w.frozen()`."""


class Computed(ABC):
    """A delta whose maths sees tensors computed from those that train."""

    @abstractmethod
    def computed(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        """All tensors that the maths sees, from those of one slot `[…]`, or of all slots `[n, …]` at once."""


class Reparametrised(Computed):
    """A delta that trains other tensors than it needs later: only the computed ones are saved, as a plainer delta's."""

    @abstractmethod
    def plain(self) -> Delta:
        """The delta whose tensors, at every site, are the computed ones."""


class Padded:
    """A delta that is also one of a larger width, zeros filling up its tensors: many widths share one stack."""

    width: ClassVar[str]  # the option that may be larger
    free: ClassVar[tuple[str, ...]] = ()  # further options that may differ between those of one stack

    def as_wide(self, wide: Self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a site by name such that `wide`, whose further rows or columns are zero, does the same."""
        return tensors


@dataclass(frozen=True)
class VirtualTokens(Delta, After, Before):
    """A delta that gives virtual tokens their embeddings, `w["p"]` [length, d]: at `embed`, y' = P[id − V] for id ≥ V.

    A virtual token is an id past the vocabulary's end, so a sequence has its final length before the model starts and
    nothing downstream is shifted. The soft blocks of a template are rows of the same kind of table.

    Args:
        length: virtual tokens; the features put as many in front of every text.
        init_std: of the normal numbers that training starts from.
        first: the row of the first one among all virtual tokens of the task; set by the task, not by hand.
        at: selector of the embedding; the encoder's where there are two.
    """

    length: int = 20
    init_std: float = 0.02
    first: int = 0
    at: tuple[str, ...] = (r"re:^(encoder\.)?embed$",)
    taxonomy: ClassVar[Taxonomy] = "addition"
    acts_on: ClassVar[tuple[str, ...]] = ("embed",)

    def selectors(self) -> Sequence[str]:
        """The embedding."""
        return self.at

    def _row(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        """The row of P for each id [b, s], and whether the id is one of ours."""
        row = x - site.inputs - self.first
        ours = (row >= 0) & (row < self.length)
        return row.clamp(0, self.length - 1), ours

    def before(self, w: Weights, site: Site, x: Tensor) -> Tensor:
        """The ids [b, s] with one that the embedding knows in place of ours."""
        return torch.where(self._row(site, x)[1], 0, x)

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """The embeddings [b, s, d] with the rows of P in place of ours."""
        row, ours = self._row(site, x)
        p = w["p"].to(y.dtype)
        soft = p[row] if p.ndim == 2 else torch.gather(p, 1, row[..., None].expand(-1, -1, p.shape[-1]))  # [b, s, d]
        return torch.where(ours[..., None], soft, y)
