"""Embeddings P of virtual tokens put in front of the text: at `embed`, y' = P[id − V] for id ≥ V (Lester et al. 2021).

A virtual token is an id past the vocabulary's end, so a sequence has its final length before the model starts and
nothing downstream is shifted. The soft blocks of a template are rows of the same kind of table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import After, Before, Delta, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, normal


@dataclass(frozen=True)
class SoftPrompt(Delta, After, Before):
    """Prompt tuning: length · d parameters.

    Args:
        length: virtual tokens; the features put as many in front of every text.
        init_std: of the normal numbers they start from; 0.02 is what transformers' models start their embeddings from.
        first: the row of the first one among all virtual tokens of the task; set by the task, not by hand.
        at: selector of the embedding; the encoder's where there are two.
    """

    length: int = 20
    init_std: float = 0.02
    first: int = 0
    at: tuple[str, ...] = (r"re:^(encoder\.)?embed$",)
    taxonomy: ClassVar[Taxonomy] = "addition"
    acts_on: ClassVar[tuple[str, ...]] = ("embed",)

    def __post_init__(self) -> None:
        if self.length < 1 or self.init_std < 0:
            raise ConfigError(
                f"soft_prompt: got length={self.length}, init_std={self.init_std}; "
                "length >= 1, init_std >= 0 are possible"
            )

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"p": Param((self.length, site.outputs), normal(self.init_std))}

    def _row(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        """The row of P for each id [b, s], and whether the id is one of ours."""
        row = x - site.inputs - self.first
        ours = (row >= 0) & (row < self.length)
        return row.clamp(0, self.length - 1), ours

    def before(self, w: Weights, site: Site, x: Tensor) -> Tensor:
        return torch.where(x < site.inputs + self.first, x, torch.where(self._row(site, x)[1], 0, x))

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        row, ours = self._row(site, x)
        p = w["p"].to(y.dtype)
        soft = p[row] if p.ndim == 2 else torch.gather(p, 1, row[..., None].expand(-1, -1, p.shape[-1]))  # [b, s, d]
        return torch.where(ours[..., None], soft, y)
