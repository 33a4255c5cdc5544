"""A file or a Hub dataset is rows of named columns; a row becomes an `Example` of text fields and a label.

- The column `text` becomes the field "text"; `fields={"premise": "sentence1"}` maps further fields to columns. A row
  where one of these is missing (no value, blank, NaN) is an error. `text=None` asks for no text column.
- Every other column that holds a string, number or boolean is a field under its own name; the rest is left out.
- The column `label` is the label, never a field (unless `fields` maps one to it). 1.0 is written "1", True "true".

Errors name the line a record starts on (.csv, .tsv, .jsonl, .txt), else the row's number. Text is UTF-8, BOM or not.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from deltaprompt.errors import ConfigError, DataError, nearest
from deltaprompt.types import Example

Lines = Iterator[tuple[int, str]]
Rows = Iterator["Row"]

HUB = "hf:"
STDIN = "-"
_LARGEST_FIELD = 2**31 - 1  # the largest limit the csv module takes where a C long has 32 bits
_NAME_ONE = {
    "field 'text'": "name one with text=…, or pass text=None where the template has no {text}",
    "label": "name one with label=…, or read without labels: labelled=False",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One record, where it came from, and whether it is a line of plain text (its one column is then "text")."""

    at: str
    values: Mapping[str, object]
    plain: bool = False


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


def read(
    path_or_name: str | os.PathLike[str],
    text: str | None = "text",
    label: str = "label",
    fields: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    labelled: bool = True,
) -> list[Example]:
    """The rows of a file (its format by its suffix), or of a `datasets` dataset named "hf:ag_news" or "hf:glue/sst2".

    A name on the Hub is `hf:dataset`, `hf:dataset/config` or `hf:owner/dataset/config`, and needs a `split`; integers
    in its class columns become class names. `limit` keeps the first rows. With `labelled=False` no label is read.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: a limit is 1 row or more; leave it out to read all")
    asked = _Asked(text, fields or {}, label, labelled)
    return list(islice(_examples(str(path_or_name), _rows(path_or_name, split), asked), limit))


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
        return _examples("standard input", _stdin_rows(), asked)
    return _examples(str(path_or_dash), _rows(path_or_dash, split=None), asked)


def labels_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """The class names, sorted: as numbers where all of them are integers, else as strings."""
    names = set()
    for number, example in enumerate(examples, 1):
        if example.label is None:
            raise DataError(f"example {number} has no label; read the data with labelled=True")
        names.add(example.label)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _examples(source: str, rows: Rows, asked: _Asked) -> Iterator[Example]:
    """One example a row; no row at all is an error."""
    empty = True
    for row in rows:
        empty = False
        yield _example(row, asked)
    if empty:
        raise DataError(f"{source}: there are no rows; at least one is needed")


def _example(row: Row, asked: _Asked) -> Example:
    """The asked fields, then the other columns that can be written as text, and the label."""
    columns = asked.columns(row)
    fields = {name: _filled(row, column, f"field {name!r}") for name, column in columns.items()}
    used = {asked.label, "", *columns, *columns.values()}
    others = {name: _written(row, name) for name in row.values if name not in used}
    fields |= {name: value for name, value in others.items() if value is not None}
    if not fields:
        raise DataError(f"{row.at}: no column holds a text{_listing('text', row.values)}")
    return Example(fields, _label(row, asked.label) if asked.labelled and asked.label is not None else None)


def _label(row: Row, column: str) -> str:
    """The label as a string, 1.0 (as a table with gaps stores 1) as "1"."""
    label, value = _filled(row, column, "label"), row.values[column]
    return str(int(value)) if isinstance(value, (float, Decimal)) and value % 1 == 0 else label


def _filled(row: Row, column: str, what: str) -> str:
    """The text in a column that must be there and hold one."""
    if column not in row.values:
        mend = _NAME_ONE.get(what, "name one with fields={'field': 'column'}")
        raise DataError(f"{row.at}: no column {column!r} for the {what}{_listing(column, row.values)}; {mend}")
    written = _written(row, column)
    if written is None or not written.strip():
        got = f"column {column!r} holds {row.values[column]!r:.60}"
        raise DataError(f"{row.at}: the {what} is missing: {got}; put a text or a number there, or remove the row")
    return written


def _written(row: Row, column: str) -> str | None:
    """A string as it is, a number by `str`, a boolean as in JSON; None for what is missing or no single text."""
    value = row.values[column]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, Decimal)):
        return None if value != value else str(value)  # NaN alone differs from itself
    return _sound(value, f"{row.at}: column {column!r}") if isinstance(value, str) else None


def _sound(text: str, at: str) -> str:
    """`text`, if it can be written as UTF-8 and has no NUL, as tokenizers need."""
    if "\0" in text:
        raise DataError(f"{at}: holds a NUL character; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{at}: character {error.start + 1} is half of a surrogate pair; write it whole") from error
    return text


def _listing(name: str, columns: Iterable[str]) -> str:
    """The columns there are, long names cut (a file without a header has texts there), and the nearest ones."""
    shown = [column if len(column) <= 40 else column[:39] + "…" for column in columns]
    hint = nearest(name, shown, limit=30)
    return f"{hint} (columns: {', '.join(shown[:30])})" if hint.startswith("; did you mean") else hint


def _rows(source: str | os.PathLike[str], split: str | None) -> Rows:
    """The rows of a file or of a dataset on the Hub; a wrong name, suffix or split is an error at once."""
    if isinstance(source, str) and source.startswith(HUB):
        return _hub_rows(source, split)
    path = Path(source).expanduser()
    if not os.path.isfile(path):  # of a text given as a path, Path.is_file may raise: "File name too long"
        raise DataError(_not_a_file(str(source), path))
    if split is not None:
        raise ConfigError(f"split={split!r} is for datasets on the Hub ({HUB}name); {source} is one file: leave it out")
    name = path.name.lower()
    if not name.endswith(_SUFFIXES):
        got = path.suffix or "a name without a suffix"
        raise DataError(f"{source}: {got} is no format that can be read; possible: {', '.join(_SUFFIXES)}")
    return _FORMATS[Path(name.removesuffix(".gz")).suffix](path)


def _not_a_file(source: str, path: Path) -> str:
    """What a name that is no file might have meant."""
    folder = path if os.path.isdir(path) else path.parent
    if not os.path.isdir(folder):
        return (
            f"{source!r:.80}: there is no folder {str(folder)!r:.80}; name a file, or a dataset on the Hub as {HUB}name"
        )
    near = nearest(path.name, sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(_SUFFIXES)))
    what = "is a folder" if folder is path else f"is neither a file nor a dataset on the Hub ({HUB}name)"
    return f"{source!r:.80} {what}; data files in {str(folder)!r}{near}"


def _stdin_rows() -> Rows:
    """JSON lines if the first line is a JSON object, else plain text."""
    lines = _decoded("standard input", sys.stdin.buffer)
    first = list(islice(lines, 1))
    rows = _jsonl_rows if first and _is_object(first[0][1]) else _plain_rows
    yield from rows("standard input", chain(first, lines))


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object; a text may begin with a brace too."""
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _file_lines(path: Path) -> Lines:
    """The lines of a file, unpacked if it is a .gz, each with its number."""
    packed = path.name.lower().endswith(".gz")
    number = 0
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            for number, line in _decoded(str(path), stream):
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        mend = "the gzip file is damaged or cut short, make or fetch it again" if packed else "check the file"
        raise DataError(f"{path}: cannot be read after line {number}: {error}; {mend}") from error


