"""Texts -> rows whose words are read at their first tokens; a text that is too long is several windows that overlap."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Final

from deltaprompt.data.letters import marks
from deltaprompt.errors import ConfigError
from deltaprompt.features.codec import Codec, Tokens
from deltaprompt.features.features import AT_ONCE, Features
from deltaprompt.features.named_tokens import first_id
from deltaprompt.features.rows import Row
from deltaprompt.types import Example

IDEOGRAPHS: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # of Chinese and Japanese, each a word
OVERLAP: Final = 4  # windows share a quarter of their tokens

Range = tuple[int, int]  # the first character, and the one behind the last


@dataclass(frozen=True, slots=True)
class Window:
    """A row of a text, and which of its words are read there."""

    row: Row
    words: tuple[int, ...]  # their numbers in the text, one for each of the row's places


@dataclass(frozen=True, eq=False)
class Words:
    """How texts become rows of words.

    Args:
        features: of the template "{text}": the tokenizer, the room, virtual tokens in front.
        field: the texts.
    """

    features: Features
    field: str = "text"

    def windows(self, examples: Sequence[Example]) -> list[list[Window]]:
        """The windows of each example, whose words are known; one that the tokenizer leaves nothing of is in none."""
        found: list[list[Window]] = []
        for start in range(0, len(examples), AT_ONCE):
            some = examples[start : start + AT_ONCE]
            asks = [(self.text(example), True) for example in some]
            tokens = self._codec.encode(asks)
            found += [list(self._windows(tokens[ask], example.words)) for ask, example in zip(asks, some, strict=True)]
        return found

    def text(self, example: Example) -> str:
        """The text of an example."""
        if self.field not in example.fields:
            raise ConfigError(f"a row has no field {self.field!r}; it has {', '.join(example.fields) or 'none'}")
        return example.fields[self.field]

    def split(self, example: Example) -> Example:
        """An example with its words: those that the data gives, or runs of letters, and each sign and ideograph.

        Where the text's spans begin and end, words do.
        """
        if example.words:
            return example
        text, cuts = self.text(example), {end for span in example.spans for end in span[:2]}
        found = [apart for word in _word().finditer(text) for apart in parted(word.start(), word.end(), cuts)]
        return replace(example, words=tuple(found))

    @cached_property
    def _codec(self) -> Codec:
        return Codec(self.features.tokenizer)

    def _windows(self, tokens: Tokens, words: Sequence[Range]) -> Iterator[Window]:
        base, codec = self.features.soft_base, self._codec
        front = [*range(base, base + self.features.prepend_soft), *codec.before]
        room = self.features.max_length - len(front) - len(codec.after)
        if room < OVERLAP:
            raise ConfigError(f"max_length {self.features.max_length} leaves {room} tokens for a text; raise it")
        at = places(tokens, words)
        starts = window_starts(len(tokens.ids), room)
        inside: list[list[int]] = [[] for _ in starts]
        for word, place in enumerate(at):
            if place is not None:
                inside[best_window(place, starts, room, len(tokens.ids))].append(word)
        for start, own in zip(starts, inside, strict=True):
            ids = [*front, *tokens.ids[start : start + room], *codec.after] or [first_id(self.features.tokenizer)]
            read = [len(front) + int(at[word] or 0) - start for word in own]
            yield Window(Row(ids, read), tuple(own))


@cache
def _word() -> re.Pattern[str]:
    """An ideograph, letters, or a sign, each with its marks."""
    m, letter = marks(), rf"[^\W{IDEOGRAPHS}]"
    return re.compile(rf"[{IDEOGRAPHS}]{m}*|{letter}+(?:{m}+{letter}*)*|[^\w\s]{m}*")


def parted(start: int, end: int, cuts: Collection[int]) -> list[Range]:
    """A range cut where something begins or ends within it."""
    inner = sorted(cut for cut in cuts if start < cut < end)
    return list(zip([start, *inner], [*inner, end], strict=True))


def places(tokens: Tokens, words: Sequence[Range]) -> list[int | None]:
    """The token where each word is read: the first that has a character of it; none where no token has."""
    ends = [end for _, end in tokens.spans]
    found: list[int | None] = []
    for start, end in words:
        place = bisect_right(ends, start)  # the first token that ends behind the word's first character
        found.append(place if place < len(ends) and tokens.spans[place][0] < end else None)
    return found


def window_starts(tokens: int, room: int) -> list[int]:
    """Where windows of so much room begin in a text of so many tokens; the last ends where the text does."""
    if tokens <= room:
        return [0]
    step = room - room // OVERLAP
    return [*range(0, tokens - room, step), tokens - room]


def best_window(place: int, starts: Sequence[int], room: int, tokens: int) -> int:
    """The window in which a token has the most around it on its barer side; the text's own ends are no bar."""

    def context(number: int) -> int:
        start = starts[number]
        left = place - start if start else tokens
        right = start + room - 1 - place if start + room < tokens else tokens
        return min(left, right)

    there = [n for n, start in enumerate(starts) if start <= place < start + room]
    return max(there, key=context)
