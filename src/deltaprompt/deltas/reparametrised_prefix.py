"""P = W₂ tanh(W₁ P' + b₁) + b₂, a prefix whose P', W₁, b₁ all attentions share (Li & Liang 2021, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from deltaprompt import registry
from deltaprompt.backbone.attention import in_front
from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import Delta, KeyValue, Reparametrised, Shared, Taxonomy
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.params import Param, Weights, kaiming, normal, zeros


@dataclass(frozen=True)
class ReparametrisedPrefix(Delta, KeyValue, Shared, Reparametrised):
    """Prefix tuning through a network: only the computed prefix is kept, as a plain prefix.

    It trains length · embed + embed · mid + mid numbers, and at an attention (mid + 1) · (widths of keys and values).

    Args:
        length: tokens of the prefix.
        embed: the width of P'.
        mid: the width between the two maps; 512 for the paper's table-to-text, 800 for its summaries.
        init_std: of the normal numbers that P' starts from.
        at: selectors of attention modules (`attn`; `cross` for the decoder's attention to the encoder).
    """

    length: int = 10
    embed: int = 512
    mid: int = 512
    init_std: float = 1.0
    at: tuple[str, ...] = ("attn",)
    taxonomy: ClassVar[Taxonomy] = "addition"
    acts_on: ClassVar[tuple[str, ...]] = ("attn",)
    identity_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.length, self.embed, self.mid) < 1 or self.init_std < 0:
            raise ConfigError(
                f"reparametrised_prefix: got length={self.length}, embed={self.embed}, mid={self.mid}, "
                f"init_std={self.init_std}; length, embed, mid >= 1, init_std >= 0 are possible"
            )

    def selectors(self) -> Sequence[str]:
        return self.at

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Param]:
        return {
            "prefix": Param((self.length, self.embed), normal(self.init_std)),
            "first": Param((self.mid, self.embed), kaiming),
            "first_bias": Param((1, self.mid), zeros),
        }

    def params(self, site: Site) -> Mapping[str, Param]:
        if not site.heads:
            raise SiteError(
                f"reparametrised_prefix: the number of heads at {site.name} is not known; it cannot act there"
            )
        widths = {"second_k": site.outputs, "second_v": site.values or site.outputs}
        second = {name: Param((width, self.mid), kaiming) for name, width in widths.items()}
        return second | {f"{name}_bias": Param((1, width), zeros) for name, width in widths.items()}

    def computed(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        inner = torch.tanh(w["prefix"] @ w["first"].mT + w["first_bias"])  # [..., length, mid]
        both = ((n, inner @ w[f"second_{n}"].mT + w[f"second_{n}_bias"]) for n in ("k", "v"))  # [..., length, width]
        return {n: t.unflatten(-1, (site.heads, -1)).transpose(-3, -2) for n, t in both}  # [..., heads, length, size]

    def key_value(self, w: Weights, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return in_front(w["k"], k), in_front(w["v"], v)

    def plain(self) -> Delta:
        options = {"length": self.length, "at": self.at, "gated": self.gated}
        return cast(Delta, registry.build("deltas", "prefix", options))