def _decoded(name: str, stream: Iterable[bytes]) -> Lines:
    """UTF-8 lines with their numbers from 1, line ends kept."""
    for number, line in enumerate(stream, 1):
        at = f"{name}, line {number}"
        if 0 in line:
            raise DataError(f"{at}: holds a NUL byte; this is no UTF-8 text file (UTF-16?): save it as UTF-8")
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            got = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
            raise DataError(f"{at}: {got} is not UTF-8; save the file as UTF-8 (iconv -f latin1 -t utf-8)") from error


def _csv_rows(path: Path, delimiter: str) -> Rows:
    """Records under a header line; blank lines between them are skipped."""
    header: list[str] = []
    empty = True
    for at, record in _records(path, delimiter):
        if not header:
            header = record
            if len({*header}) < len(header):
                raise DataError(f"{at}: a column name stands twice in {header!r:.80}; give each column its own name")
            continue
        if len(record) != len(header):
            got = f"{len(record)} columns where the header has {len(header)} ({', '.join(header):.80})"
            raise DataError(f"{at}: {got}; put quotes around a text that holds {delimiter!r} or a line end")
        empty = False
        yield Row(at, dict(zip(header, record, strict=True)))
    if empty:
        got = "a header but no rows" if header else "empty"
        raise DataError(f"{path}: the file is {got}; a header line and at least one row are needed")


