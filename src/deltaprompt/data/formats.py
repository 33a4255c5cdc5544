"""Every source is rows of named values that know where they stand: files by their suffix, standard input, the Hub."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from deltaprompt.errors import ConfigError, DataError, nearest

Lines = Iterator[tuple[int, str]]
Rows = Iterator["Row"]

HUB = "hf:"
_LARGEST_FIELD = 2**31 - 1  # the largest limit the csv module takes where a C long has 32 bits


@dataclass(frozen=True, slots=True)
class Row:
    """One record, where it came from, and whether it is a line of plain text (its one column is then "text")."""

    at: str
    values: Mapping[str, object]
    plain: bool = False


def rows_of(source: str | os.PathLike[str], split: str | None) -> Rows:
    """The rows of a file or of a dataset on the Hub; a wrong name, suffix or split is an error at once."""
    if isinstance(source, str) and source.startswith(HUB):
        return _hub_rows(source, split)
    path = Path(source).expanduser()
    if not os.path.isfile(path):  # of a text given as a path, Path.is_file may raise: "File name too long"
        raise DataError(_not_a_file(str(source), path))
    refuse_split(source, split)
    name = path.name.lower()
    if not name.endswith(_SUFFIXES):
        got = path.suffix or "a name without a suffix"
        raise DataError(f"{source}: {got} is no format that can be read; possible: {', '.join(_SUFFIXES)}")
    return _FORMATS[Path(name.removesuffix(".gz")).suffix](path)


def refuse_split(source: str | os.PathLike[str], split: str | None) -> None:
    """Raises where a split was asked of a file."""
    if split is not None:
        raise ConfigError(f"split={split!r} is for datasets on the Hub ({HUB}name); {source} is one file: leave it out")


def lines_of(source: str | os.PathLike[str]) -> Lines:
    """The lines of a file, whatever its name, with their numbers."""
    path = Path(source).expanduser()
    if not os.path.isfile(path):
        raise DataError(_not_a_file(str(source), path))
    return _file_lines(path)


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


def stdin_rows() -> Rows:
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
            if len(header) == 1 and (other := next((d for d in ",;\t|" if d in header[0]), None)):
                got = f"columns of {path.name} are divided by {delimiter!r}, its header {header[0]!r:.80} by {other!r}"
                raise DataError(f"{at}: {got}; save it with {delimiter!r}")
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
            yield row_of(f"{name}, line {number}", _parsed(line, name, number - 1))


def json_in(path: Path) -> object:
    """What a .json file holds; an empty list where it is empty."""
    text = "".join(line for _, line in lines_of(path))
    return _parsed(text, str(path)) if text.strip() else []


def _json_rows(path: Path) -> Rows:
    """A list of objects."""
    parsed = json_in(path)
    if not isinstance(parsed, list):
        raise DataError(f"{path}: holds {parsed!r:.60}; a .json file is a list of objects (one object a line: .jsonl)")
    for number, value in enumerate(parsed, 1):
        yield row_of(f"{path}, row {number}", value)


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


def row_of(at: str, value: object) -> Row:
    """A row of a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f'{at}: holds {value!r:.60}; each row is an object, for example {{"text": "…", "label": "…"}}')
    return _row(at, value)


def _row(at: str, values: Mapping[str, object]) -> Row:
    """A row; what an object in it holds goes by its dotted name: `{"meta": {"word": "a"}}` -> `{"meta.word": "a"}`."""
    flat: dict[str, object] = {}
    left = list(values.items())[::-1]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left.extend((f"{name}.{inner}", v) for inner, v in list(value.items())[::-1])
        elif name in flat:
            raise DataError(f"{at}: {name!r} stands twice, also in an object within the row; rename one of them")
        else:
            flat[name] = value
    return Row(at, flat)


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
    arrow, parquet, number = optional("pyarrow", "data"), optional("pyarrow.parquet", "data"), 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield _row(f"{path}, row {number}", values)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {number}: {error}; write it again") from error


def _hub_rows(source: str, split: str | None) -> Rows:
    """The rows of one split of a dataset on the Hub, class numbers turned into class names."""
    if split is None:
        raise ConfigError(f"{source!r} needs a split; pass for example split='train'")
    datasets = optional("datasets", "datasets")
    data = _loaded(datasets, source, split)
    names = {c: names for c, f in data.features.items() if (names := _names(datasets, f))}
    return (
        _row(f"{source}, split {split!r}, row {number}", {c: _named(names.get(c), v) for c, v in values.items()})
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


def _names(datasets: ModuleType, feature: Any) -> Sequence[str] | None:
    """The class names of a column of numbers that stand for them, or of lists of these; else None."""
    lists = tuple(vars(datasets)[name] for name in ("Sequence", "List", "LargeList") if name in vars(datasets))
    one = feature.feature if isinstance(feature, lists) else feature
    return one.names if isinstance(one, datasets.ClassLabel) else None


def _named(names: Sequence[str] | None, value: object) -> object:
    """The class name of an integer (of -1, as hidden test labels are stored, none); anything else as it is."""
    if names is not None and isinstance(value, list):
        return [_named(names, one) for one in value]
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def optional(module: str, extra: str) -> ModuleType:
    """A module that an extra of the package brings, imported only now."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f'this needs {module} ({error}); pip install "deltaprompt[{extra}]"') from error


_FORMATS: Mapping[str, Callable[[Path], Rows]] = {
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".jsonl": lambda path: _jsonl_rows(str(path), _file_lines(path)),
    ".json": _json_rows,
    ".txt": lambda path: _plain_rows(str(path), _file_lines(path)),
    ".parquet": _parquet_rows,
}
_SUFFIXES = (*_FORMATS, *(f"{suffix}.gz" for suffix in _FORMATS if suffix != ".parquet"))
