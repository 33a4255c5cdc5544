"""Relation rows: a text in which two mentions are marked, the head and the tail, and how these are related.

- {"text", "head": {"start", "end"}, "tail": {"start", "end"}, "relation"}: where they are, in characters.
- {"text", "head", "tail", "relation"}: their words, which are looked for in the text (FinRE, SanWen).
- {"tokens", "head": {"pos"}, "tail": {"pos"}, "relation"}, or as FewRel has it {"tokens", "h": [name, id, [[…]]], "t"}:
  the numbers of their tokens; of several mentions the first. A .json file may be an object of relation = its rows.
- {"text": "The <e1>fire</e1> caused <e2>damage</e2>.", "relation"}, and the .txt files of SemEval-2010 task 8.

An example has the fields "text", "head" and "tail", "marked", which is the text with markers around both mentions, and
the same in pieces: "before", "first", "between", "second" and "after", where "first" is the mention that comes first,
with its markers. Its spans have the labels "head" and "tail", its label is the relation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Final

from deltaprompt.data.formats import HUB, Row, json_in, lines_of, refuse_split, row_of, rows_of
from deltaprompt.data.letters import marks
from deltaprompt.data.readers import Missing, filled, listing, one_text, place, texts_in, written
from deltaprompt.data.tagged import CHARACTER, joined, joiner_of
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example, Span

HEAD, TAIL = SIDES = "head", "tail"
MARKERS: Final = ("<e1> ", " </e1>", "<e2> ", " </e2>")  # around the head, around the tail
TAGS: Final = ("<e1>", "</e1>", "<e2>", "</e2>")  # as SemEval writes them
SHORT: Final = {HEAD: "h", TAIL: "t"}  # FewRel's names
INNER: Final = re.compile(r"(<e[12]>)\s+|\s+(</e[12]>)")  # blanks that stand within tags
NUMBERED: Final = re.compile(r"\d+\t\s*\"?(.*?)\"?\s*$")
FORMS: Final = (
    "possible: text with head and tail, their words or {start, end}; tokens with head and tail, {pos}, or h and t; "
    "text with <e1>…</e1> and <e2>…</e2>"
)
Place = tuple[int, int]


def read_relations(
    path_or_name: str | os.PathLike[str],
    split: str | None = None,
    limit: int | None = None,
    labelled: bool = True,
    label: str = "relation",
    markers: Sequence[str] = MARKERS,
    on_empty: Callable[[str], None] | None = None,
) -> list[Example]:
    """One example a row, with both mentions as spans and marked in the text; see the module for the forms of rows.

    Args:
        path_or_name: a file in any format that `read` knows, a .txt file of SemEval's, or `hf:name`.
        split: of a dataset on the Hub.
        limit: keeps the first rows.
        labelled: whether relations are read.
        label: the column of the relation.
        markers: what stands in "marked" before and behind the head, and before and behind the tail.
        on_empty: where a row has no relation, or a mention is not in its text, it is left out, and this is told why; an
            error where not given.

    Raises:
        DataError: a row has none of the forms, or a mention is not in the text.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: a limit is 1 row or more; leave it out to read all")
    if len(markers) != 4 or isinstance(markers, str):
        raise ConfigError(f"markers={markers!r:.60}: four are possible, around the head and around the tail: {MARKERS}")
    rows = _rows(path_or_name, split, label)
    found = list(islice(_examples(rows, label if labelled else None, tuple(markers), on_empty), limit))
    if not found:
        raise DataError(f"{path_or_name}: there are no relations; at least one is needed")
    return found


