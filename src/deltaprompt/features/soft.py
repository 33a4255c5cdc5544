"""Blocks of trainable tokens in a template, and the networks that may compute them."""

from __future__ import annotations

from typing import Final, NamedTuple

from deltaprompt.templates import ENCODERS, Encoder

NETWORKS: Final[tuple[Encoder | None, ...]] = (None, *ENCODERS.values())  # that compute soft tokens; None: no network


class SoftBlock(NamedTuple):
    """A block of trainable tokens: its name, the words it begins from, its tokens, and what they are rows of."""

    key: str
    words: str | None
    size: int
    tied: bool = False
    encoder: Encoder | None = None

    @property
    def rows(self) -> int:
        """The rows that train: one for all its tokens, or one each."""
        return 1 if self.tied else self.size
