"""A file or a Hub dataset is rows of named columns; a row becomes an `Example` of text fields and a label.

- The column `text` becomes the field "text"; `fields={"premise": "sentence1"}` maps further fields to columns. A row
  where one of these is missing (no value, blank, NaN) is an error. `text=None` asks for no text column.
- A list of words in a column that is asked for (JSON, Parquet) is joined by blanks.
- Every other column that holds a string, number or boolean is a field under its own name; the rest is left out. What
  an object within a row holds has a dotted name: `{"meta": {"word": "a"}}` is the column "meta.word".
- The column `label` is the label, never a field (unless `fields` maps one to it). 1.0 is written "1", True "true". A
  list there (JSON, Parquet) holds labels that are right together.

Errors name the line a record starts on (.csv, .tsv, .jsonl, .txt), else the row's number. Text is UTF-8, BOM or not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice

from deltaprompt.data.formats import Row, Rows, rows_of, stdin_rows
from deltaprompt.errors import ConfigError, DataError, nearest
from deltaprompt.types import Example

STDIN = "-"
_NAME_ONE = {
    "field 'text'": "name one with text=… (--text, or --field text=…), or pass text=None where the "
    "template has no {text}",
    "label": "name one with label=… (--label), or read without labels: labelled=False",
}


class Missing(DataError):
    """A row lacks a value that it must have; the column is there."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """Which columns become what."""

    text: str | None
    fields: Mapping[str, str]
    label: str | None = None
    labelled: bool = False

    def columns(self, row: Row) -> dict[str, str]:
        """The column of each field that this row must have."""
        text = "text" if row.plain or (self.text is None and "text" in row.values) else self.text
        return {**({} if text is None else {"text": text}), **self.fields}


class _Alike:
    """That the labels of a file are written alike: all texts or all numbers, and no two differ in blanks alone."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}  # and where each was first seen
        self.written: dict[str, str] = {}  # by the label without the blanks around it

    def check(self, row: Row, column: str, labels: Iterable[str]) -> None:
        """Raises where a row's labels are unlike those before."""
        value = row.values[column]
        for one in value if isinstance(value, list) else [value]:
            self.kinds.setdefault(_kind(one), row.at)
        if len(self.kinds) > 1:
            (before, at), (now, _) = self.kinds.items()
            raise DataError(
                f"{row.at}: the label {value!r:.60} is {now}, and that of {at} {before}; write all as texts"
            )
        for label in labels:
            known = self.written.setdefault(label.strip(), label)
            if known != label:
                raise DataError(f"{row.at}: the label {label!r:.60} is {known!r:.60} but for blanks; write both alike")


def _kind(label: object) -> str:
    return "a text" if isinstance(label, str) else "true or false" if isinstance(label, bool) else "a number"