def _records(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The csv module's records, each with the line that it starts on; bad quoting is an error, never guessed at."""
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))  # process-wide, so it is only ever raised
    reader = csv.reader((line for _, line in _file_lines(path)), delimiter=delimiter, strict=True)
    while True:
        at = f"{path}, line {reader.line_num + 1}"
        try:
            record = next(reader, None)
        except csv.Error as error:
            mend = 'double each quote inside a quoted text ("") and close it'
            raise DataError(f"{at}: the record that starts here is badly quoted ({error}); {mend}") from error
        if record is None:
            return
        if record:
            yield at, record


def _jsonl_rows(name: str, lines: Iterable[tuple[int, str]]) -> Rows:
    """One object a line; blank lines are skipped."""
    for number, line in lines:
        if line.strip():
            yield _object_row(f"{name}, line {number}", _parsed(line, name, number - 1))


def _json_rows(path: Path) -> Rows:
    """A list of objects."""
    text = "".join(line for _, line in _file_lines(path))
    parsed = _parsed(text, str(path)) if text.strip() else []
    if not isinstance(parsed, list):
        raise DataError(f"{path}: holds {parsed!r:.60}; a .json file is a list of objects (one object a line: .jsonl)")
    for number, value in enumerate(parsed, 1):
        yield _object_row(f"{path}, row {number}", value)


def _parsed(text: str, name: str, lines_before: int = 0) -> object:
    """A JSON value; the error names the line in the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{name}, line {lines_before + error.lineno}, column {error.colno}"
        mend = "mend it there; a .json file is one list of objects, a .jsonl file one object a line"
        raise DataError(f"{at}: not JSON: {error.msg}; {mend}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}, after line {lines_before}: this JSON cannot be read: {error}; simplify it") from error


def _object_row(at: str, value: object) -> Row:
    """A row from a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f'{at}: holds {value!r:.60}; each row is an object, for example {{"text": "…", "label": "…"}}')
    return Row(at, value)


def _plain_rows(name: str, lines: Iterable[tuple[int, str]]) -> Rows:
    """One text a line; blank lines may only end the file."""
    blank = 0
    for number, line in lines:
        if not line.strip():
            blank = blank or number
        elif blank:
            raise DataError(f"{name}, line {blank}: the text is missing: the line is blank; fill it in or remove it")
        else:
            yield Row(f"{name}, line {number}", {"text": line.rstrip("\r\n")}, plain=True)


def _parquet_rows(path: Path) -> Rows:
    """The rows of a Parquet file, a batch at a time."""
    arrow, parquet, number = _extra("pyarrow", "data"), _extra("pyarrow.parquet", "data"), 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", values)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {number}: {error}; write it again") from error


def _hub_rows(source: str, split: str | None) -> Rows:
    """The rows of one split of a dataset on the Hub, class numbers turned into class names."""
    if split is None:
        raise ConfigError(f"{source!r} needs a split; pass for example split='train'")
    datasets = _extra("datasets", "datasets")
    data = _loaded(datasets, source, split)
    names = {c: f.names for c, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    return (
        Row(f"{source}, split {split!r}, row {number}", {c: _named(names.get(c), v) for c, v in values.items()})
        for number, values in enumerate(data, 1)
    )


def _loaded(datasets: ModuleType, source: str, split: str) -> Any:
    """The `datasets.Dataset` that "hf:dataset", "hf:dataset/config" or "hf:owner/dataset/config" names."""
    parts = source.removeprefix(HUB).split("/")
    possible = f"possible: {HUB}dataset, {HUB}dataset/config, {HUB}owner/dataset/config (mostly 'default')"
    if len(parts) > 3 or not all(parts):
        raise DataError(f"{source!r} is no name of a dataset on the Hub; {possible}")
    path, config = "/".join(parts[:-1]) or parts[0], parts[-1] if len(parts) > 1 else None
    try:
        return datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source!r}, split {split!r}, cannot be loaded: {error}; {possible}") from error


def _named(names: Sequence[str] | None, value: object) -> object:
    """The class name of an integer (of -1, as hidden test labels are stored, none); anything else as it is."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _extra(module: str, extra: str) -> ModuleType:
    """A module that an extra of the package brings, imported only now."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f'this data needs {module} ({error}); pip install "deltaprompt[{extra}]"') from error


_FORMATS: Mapping[str, Callable[[Path], Rows]] = {
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".jsonl": lambda path: _jsonl_rows(str(path), _file_lines(path)),
    ".json": _json_rows,
    ".txt": lambda path: _plain_rows(str(path), _file_lines(path)),
    ".parquet": _parquet_rows,
}
_SUFFIXES = (*_FORMATS, *(f"{suffix}.gz" for suffix in _FORMATS if suffix != ".parquet"))
