"""The longest text gives way first: field i keeps min(length_i, level) tokens, the level as high as the room allows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deltaprompt.errors import TemplateError
from deltaprompt.features.codec import Tokens
from deltaprompt.templates import Cut, Field, Literal


@dataclass(frozen=True, slots=True)
class Filled:
    """A text made of pieces: piece i ends at character `ends[i]`; its tokens are those of `text`."""

    pieces: tuple[Literal | Field, ...]
    text: str
    ends: list[int]


def fit(runs: Sequence[tuple[Filled, Tokens]], room: int, around: int) -> list[list[int]]:
    """The token ids of each run, cut to `room` in all; `around` tokens that are not text stand in the row too."""
    total = sum(len(tokens.ids) for _, tokens in runs)
    if total <= room:
        return [tokens.ids for _, tokens in runs]
    cuts = [(r, field, places) for r, (filled, tokens) in enumerate(runs) for field, places in may_go(filled, tokens)]
    lengths = [len(places) for _, _, places in cuts]
    stays = total - sum(lengths)
    if stays > room:
        raise _too_long(around + stays, around + room, runs)
    gone: list[set[int]] = [set() for _ in runs]
    for (r, field, places), share in zip(cuts, shares(lengths, room - stays), strict=True):
        gone[r].update(set(places).difference(kept(places, share, field.cut)))
    return [[i for at, i in enumerate(t.ids) if at not in out] for (_, t), out in zip(runs, gone, strict=True)]


def shares(lengths: Sequence[int], room: int) -> list[int]:
    """`min(length, level)` for each, with the highest level whose sum is at most `room` (water-filling)."""
    given = [0] * len(lengths)
    for rank, i in enumerate(sorted(range(len(lengths)), key=lambda i: lengths[i])):
        given[i] = min(lengths[i], room // (len(lengths) - rank))
        room -= given[i]
    return given


def kept(places: Sequence[int], count: int, cut: Cut) -> Sequence[int]:
    """The `count` places that stay when the tail, the head or the middle goes."""
    gone = len(places) - count
    if cut == "head":
        return places[gone:]
    head = count if cut == "tail" else (count + 1) // 2
    return [*places[:head], *places[head + gone :]]


def may_go(filled: Filled, tokens: Tokens) -> Iterator[tuple[Field, range]]:
    """Each field that may be cut, and its tokens: those with no character of anything else but a blank before them."""
    start = 0
    for piece, end in zip(filled.pieces, filled.ends, strict=True):
        if isinstance(piece, Field) and not piece.keep:
            yield piece, _inside(tokens.spans, start, end, filled.text)
        start = end


def _inside(spans: Sequence[tuple[int, int]], start: int, end: int, text: str) -> range:
    first = bisect_left(spans, start, key=lambda span: span[0])
    while first and spans[first - 1][1] > start and text[spans[first - 1][0] : start].isspace():
        first -= 1
    return range(first, bisect_right(spans, end, key=lambda span: span[1]))


def _too_long(needed: int, length: int, runs: Sequence[tuple[Filled, Tokens]]) -> TemplateError:
    keeps = [p.name for filled, _ in runs for p in filled.pieces if isinstance(p, Field) and p.keep]
    mend = f"; or let {', '.join(keeps)} be cut: drop |keep" if keeps else ""
    return TemplateError(
        f"what must stay of the prompt (all but the texts that may be cut) has {needed} tokens, and max_length is "
        f"{length}; raise max_length, or shorten the template's words or soft blocks{mend}"
    )