def relation(
    text: str,
    head: Place,
    tail: Place,
    label: str | None = None,
    markers: Sequence[str] = MARKERS,
    words: tuple[Place, ...] = (),
) -> Example:
    """An example of two mentions, of which the (start, end) in the text are given.

    Where they overlap both are in the field "first", and "between" and "second" are empty.

    Raises:
        DataError: a mention is empty, or not within the text.
    """
    for side, place_ in zip(SIDES, (head, tail), strict=True):
        if not 0 <= place_[0] < place_[1] <= len(text):
            raise DataError(f"the {side} is at {place_}, which is nothing in a text of {len(text)} characters")
    one, other = sorted([(head, markers[0], markers[1]), (tail, markers[2], markers[3])], key=lambda mark: mark[0])
    (start, end), (next_start, stop) = one[0], other[0]
    if next_start < end:
        end = next_start = stop = max(end, stop)
        first, second = _marked(text, (start, end), [one, other]), ""
    else:
        first, second = _marked(text, (start, end), [one]), _marked(text, (next_start, stop), [other])
    pieces = {"before": text[:start], "first": first, "between": text[end:next_start], "second": second}
    pieces["after"] = text[stop:]
    named = {"text": text, HEAD: text[slice(*head)], TAIL: text[slice(*tail)], "marked": "".join(pieces.values())}
    return Example({**named, **pieces}, label, spans=tuple(sorted((Span(*head, HEAD), Span(*tail, TAIL)))), words=words)


def _marked(text: str, part: Place, marks: Sequence[tuple[Place, str, str]]) -> str:
    """A part of a text with markers around places in it, rightly nested."""
    signs = list[tuple[int, int, int, str]]()
    for number, ((start, end), opening, closing) in enumerate(marks):
        signs += [(start, start - end, number, opening), (end, end - start, -number, closing)]
    made, at = "", part[0]
    for place_, *_, sign in sorted(signs):
        made, at = made + text[at:place_] + sign, place_
    return made + text[at : part[1]]


def _rows(source: str | os.PathLike[str], split: str | None, label: str) -> Iterator[Row]:
    name = str(source).lower().removesuffix(".gz")
    if name.startswith(HUB) or not name.endswith((".txt", ".json")):
        return rows_of(source, split)
    refuse_split(source, split)
    return _of_lines(source, label) if name.endswith(".txt") else _of_json(source, label)


def _of_json(source: str | os.PathLike[str], label: str) -> Iterator[Row]:
    """Rows of a list, or of an object of relation = list."""
    given = json_in(Path(source))
    groups = given if isinstance(given, dict) else {"": given}
    for name, rows in groups.items():
        at = f"{source}, {name!r}" if name else str(source)
        if not isinstance(rows, list):
            raise DataError(
                f"{at}: holds {rows!r:.60}; a .json file is a list of rows, or an object of relation = list"
            )
        for number, one in enumerate(rows, 1):
            yield row_of(f"{at}, row {number}", {label: name, **one} if name and isinstance(one, dict) else one)


def _of_lines(source: str | os.PathLike[str], label: str) -> Iterator[Row]:
    """SemEval's records (a number and a text, the relation, a comment), or lines of head, tail, relation and text."""
    at, values = "", dict[str, object]()
    for number, line in lines_of(source):
        cells, numbered = line.rstrip("\r\n").split("\t"), NUMBERED.match(line)
        if len(cells) == 4:
            yield Row(f"{source}, line {number}", dict(zip((HEAD, TAIL, label, "text"), cells, strict=True)))
        elif numbered:
            if values:
                yield Row(at, values)
            at, values = f"{source}, line {number}", {"text": numbered[1]}
        elif values and label not in values and line.strip():
            values[label] = line.strip()
        elif line.strip() and not line.startswith("Comment"):
            raise DataError(
                f'{source}, line {number}: got {line.strip()!r:.60}; possible: a number, a tab and "a <e1>text</e1> in '
                'quotes", the relation in the next line; or head, tail, relation and text with tabs between'
            )
    if values:
        yield Row(at, values)


def _examples(
    rows: Iterator[Row], label: str | None, markers: Sequence[str], on_empty: Callable[[str], None] | None
) -> Iterator[Example]:
    for row in rows:
        try:
            yield _example(row, label, markers)
        except Missing as missing:
            if on_empty is None:
                raise
            on_empty(str(missing))


def _example(row: Row, label: str | None, markers: Sequence[str]) -> Example:
    text, head, tail, words = _of_tokens(row) if "tokens" in row.values else (*_of_text(row), ())
    found = relation(text, head, tail, None if label is None else filled(row, label, "label"), markers, words)
    used = ("", "text", "tokens", label, *SIDES, *SHORT.values())
    others = {name: written(row, name) for name in row.values if name.split(".")[0] not in used}
    more = {name: text for name, text in others.items() if text is not None}
    return replace(found, fields={**more, **found.fields}) if more else found


