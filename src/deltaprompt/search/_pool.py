"""A pool of templates: shapes such as `{text} <preposition> <noun> {mask}.`, times the words of each part of speech.

Nothing is made before it is drawn: a pool knows how many templates it has, and any of them by its number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from random import Random
from typing import Final

from deltaprompt.errors import ConfigError, nearest
from deltaprompt.templates import Literal

SLOT: Final = re.compile(r"<([a-z_]+)>")


@dataclass(frozen=True)
class Pool:
    """Templates of several shapes.

    Args:
        shapes: templates with `<part>` where a word of that part of speech stands.
        words: part of speech -> words.
    """

    shapes: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ConfigError("there are no shapes to draw templates from; give one, such as '{text} <noun>: {mask}.'")
        if twice := [shape for i, shape in enumerate(self.shapes) if shape in self.shapes[:i]]:
            raise ConfigError(f"the shape {twice[0]!r} is there twice; give it once")
        for part, words in self.words.items():
            if not words:
                raise ConfigError(f"the part of speech {part!r} has no words; give some, or leave it out")
            if twice := [word for i, word in enumerate(words) if word in words[:i]]:
                raise ConfigError(f"the part of speech {part!r} has the word {twice[0]!r} twice; give it once")
        for shape in self.shapes:
            for part in SLOT.findall(shape):
                if part not in self.words:
                    raise ConfigError(
                        f"the shape {shape!r} has <{part}>, and there are no words of that part"
                        f"{nearest(part, self.words)}"
                    )

    def size(self, shape: str) -> int:
        """The number of templates of a shape."""
        return prod(len(self.words[part]) for part in SLOT.findall(shape))

    def __len__(self) -> int:
        return sum(map(self.size, self.shapes))

    def template(self, shape: str, number: int) -> str:
        """The template of that number among those of a shape; the last word varies the fastest."""
        chosen: list[str] = []
        for part in reversed(SLOT.findall(shape)):
            number, at = divmod(number, len(self.words[part]))
            chosen.append(str(Literal(self.words[part][at])))
        return SLOT.sub(lambda _: chosen.pop(), shape)

    def drawn(self, size: int, seed: int) -> list[tuple[str, str]]:
        """(template, its shape) of `size` different ones: a shape after the other in turn, each in its own order."""
        if size > len(self):
            raise ConfigError(f"size = {size:,}, and the pool has {len(self):,} templates; take fewer, or add words")
        chance = Random(seed)
        each = [[(shape, n) for n in _order(self.size(shape), chance)] for shape in self.shapes]
        turns = (one for turn in zip_longest(*each) for one in turn if one is not None)
        return [(self.template(shape, n), shape) for (shape, n), _ in zip(turns, range(size), strict=False)]


def _order(count: int, chance: Random) -> Iterator[int]:
    """The numbers below `count`, shuffled by one random number each."""
    keys = [chance.random() for _ in range(count)]
    return iter(sorted(range(count), key=keys.__getitem__))
