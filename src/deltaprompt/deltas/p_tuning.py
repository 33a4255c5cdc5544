"""P = MLP(BiLSTM(E)): while it trains, a network computes the embeddings P of a soft prompt (Liu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor

from deltaprompt import registry
from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import Delta, Reparametrised, VirtualTokens
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, kaiming, normal, uniform, zeros

LAYERS = 2  # of the LSTM, as in the authors' code; its MLP too has two maps, the one by itself three
TENSORS = ("w_ih", "w_hh", "b_ih", "b_hh")  # of a layer of it, named as PyTorch's; both directions in one tensor


@dataclass(frozen=True)
class PTuning(VirtualTokens, Reparametrised):
    """P-tuning: only the computed prompt is kept, length · d numbers, as a soft prompt.

    With h the hidden size, MLP is d → h → h → d by itself, and 2h → 2h → d behind the LSTM. The authors' code has an
    LSTM of d / 2 a direction; peft's of d.

    Args:
        length: virtual tokens; the features put as many in front of every text.
        init_std: of the normal numbers E that the network reads.
        encoder: "lstm" reads E in both directions, "mlp" every token by itself.
        hidden: h, of the LSTM a direction; where not given d / 2 for the LSTM, d for the MLP.
        first: the row of the first one among all virtual tokens of the task; set by the task, not by hand.
        at: selector of the embedding; the encoder's where there are two.
    """

    init_std: float = 1.0
    encoder: Literal["lstm", "mlp"] = "lstm"
    hidden: int | None = None

    def __post_init__(self) -> None:
        sizes = self.length >= 1 and self.init_std >= 0 and (self.hidden is None or self.hidden >= 1)
        if not sizes or self.encoder not in ("lstm", "mlp"):
            raise ConfigError(
                f"p_tuning: got length={self.length}, init_std={self.init_std}, encoder={self.encoder!r}, "
                f"hidden={self.hidden}; possible: length >= 1, init_std >= 0, encoder lstm or mlp, hidden >= 1"
            )

    def params(self, site: Site) -> Mapping[str, Param]:
        d = site.outputs
        h = self.hidden or (d if self.encoder == "mlp" else d // 2)
        start = {"e": Param((self.length, d), normal(self.init_std))}
        if self.encoder == "mlp":
            return start | _maps(d, h, h, d)
        for layer, size in enumerate((d, 2 * h)):
            shapes = (2, 4 * h, size), (2, 4 * h, h), (2, 1, 4 * h), (2, 1, 4 * h)
            start |= {f"{n}_{layer}": Param(s, uniform(h**-0.5)) for n, s in zip(TENSORS, shapes, strict=True)}
        return start | _maps(2 * h, 2 * h, d)

    def computed(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        x = w["e"]  # [..., length, d]
        if self.encoder == "lstm":
            for layer in range(LAYERS):
                x = both_ways(x, *(w[f"{name}_{layer}"] for name in TENSORS))  # [..., length, 2h]
        for number in range(2 if self.encoder == "lstm" else 3):
            x = (x.relu() if number else x) @ w[f"map_{number}"].mT + w[f"bias_{number}"]
        return {"p": x}

    def plain(self) -> Delta:
        options = {"length": self.length, "first": self.first, "at": self.at, "gated": self.gated}
        return cast(Delta, registry.build("deltas", "soft_prompt", options))


def both_ways(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """One layer of a bidirectional LSTM (Hochreiter & Schmidhuber 1997), x [..., s, in] -> [..., s, 2h]."""
    x = torch.stack([x, x.flip(-2)], dim=-3)  # [..., 2, s, in]
    given = x @ w_ih.mT + b_ih + b_hh  # [..., 2, s, 4h]
    h = c = torch.zeros_like(given[..., :1, : w_hh.shape[-1]])  # [..., 2, 1, h]
    states = []
    for now in given.split(1, dim=-2):
        i, f, g, o = (now + h @ w_hh.mT).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    there, back = torch.cat(states, dim=-2).unbind(-3)  # [..., s, h] each
    return torch.cat([there, back.flip(-2)], dim=-1)


def _maps(*sizes: int) -> dict[str, Param]:
    """Linear maps that follow one another."""
    maps: dict[str, Param] = {}
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        maps |= {f"map_{number}": Param((outputs, inputs), kaiming), f"bias_{number}": Param((1, outputs), zeros)}
    return maps