def _of_tokens(row: Row) -> tuple[str, Place, Place, tuple[Place, ...]]:
    """The text, where its mentions are, and its words."""
    tokens = texts_in(row, "tokens")
    text, places = joined(tokens, joiner_of([tokens]))
    found = list[Place]()
    for side in SIDES:
        given = row.values.get(f"{side}.pos", row.values.get(SHORT[side]))
        given = given[2] if isinstance(given, list) and len(given) == 3 and isinstance(given[0], str) else given
        given = given[0] if isinstance(given, list) and given and isinstance(given[0], list) else given
        if not isinstance(given, list) or not given or not all(n in range(len(tokens)) for n in given):
            raise DataError(
                f"{row.at}: the tokens of the {side} are {given!r:.60}; numbers from 0 to {len(tokens) - 1} are "
                f"possible, in {side}.pos or {SHORT[side]}; {FORMS}"
            )
        found.append((places[min(given)][0], places[max(given)][1]))
    return text, found[0], found[1], places


def _of_text(row: Row) -> tuple[str, Place, Place]:
    """The text, and where its mentions are."""
    if not isinstance(row.values.get("text"), str):
        raise DataError(f"{row.at}: no text{listing('text', row.values)}; {FORMS}")
    text = one_text(row, "text")
    if all(tag in text for tag in TAGS):
        return _of_tags(row.at, text)
    if all(f"{side}.{end}" in row.values for side in SIDES for end in ("start", "end")):
        head, tail = (_place(row, side, len(text)) for side in SIDES)
        return text, head, tail
    if all(isinstance(row.values.get(side), str) for side in SIDES):
        return text, *_looked_for(row, text)
    raise DataError(f"{row.at}: no mentions in the columns {', '.join(row.values):.80}; {FORMS}")


def _place(row: Row, side: str, length: int) -> Place:
    columns = (f"{side}.start", f"{side}.end")
    start, end = (place(row.values[name], length, f"{row.at}: column {name!r}") for name in columns)
    if start >= end:
        raise DataError(f"{row.at}: the {side} is from {start} to {end}, which is nothing; its end is behind its start")
    return start, end


def _looked_for(row: Row, text: str) -> tuple[Place, Place]:
    """Where two mentions first are in a text without overlapping, or where each first is, if they always do.

    Whole words are preferred: "cat" is in "concatenated" only where it stands nowhere by itself.
    """
    words = [filled(row, side, side) for side in SIDES]
    places = [[(m.start(), m.start() + len(one)) for m in re.finditer(f"(?={re.escape(one)})", text)] for one in words]
    for side, one, own in zip(SIDES, words, places, strict=True):
        if not own:
            raise Missing(
                f"{row.at}: the {side} {one!r:.40} is not in the text {text!r:.60}; write it as it stands there, or "
                "remove the row"
            )
    whole = [[place for place in own if _is_whole(text, place)] or own for own in places]
    apart = ((h, t) for own in (whole, places) for h, t in product(*own) if h[1] <= t[0] or t[1] <= h[0])
    return next(apart, (whole[0][0], whole[1][0]))


def _is_whole(text: str, place: Place) -> bool:
    """Whether no letter, digit or mark of an alphabet stands beside a place; a Chinese character may be a word."""
    start, end = place
    beside = (text[max(start - 1, 0) : start], text[end : end + 1])
    return not any(re.match(rf"[^\W_]|{marks()}", sign) and not CHARACTER.match(sign) for sign in beside)


def _of_tags(at: str, text: str) -> tuple[str, Place, Place]:
    """A text without SemEval's tags, and what stood between them."""
    bare, ends = "", dict[str, int]()
    for piece in re.split("(</?e[12]>)", INNER.sub(lambda found: found[1] or found[2], text)):
        if piece in ends:
            raise DataError(f"{at}: {piece} stands twice in {text!r:.60}; each of {', '.join(TAGS)} stands once")
        if piece in TAGS:
            ends[piece] = len(bare)
        else:
            bare += piece
    (a, b), (c, d) = ((ends[tag] for tag in tags) for tags in (TAGS[:2], TAGS[2:]))
    if a >= b or c >= d:
        raise DataError(f"{at}: a mention is empty in {text!r:.60}; write words between {TAGS[0]} and {TAGS[1]}")
    return bare, (a, b), (c, d)
