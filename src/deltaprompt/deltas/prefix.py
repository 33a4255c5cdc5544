"""k, v -> [P_k; k], [P_v; v] at every attention (Li & Liang 2021, eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaprompt.backbone.attention import in_front
from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import Delta, KeyValue, Taxonomy
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.params import Param, Weights, normal


@dataclass(frozen=True)
class Prefix(Delta, KeyValue):
    """Prefix tuning: length · (width of the keys + width of the values) parameters an attention.

    The prefix lies in key and value space as the attention sees it: no rotary embedding is applied to it, and the
    tokens of the text keep their positions. To relative position biases (T5) it lies right in front of the text.

    Args:
        length: tokens of the prefix.
        init_std: of the normal numbers it starts from; 0.02 is what transformers' models start their embeddings from.
        at: selectors of attention modules (`attn`; `cross` for the decoder's attention to the encoder).
    """

    length: int = 10
    init_std: float = 0.02
    at: tuple[str, ...] = ("attn",)
    taxonomy: ClassVar[Taxonomy] = "addition"
    acts_on: ClassVar[tuple[str, ...]] = ("attn",)
    identity_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.length < 1 or self.init_std < 0:
            raise ConfigError(
                f"prefix: got length={self.length}, init_std={self.init_std}; length >= 1, init_std >= 0 are possible"
            )

    def selectors(self) -> Sequence[str]:
        return self.at

    def params(self, site: Site) -> Mapping[str, Param]:
        if not site.heads:
            raise SiteError(f"prefix: the number of heads at {site.name} is not known; prefix tuning cannot act there")
        sizes = {"k": site.outputs // site.heads, "v": (site.values or site.outputs) // site.heads}
        return {n: Param((site.heads, self.length, size), normal(self.init_std)) for n, size in sizes.items()}

    def key_value(self, w: Weights, site: Site, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return in_front(w["k"], k), in_front(w["v"], v)
