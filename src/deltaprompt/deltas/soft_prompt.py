"""y' = P[id − V] for virtual tokens, ids past a vocabulary of V, put in front of the text (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import VirtualTokens
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, normal


@dataclass(frozen=True)
class SoftPrompt(VirtualTokens):
    """Prompt tuning: length · d parameters.

    Args:
        length: virtual tokens; the features put as many in front of every text.
        init_std: of the normal numbers they start from; 0.02 is what transformers' models start their embeddings from.
        first: the row of the first one among all virtual tokens of the task; set by the task, not by hand.
        at: selector of the embedding; the encoder's where there are two.
    """

    def __post_init__(self) -> None:
        if self.length < 1 or self.init_std < 0:
            raise ConfigError(
                f"soft_prompt: got length={self.length}, init_std={self.init_std}; "
                "length >= 1, init_std >= 0 are possible"
            )

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"p": Param((self.length, site.outputs), normal(self.init_std))}
