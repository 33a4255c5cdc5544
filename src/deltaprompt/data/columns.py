"""Files of tokens in columns, as CoNLL has them: a line a token, its tag last, a blank line behind each sentence.

Between columns stand tabs, or blanks where a line has no tab. Every line has as many columns as the first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain
from typing import Final, NamedTuple

from deltaprompt.data.formats import HUB, lines_of
from deltaprompt.data.readers import sound
from deltaprompt.errors import DataError

LINES: Final = (".txt", ".conll", ".bio", ".iob", ".iob2", ".bmes", ".bioes")  # files of tokens and tags
DOCUMENT: Final = "-DOCSTART-"  # the token of CoNLL's lines between documents
GAP: Final = re.compile(r"[ \t]+")


class Sentence(NamedTuple):
    """The tokens and tags of a sentence, and the number of its first line; a line is a token."""

    first: int
    tokens: list[str]
    tags: list[str]


def in_columns(source: str | os.PathLike[str]) -> bool:
    """Whether the name of a source is one of such a file."""
    return not str(source).startswith(HUB) and str(source).lower().removesuffix(".gz").endswith(LINES)


def sentences(source: str | os.PathLike[str], tagged: bool = True) -> Iterator[Sentence]:
    """The sentences of a file.

    Args:
        source: the file, whatever its name; unpacked where it is a .gz.
        tagged: whether the last column is read; without it a line may be a token alone.

    Raises:
        DataError: a line has too few columns, another number of them than the first, or an empty one.
    """
    found, width, of = Sentence(0, [], []), 0, 0
    for number, line in chain(lines_of(source), [(0, "")]):
        cells, at = _cells(line), f"{source}, line {number}"
        if not cells or cells[0] == DOCUMENT:
            if found.tokens:
                yield found
            found = Sentence(0, [], [])
            continue
        _check(cells, line, at, tagged, width, of)
        width, of = len(cells), of or number
        found = found if found.tokens else Sentence(number, [], [])
        found.tokens.append(sound(cells[0], at))
        if tagged:
            found.tags.append(cells[-1])


def _cells(line: str) -> list[str]:
    """What stands in the columns of a line; nothing in a blank one."""
    if not line.strip():
        return []
    return [c.strip() for c in line.split("\t")] if "\t" in line.rstrip() else GAP.split(line.strip(" \t\r\n"))


def _check(cells: list[str], line: str, at: str, tagged: bool, width: int, of: int) -> None:
    if len(cells) < 1 + tagged or not cells[0] or (tagged and not cells[-1]):
        what = "a token and its tag, with a tab or blanks between" if tagged else "a token"
        raise DataError(f"{at}: got {line.strip()!r:.60}; a line is {what}, or is blank")
    if width not in (0, len(cells)):
        raise DataError(
            f"{at}: {len(cells)} columns where line {of} has {width}: {line.strip()!r:.60}; a line is a token, its tag "
            "last, and all have as many columns (where a token holds blanks: with tabs between)"
        )
