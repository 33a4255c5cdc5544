"""Entity rows: one example a mention, with the fields "left", "mention" and "right", and "text", the three in a row.

- {"text", "start", "end"}: where the mention is, in characters.
- {"left", "mention", "right"}: texts, or lists of tokens.
- {"tokens", "tags"}, or a file of tokens and tags in columns, a blank line behind each sentence (Few-NERD's form): a
  run of one tag is a mention of that type, and "B-" begins one. "B-" and "I-" are no part of a type, "O" is none. Tags
  may also be of a scheme that marks ends (BMES, BIOES, BILOU); the tags of all rows tell it.
- Between tokens stand blanks, or nothing where each is a character and some are Chinese.
- A list in the column "labels" (or "label") holds the types of a mention, a text there its one type. The columns
  "entity" and "coarse", which tell who is mentioned and roughly what that is, are fields too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Final

from deltaprompt.data.columns import in_columns, sentences
from deltaprompt.data.formats import Row, refuse_split, rows_of
from deltaprompt.data.readers import Missing, answered, one_text, place, texts_in
from deltaprompt.data.tagged import joined, joiner_of
from deltaprompt.data.tags import check_scheme, nth, scheme_of, spans_of
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example

BLANK: Final = "[BLANK]"  # PLET's word for a mention that is hidden
LABELS: Final = ("labels", "label")
AROUND: Final = ("left", "mention", "right")
ENTITY, COARSE = MORE = "entity", "coarse"  # columns that rows may have: of whom a mention is, and roughly of what


def read_entities(
    path_or_name: str | os.PathLike[str],
    split: str | None = None,
    limit: int | None = None,
    labelled: bool = True,
    on_empty: Callable[[str], None] | None = None,
    label: str | None = None,
    scheme: str | None = None,
) -> list[Example]:
    """One example a mention; see the module for the forms of rows.

    Args:
        path_or_name: a file in any format that `read` knows, a .txt, .conll, .bio or .iob file of tokens and tags, or
            `hf:name`.
        split: of a dataset on the Hub.
        limit: keeps the first mentions.
        labelled: whether types are read.
        on_empty: where a mention has no type it is left out, and this is told why; an error where not given.
        label: the column of the types; "labels" or "label" where not given.
        scheme: of the tags, see `read_tagged`; told by those of all rows where not given.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: a limit is 1 mention or more; leave it out to read all")
    if scheme is not None:
        check_scheme(scheme)
    columns = (label,) if label else LABELS
    found = list(islice(_mentions(list(_rows(path_or_name, split)), columns, labelled, on_empty, scheme), limit))
    if not found:
        raise DataError(f"{path_or_name}: there are no mentions; at least one is needed")
    return found


def mention(left: str, words: str, right: str, label: str | None = None, labels: tuple[str, ...] = ()) -> Example:
    """An example of a mention between two texts, with the blanks that stand between them."""
    fields = {"left": left, "mention": words, "right": right, "text": f"{left}{words}{right}"}
    return Example(fields, label, labels=labels)


def hidden(example: Example, blank: str = BLANK) -> Example:
    """The same, the mention hidden wherever it is a field: a model has to go by what stands around it (PLET)."""
    given = example.fields
    fields = {**given, "mention": blank, "text": f"{given['left']}{blank}{given['right']}"}
    return Example(fields, example.label, labels=example.labels)


def _rows(source: str | os.PathLike[str], split: str | None) -> Iterator[Row]:
    if not in_columns(source):
        return rows_of(source, split)
    refuse_split(source, split)
    found = sentences(source)
    return (Row(f"{source}, line {s.first}", {"tokens": s.tokens, "tags": s.tags}) for s in found)


def _mentions(
    rows: Sequence[Row],
    columns: Sequence[str],
    labelled: bool,
    on_empty: Callable[[str], None] | None,
    scheme: str | None,
) -> Iterator[Example]:
    scheme = scheme or _scheme(texts_in(row, "tags") for row in rows if _is_tagged(row))
    joiner = joiner_of(words for row in rows for words in _tokens(row))
    for row in rows:
        try:
            yield from (
                _of_tags(row, labelled, scheme, joiner)
                if _is_tagged(row)
                else [_of_row(row, columns, labelled, joiner)]
            )
        except Missing as missing:
            if on_empty is None:
                raise
            on_empty(str(missing))


def _is_tagged(row: Row) -> bool:
    return {"tokens", "tags"} <= row.values.keys()


def _tokens(row: Row) -> list[list[str]]:
    """The lists of tokens that a row's text is made of."""
    columns = ("tokens",) if _is_tagged(row) else ("left", "right") if row.values.keys() >= {*AROUND} else ()
    return [texts_in(row, column) for column in columns if isinstance(row.values[column], list)]


def _scheme(tags: Iterable[Sequence[str]]) -> str:
    """The scheme of the tags of all rows; IO where no letter but B and I is used, which it reads as BIO does."""
    told = scheme_of(tags)
    return "io" if told in ("bio", "iob1") else told


def _of_row(row: Row, columns: Sequence[str], labelled: bool, joiner: str) -> Example:
    """The one mention of a row."""
    values = row.values
    if values.keys() >= {*AROUND}:
        left, words, right = _around(row, joiner)
    elif {"text", "start", "end"} <= values.keys():
        text = one_text(row, "text")
        start, end = (place(values[name], len(text), f"{row.at}: column {name!r}") for name in ("start", "end"))
        left, words, right = text[:start], text[start:end], text[end:]
    else:
        raise DataError(
            f"{row.at}: no mention in the columns {', '.join(values)}; possible: text, start, end; left, mention, "
            "right; tokens, tags"
        )
    if not words.strip():
        raise DataError(f"{row.at}: the mention is blank; mend its place in the text, or remove the row")
    column = next((name for name in columns if name in values), columns[0])
    label, labels = answered(row, column) if labelled else (None, ())
    more = {name: str(values[name]) for name in MORE if isinstance(values.get(name), str)}
    return Example({**mention(left, words, right).fields, **more}, label, labels=labels)


def _of_tags(row: Row, labelled: bool, scheme: str, joiner: str) -> Iterator[Example]:
    tokens, tags = texts_in(row, "tokens"), texts_in(row, "tags")
    if len(tokens) != len(tags):
        raise DataError(f"{row.at}: {len(tokens)} tokens and {len(tags)} tags; each token has one")
    text, places = joined(tokens, joiner)
    for first, last, kind in spans_of(tags, scheme, partial(_tag, row.at)):
        start, end = places[first][0], places[last - 1][1]
        yield mention(text[:start], text[start:end], text[end:], kind if labelled else None)


def _tag(at: str, number: int) -> str:
    return f"{at}: {nth(number)}"


def _around(row: Row, joiner: str) -> tuple[str, str, str]:
    """A mention between its contexts, with what stands between them."""
    left, words, right = _context(row, "left", joiner), one_text(row, "mention"), _context(row, "right", joiner)
    between = [joiner if isinstance(row.values[column], list) else None for column in ("left", "right")]
    return left + _between(left, words, between[0]), words, _between(words, right, between[1]) + right


def _context(row: Row, column: str, joiner: str) -> str:
    value = row.values[column]
    return joiner.join(texts_in(row, column)) if isinstance(value, list) else one_text(row, column) if value else ""


def _between(before: str, after: str, joiner: str | None) -> str:
    """What is put between two texts: what stands between tokens, or a blank where two words would become one."""
    if not before or not after:
        return ""
    return (" " if before[-1].isalnum() and after[0].isalnum() else "") if joiner is None else joiner
