"""Tags of words as spans of words and back: IO, BIO (IOB2), IOB1, BMES (BMEO), BIOES and BILOU.

A span begins at a tag that says so (B, S, U), and at any other tag behind "O", behind the end of one (E, S, L, U) or
behind another label. It goes on to the next such tag, or to the next "O". That reads sequences that are not well
formed as conlleval does (Tjong Kim Sang & Buchholz 2000): an I without its B begins a span, an E without its B is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from deltaprompt.errors import ConfigError, DataError, nearest
from deltaprompt.types import Span

OUTSIDE: Final = "O"
SCHEMES: Final = {  # the letters of a span's first word, of those between, of its last, and of its only one
    "io": "IIII",
    "bio": "BIIB",
    "iob2": "BIIB",
    "iob1": "IIII",
    "bmes": "BMES",
    "bmeo": "BMES",
    "bioes": "BIES",
    "bilou": "BILU",
}
LOOSE: Final = ("io", "iob1")  # which also have B: where a span follows one of the same label
KNOWN: Final = frozenset("BIMESLU")
BEGIN: Final = frozenset("BSU")
END: Final = frozenset("OESLU")  # behind which no span goes on
Places = Callable[[int], str]  # where the n-th tag stands


def nth(number: int) -> str:
    """The place of a tag in a sequence."""
    return f"tag {number + 1}"


def check_scheme(scheme: str) -> None:
    """Raises unless it is the name of one."""
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme={scheme!r} is no scheme of tags{nearest(scheme, SCHEMES)}")


def scheme_of(sequences: Iterable[Sequence[str]]) -> str:
    """The scheme of tags, told by their letters; IO where no tag has one.

    B and I alone are IOB1 where an I begins a span, and every B follows a span of its own label; else BIO.
    """
    letters, opened, begun = set[str](), False, False
    for tags in sequences:
        before = OUTSIDE
        for tag in tags:
            letter, apart = _letter(tag), tag[2:] != before[2:]
            letters.add(letter)
            opened |= letter == "B" and apart
            begun |= letter == "I" and apart
            before = tag
    if not letters & KNOWN:
        return "io" if "" in letters else "bio"
    if letters & {*"LU"}:
        return "bilou"
    if letters & {*"MES"}:
        return "bmes" if "M" in letters or "I" not in letters else "bioes"
    return "iob1" if begun and not opened else "bio"


def spans_of(tags: Sequence[str], scheme: str, at: Places = nth) -> list[Span]:
    """The spans, in words, that tags tell.

    In IO a tag is its label, and B- and I- are taken off where they are there.

    Args:
        tags: of one text.
        scheme: a key of `SCHEMES`.
        at: where the n-th tag stands, for errors.

    Raises:
        DataError: a tag is none of the scheme.
    """
    check_scheme(scheme)
    found, before = list[Span](), (OUTSIDE, "")
    for i, tag in enumerate(tags):
        letter, label = now = _parts(tag, scheme, at, i)
        if letter not in BEGIN and before[0] not in END and label == before[1]:
            found[-1] = Span(found[-1].start, i + 1, label)
        elif letter != OUTSIDE:
            found.append(Span(i, i + 1, label))
        before = now
    return found


def tags_of(spans: Iterable[Span], count: int, scheme: str) -> list[str]:
    """The tags of `count` words with these spans, which are in words.

    IO cannot tell neighbours of one label apart: they become one.

    Raises:
        DataError: a span is not among the words, or two have a word in common.
    """
    check_scheme(scheme)
    tags = [OUTSIDE] * count
    for span, before in in_order(spans, count, "words"):
        first, between, last, only = tuple(SCHEMES[scheme])
        if scheme == "iob1" and before is not None and before[1:] == (span.start, span.label):
            first = only = "B"
        length = span.end - span.start
        letters = only if length == 1 else first + between * (length - 2) + last
        tags[span.start : span.end] = [span.label if scheme == "io" else f"{one}-{span.label}" for one in letters]
    return tags


def malformed(tags: Sequence[str], spans: Sequence[Span], scheme: str) -> list[tuple[int, str]]:
    """The places of tags that the scheme would not have, and what it has there; of IO none.

    Args:
        tags: as they were written.
        spans: as they were read.
        scheme: a key of `SCHEMES`.
    """
    if scheme == "io":
        return []
    right = tags_of(spans, len(tags), scheme)
    return [(i, wanted) for i, (tag, wanted) in enumerate(zip(tags, right, strict=True)) if tag != wanted]


def in_order(spans: Iterable[Span], length: int, what: str, at: str = "") -> list[tuple[Span, Span | None]]:
    """Spans in the order of the text, each with the one before.

    Raises:
        DataError: a span is empty, not within the text, or overlaps another.
    """
    ordered, start = sorted(spans), f"{at}: " if at else ""
    pairs = list(zip(ordered, (None, *ordered), strict=False))
    for span, before in pairs:
        if not 0 <= span.start < span.end <= length:
            raise DataError(
                f"{start}the span {_told(span)} is not in a text of {length} {what}; start is 0 or more, end is behind "
                f"it and {length} at most"
            )
        if before is not None and span.start < before.end:
            raise DataError(f"{start}the spans {_told(before)} and {_told(span)} overlap; keep one of them")
    return pairs


def _told(span: Span) -> str:
    return f"{span.start} to {span.end}, {span.label!r:.40},"


def _letter(tag: str) -> str:
    """What a tag says but its label: one of `KNOWN`, or "O"; "" where it is a label alone."""
    if tag == OUTSIDE:
        return OUTSIDE
    return tag[0] if tag[1:2] == "-" and len(tag) > 2 and tag[0] in KNOWN else ""


def _parts(tag: str, scheme: str, at: Places, number: int) -> tuple[str, str]:
    """A tag's letter and its label."""
    letter = _letter(tag)
    possible = {*SCHEMES[scheme], *("B" if scheme in LOOSE else "")}
    if letter == OUTSIDE:
        return OUTSIDE, ""
    if letter in possible:
        return letter, tag[2:]
    if scheme == "io" and tag:
        return "I", tag
    listed = ", ".join(f"{one}-…" for one in sorted(possible))
    raise DataError(
        f"{at(number)}: {tag!r:.40} is no tag of the scheme {scheme}; possible: {OUTSIDE}, {listed}; mend the tag, or "
        f"name another scheme ({', '.join(SCHEMES)})"
    )