def read(
    path_or_name: str | os.PathLike[str],
    text: str | None = "text",
    label: str = "label",
    fields: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    labelled: bool = True,
    on_empty: Callable[[str], None] | None = None,
) -> list[Example]:
    """The rows of a file (its format by its suffix), or of a `datasets` dataset named "hf:ag_news" or "hf:glue/sst2".

    A name on the Hub is `hf:dataset`, `hf:dataset/config` or `hf:owner/dataset/config`, and needs a `split`; integers
    in its class columns become class names. `limit` keeps the first rows. With `labelled=False` no label is read.
    A row without its text or its label is an error; with `on_empty` it is left out, and that is told what was missing.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: a limit is 1 row or more; leave it out to read all")
    asked = _Asked(text, fields or {}, label, labelled)
    return list(islice(_examples(str(path_or_name), rows_of(path_or_name, split), asked, on_empty), limit))


def read_texts(
    path_or_dash: str | os.PathLike[str], text: str | None = None, fields: Mapping[str, str] | None = None
) -> Iterator[Example]:
    """Unlabelled rows, one at a time, of a file in any of the formats, or of standard input for "-".

    Standard input is JSON lines if its first line is a JSON object, else plain text. In plain text (there and in .txt)
    each line is the field "text", whatever `text` says; blank lines may end it, but one before a text is an error, so
    that the n-th answer belongs to the n-th line. Without `text`, a column "text" is used where there is one.
    """
    asked = _Asked(text, fields or {})
    if path_or_dash == STDIN:
        return _examples("standard input", stdin_rows(), asked)
    return _examples(str(path_or_dash), rows_of(path_or_dash, split=None), asked)


def labels_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """The class names, sorted: as numbers where all of them are integers, else as strings."""
    names = set[str]()
    for number, example in enumerate(examples, 1):
        if not example.gold:
            raise DataError(f"example {number} has no label; read the data with labelled=True")
        names.update(example.gold)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _examples(
    source: str, rows: Rows, asked: _Asked, on_empty: Callable[[str], None] | None = None
) -> Iterator[Example]:
    """One example a row; no row at all is an error."""
    empty, alike = True, _Alike()
    for row in rows:
        try:
            example = _example(row, asked)
        except Missing as missing:
            if on_empty is None:
                raise
            on_empty(str(missing))
            continue
        empty = False
        if example.gold and asked.label is not None:
            alike.check(row, asked.label, example.gold)
        yield example
    if empty:
        raise DataError(f"{source}: there are no rows; at least one is needed")


def _example(row: Row, asked: _Asked) -> Example:
    """The asked fields, then the other columns that can be written as text, and the label."""
    columns = asked.columns(row)
    fields = {name: filled(row, column, f"field {name!r}") for name, column in columns.items()}
    used = {asked.label, "", *columns, *columns.values()}
    others = {name: written(row, name) for name in row.values if name not in used}
    fields |= {name: value for name, value in others.items() if value is not None}
    if not fields:
        raise DataError(f"{row.at}: no column holds a text{listing('text', row.values)}")
    label, several = answered(row, asked.label) if asked.labelled and asked.label is not None else (None, ())
    return Example(fields, label, labels=several)


def answered(row: Row, column: str) -> tuple[str | None, tuple[str, ...]]:
    """The label in a column, or where it holds a list the labels in it, each once."""
    given = row.values.get(column)
    if not isinstance(given, list):
        return _label(row, column), ()
    if not given:
        raise Missing(
            f"{row.at}: the label is missing: column {column!r} holds []; write one or more, or remove the row"
        )
    return None, tuple(dict.fromkeys(_label(Row(row.at, {column: one}), column) for one in given))


def _label(row: Row, column: str) -> str:
    """The label as a string, 1.0 (as a table with gaps stores 1) as "1"."""
    label, value = filled(row, column, "label"), row.values[column]
    return str(int(value)) if isinstance(value, (float, Decimal)) and value % 1 == 0 else label


def filled(row: Row, column: str, what: str) -> str:
    """The text in a column that must be there and hold one."""
    if column not in row.values:
        mend = _NAME_ONE.get(what, "name one with fields={'field': 'column'}")
        raise DataError(f"{row.at}: no column {column!r} for the {what}{listing(column, row.values)}; {mend}")
    text = _words(row, column) if what != "label" else None
    text = written(row, column) if text is None else text
    if text is None or not text.strip():
        got = f"column {column!r} holds {row.values[column]!r:.60}"
        raise Missing(f"{row.at}: the {what} is missing: {got}; put a text or a number there, or remove the row")
    return text


def _words(row: Row, column: str) -> str | None:
    """A list of words, joined by blanks; None for what is no such list."""
    given = row.values[column]
    words = [one for one in given if isinstance(one, str)] if isinstance(given, list) else []
    if not words or not isinstance(given, list) or len(words) < len(given):
        return None
    return sound(" ".join(words), f"{row.at}: column {column!r}")


def written(row: Row, column: str) -> str | None:
    """A string as it is, a number by `str`, a boolean as in JSON; None for what is missing or no single text."""
    value = row.values[column]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, Decimal)):
        return None if value != value else str(value)  # NaN alone differs from itself
    return sound(value, f"{row.at}: column {column!r}") if isinstance(value, str) else None


def one_text(row: Row, column: str) -> str:
    """The text in a column, which holds nothing else; it may be empty."""
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{row.at}: column {column!r} holds {value!r:.60}; a text is possible")
    return sound(value, f"{row.at}: column {column!r}")


def texts_in(row: Row, column: str) -> list[str]:
    """The list of texts in a column."""
    value = row.values[column]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise DataError(f"{row.at}: column {column!r} holds {value!r:.60}; a list of texts is possible")
    return [sound(one, f"{row.at}: column {column!r}") for one in value]


def place(value: object, length: int, at: str) -> int:
    """A place in a text of that length, written as a number or in digits; `at` says where it stands."""
    number = int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else -1
    if not 0 <= number <= length:
        raise DataError(f"{at} holds {value!r:.60}; a place in the text is 0 to {length}")
    return number


def sound(text: str, at: str) -> str:
    """`text`, if it can be written as UTF-8 and has no NUL, as tokenizers need."""
    if "\0" in text:
        raise DataError(f"{at}: holds a NUL character; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{at}: character {error.start + 1} is half of a surrogate pair; write it whole") from error
    return text


def listing(name: str, columns: Iterable[str]) -> str:
    """The columns there are, long names cut (a file without a header has texts there), and the nearest ones."""
    shown = [column if len(column) <= 40 else column[:39] + "…" for column in columns]
    hint = nearest(name, shown, limit=30)
    return f"{hint} (columns: {', '.join(shown[:30])})" if hint.startswith("; did you mean") else hint
