"""W' = W + λ P θ, one θ of d numbers for all maps, P random and frozen, θ = 0 at first (Aghajanyan et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import After, Computed, Delta, Fixed, Mergeable, Shared, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, ones, zeros


@dataclass(frozen=True)
class SAID(Delta, After, Mergeable, Shared, Fixed, Computed):
    """Structure-aware intrinsic dimension: d parameters for all linear maps together, and one (λ) a map.

    P is a fast random projection: z = Π H B θ, and block k of a map's numbers is H (g_k ⊙ z). H is the orthonormal
    Hadamard matrix of size p, the power of two from d on (θ is filled up with zeros); B and g_k are random signs, one
    byte for each weight; Π is a permutation. All maps together have D weights: scaled by √(p / D), P keeps lengths on
    average, E‖P θ‖² = ‖θ‖².

    Args:
        dimension: d.
        structure_aware: whether each map has its λ, which starts at 1; without it this is DID.
        projection_seed: of P, which is drawn again when an adaptation is opened, and never saved.
        at: selectors of linear maps; by default all of the layers but routers, whose choices have no gradient.
    """

    dimension: int = 1000
    structure_aware: bool = True
    projection_seed: int = 0
    at: tuple[str, ...] = (r"re:layers\.\d+\.(?!router)",)
    taxonomy: ClassVar[Taxonomy] = "reparametrisation"

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ConfigError(f"said: got dimension={self.dimension}; dimension >= 1 is possible")

    @property
    def width(self) -> int:
        """p, the power of two from d on."""
        return 1 << (self.dimension - 1).bit_length()

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"lambda": Param((1, 1), ones)} if self.structure_aware else {}

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Param]:
        return {"theta": Param((1, self.dimension), zeros)}

    def fixed(self, sites: Sequence[Site]) -> Mapping[str, Tensor]:
        p, chance = self.width, torch.Generator().manual_seed(self.projection_seed)
        sizes = {site.name: site.outputs * site.inputs for site in sites}
        own = {"flip": _signs(1, p, chance), "order": torch.randperm(p, generator=chance)}
        blocks = {name: _signs(-(-size // p), p, chance) for name, size in sizes.items()}  # rounded up
        return {**own, **blocks, "scale": torch.tensor(p / sum(sizes.values()), dtype=torch.float64).sqrt()}

    def computed(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        theta = functional.pad(w["theta"], (0, self.width - self.dimension))
        z = _hadamard(w["flip"] * theta)[..., w["order"]]  # [1, p]
        numbers = _hadamard(w[site.name] * z).flatten(-2)[..., : site.outputs * site.inputs]  # [blocks, p] -> [D of it]
        change = w["scale"] * numbers.unflatten(-1, (site.outputs, site.inputs))
        return {"change": change * w["lambda"] if "lambda" in w else change}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return y + x @ w["change"].mT  # [b, s, in] -> [b, s, out]

    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + w["change"], bias


def _signs(rows: int, columns: int, chance: torch.Generator) -> Tensor:
    """Random numbers 1 and -1, [rows, columns]."""
    return torch.randint(0, 2, (rows, columns), generator=chance, dtype=torch.int8) * 2 - 1


def _hadamard(x: Tensor) -> Tensor:
    """H x of the last axis, of size p = a b: H of size a on the rows, and of size b on the columns, of x as [a, b]."""
    bits = x.shape[-1].bit_length() - 1
    left, right = _matrix(bits // 2, x), _matrix(bits - bits // 2, x)
    return (left @ x.unflatten(-1, (len(left), -1)) @ right).flatten(-2)


def _matrix(bits: int, like: Tensor) -> Tensor:
    """H of size 2^bits, orthonormal: H of twice the size is [[H, H], [H, −H]] / √2."""
    h = like.new_ones(1, 1)
    for _ in range(bits):
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)]) * 0.5**0.5
    return h
