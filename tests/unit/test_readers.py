"""Readers: every format gives the same rows back, and every fault is named with its place and its mending."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaprompt.data import labels_of, read, read_texts, shipped
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example

DATA = Path(os.environ.get("DELTAPROMPT_DATA", Path(__file__).parents[2] / "../shared/data"))
NASTY = [
    "plain",
    "emoji 👩‍🚀🇫🇷 and ünïcödé — 汉字 \u2028 line separator",
    'quotes "double", \'single\' and ""twice""',
    "embedded\nnewline and\r\ncarriage return",
    "tab\tcomma, semicolon; {braces} \\backslash",
    "  spaces around  ",
    "x" * 10_000,
    "'; DROP TABLE texts; --",
]
ROWS = [{"text": text, "label": str(number % 2), "source": f"s{number}"} for number, text in enumerate(NASTY)]


def packed(path: Path, content: str | bytes) -> Path:
    """The file, gzipped if its name says so."""
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def delimited(rows: list[dict[str, str]], delimiter: str) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def json_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(path: Path, columns: Mapping[str, object]) -> Path:
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    parquet.write_table(arrow.table(dict(columns)), path)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], Path]] = {
    "d.csv": lambda path, rows: packed(path, delimited(rows, ",")),
    "d.csv.gz": lambda path, rows: packed(path, delimited(rows, ",")),
    "d.tsv": lambda path, rows: packed(path, delimited(rows, "\t")),
    "d.jsonl": lambda path, rows: packed(path, json_lines(rows)),
    "D.JSONL.gz": lambda path, rows: packed(path, json_lines(rows)),
    "d.json": lambda path, rows: packed(path, json.dumps(rows, indent=1)),
    "d.parquet": lambda path, rows: write_parquet(path, {name: [row[name] for row in rows] for name in rows[0]}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_round_trip_of_nasty_texts(tmp_path: Path, name: str) -> None:
    expected = [Example({"text": row["text"], "source": row["source"]}, row["label"]) for row in ROWS]
    assert read(WRITERS[name](tmp_path / name, ROWS)) == expected


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.sampled_from(sorted(set(WRITERS) - {"d.parquet"})))
def test_round_trip_of_any_text(tmp_path_factory: pytest.TempPathFactory, written: list[str], name: str) -> None:
    path = WRITERS[name](tmp_path_factory.mktemp("any") / name, [{"text": text, "label": "a"} for text in written])
    assert [example.fields["text"] for example in read(path)] == written


@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz"])
def test_plain_text_is_one_text_a_line(tmp_path: Path, name: str) -> None:
    path = packed(tmp_path / name, '\ufeffOne, "two"\r\n{"text": "as it is"}\n  three 👍\n\n\n')
    expected = [Example({"text": t}) for t in ('One, "two"', '{"text": "as it is"}', "  three 👍")]
    assert read(path, labelled=False) == list(read_texts(path)) == list(read_texts(path, text="review")) == expected


def test_byte_order_mark_and_blank_records(tmp_path: Path) -> None:
    assert read(packed(tmp_path / "a.csv", "\ufefftext,label\r\n\r\na,1\r\n\r\n")) == [Example({"text": "a"}, "1")]
    assert read(packed(tmp_path / "a.jsonl", '\ufeff{"text": "a", "label": 1}\n\n')) == [Example({"text": "a"}, "1")]


def test_columns_become_fields(tmp_path: Path) -> None:
    row = {"s1": "A.", "s2": "B.", "n": 3, "x": 0.5, "ok": True, "none": None, "list": [1], "": "unnamed", "y": "p"}
    path = packed(tmp_path / "a.jsonl", json.dumps(row))
    others = {"n": "3", "x": "0.5", "ok": "true"}
    mapped = read(path, text="s1", fields={"hypothesis": "s2"}, label="y")
    assert mapped == [Example({"text": "A.", "hypothesis": "B.", **others}, "p")]
    assert read(path, text=None, label="y") == [Example({"s1": "A.", "s2": "B.", **others}, "p")]
    assert read(path, fields={"text": "s2"}, label="y") == [Example({"text": "B.", "s1": "A.", **others}, "p")]
    assert read(path, text="s1", label="y", labelled=False)[0] == Example({"text": "A.", "s2": "B.", **others})


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_objects_within_a_row_have_dotted_names(tmp_path: Path, name: str) -> None:
    row = {"text": "t", "meta": {"word": "w", "at": {"start": 3, "of": "x"}}, "gold": {"label": "p"}, "m": [{"a": 1}]}
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, {column: [value] for column, value in row.items()})
    else:
        packed(path, json.dumps(row if name == "a.jsonl" else [row]))
    fields = {"text": "t", "meta.word": "w", "meta.at.start": "3", "meta.at.of": "x"}
    assert read(path, label="gold.label") == [Example(fields, "p")]
    assert read(path, text="meta.word", label="text")[0].fields["text"] == "w"


def test_deeply_nested_objects_are_no_fault(tmp_path: Path) -> None:
    depth = 600
    nested = packed(tmp_path / "a.jsonl", '{"a": ' * depth + '"b"' + "}" * depth)
    assert read(nested, text="a" + ".a" * (depth - 1), labelled=False)[0].fields["text"] == "b"


def test_label_column_is_a_field_only_where_mapped(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.csv", "text,label\na,pos\n")
    assert read(path) == [Example({"text": "a"}, "pos")]
    assert read(path, fields={"gold": "label"}) == [Example({"text": "a", "gold": "pos"}, "pos")]


@pytest.mark.parametrize(("value", "label"), [(0, "0"), (-2.0, "-2"), (1.5, "1.5"), (True, "true"), ("1.0", "1.0")])
def test_labels_as_strings(tmp_path: Path, value: object, label: str) -> None:
    path = packed(tmp_path / "a.jsonl", json.dumps({"text": "a", "label": value}))
    assert read(path)[0].label == label


def test_parquet_values(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "label": [1.0, 2.0], "more": [None, "m"]})
    assert read(path) == [Example({"text": "a"}, "1"), Example({"text": "b", "more": "m"}, "2")]
    with pytest.raises(DataError, match="row 1: the field 'text' is missing: column 'more' holds None; put a text or"):
        read(path, text="more")


def test_limit(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.csv", "text,label\na,1\nb,2\n,bad\n")
    assert [example.label for example in read(path, limit=2)] == ["1", "2"]
    with pytest.raises(ConfigError, match=re.escape("limit=0: a limit is 1 row or more; leave it out to read all")):
        read(path, limit=0)


def test_ten_megabyte_field(tmp_path: Path) -> None:
    long = "word " * 2_000_000
    assert read(packed(tmp_path / "a.csv", f'text,label\n"{long}",1\n'))[0].fields["text"] == long


def test_labels_of() -> None:
    assert labels_of([Example({}, name) for name in ("10", "9", "-1", "9")]) == ("-1", "9", "10")
    assert labels_of([Example({}, name) for name in ("10", "9", "b", "a")]) == ("10", "9", "a", "b")
    assert labels_of([]) == ()
    with pytest.raises(DataError, match="example 2 has no label; read the data with labelled=True"):
        labels_of([Example({}, "a"), Example({})])


def stdin(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


def test_stdin_is_json_lines_or_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, '{text} is no JSON\nb\n{"text": "still text"}\n\n')
    assert [e.fields["text"] for e in read_texts("-")] == ["{text} is no JSON", "b", '{"text": "still text"}']
    stdin(monkeypatch, '{"review": "a", "id": 1}\n{"review": "b"}\n')
    assert list(read_texts("-", text="review")) == [Example({"text": "a", "id": "1"}), Example({"text": "b"})]


def test_stdin_is_read_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "a\n\nb\n")
    rows = read_texts("-")
    assert next(rows) == Example({"text": "a"})
    with pytest.raises(DataError, match="standard input, line 2: the text is missing: the line is blank"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "standard input: there are no rows; at least one is needed"),
        ("\n\n", "standard input: there are no rows; at least one is needed"),
        ('{"text": "a"}\n{"text": "b",}\n', "standard input, line 2, column 14: not JSON"),
        ('{"text": "a"}\nplain\n', "standard input, line 2, column 1: not JSON"),
        ('{"text": ""}\n', "standard input, line 1: the field 'text' is missing: column 'text' holds ''"),
        ('{"a": null}\n', "standard input, line 1: no column holds a text; possible: a"),
    ],
)
def test_stdin_faults(monkeypatch: pytest.MonkeyPatch, content: str, message: str) -> None:
    stdin(monkeypatch, content)
    with pytest.raises(DataError, match=re.escape(message)):
        list(read_texts("-"))


def test_read_texts_of_tables(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.csv", "premise,hypothesis\np,h\n")
    assert list(read_texts(path)) == [Example({"premise": "p", "hypothesis": "h"})]
    assert list(read_texts(path, fields={"text": "premise"})) == [Example({"text": "p", "hypothesis": "h"})]
    with pytest.raises(DataError, match="is neither a file nor"):
        read_texts(tmp_path / "b.csv")  # before the first row is asked for


GOOD = '{"text": "a", "label": 1}\n'
CSV = "text,label,stars\na,1,2\n"
NEEDED = "a header line and at least one row are needed"
NO_ROWS = ": there are no rows; at least one is needed"
QUOTING = 'the record that starts here is badly quoted (*); double each quote inside a quoted text ("") and close it'
RAGGED = "where the header has 2 (text, label); put quotes around a text that holds"
NO_TEXT = "the field 'text' is missing: column 'text' holds *; put a text or a number there, or remove the row"
NO_LABEL = "the label is missing: column 'label' holds *; put a text or a number there, or remove the row"
COLUMN_TEXT = "no column 'label' for the label; possible: text"
MEND_LABEL = "name one with label=… (--label), or read without labels: labelled=False"
MEND_TEXT = "name one with text=… (--text, or --field text=…), or pass text=None where the template has no {text}"
MEND_FIELD = "name one with fields={'field': 'column'}"
MEND_JSON = "mend it there; a .json file is one list of objects, a .jsonl file one object a line"
NO_LIST = "a .json file is a list of objects (one object a line: .jsonl)"
OBJECT = 'each row is an object, for example {"text": "…", "label": "…"}'
UTF8 = "byte 0xff at position 4 is not UTF-8; save the file as UTF-8 (iconv -f latin1 -t utf-8)"
NUL = "holds a NUL byte; this is no UTF-8 text file (UTF-16?): save it as UTF-8"
HALF = "column 'text': character 2 is half of a surrogate pair; write it whole"


def fault(name: str, content: str | bytes, message: str, **options: object) -> tuple[object, ...]:
    """A file, and the message that reading it gives after its path; `*` stands for anything."""
    return name, content, message, options


FAULTS = [
    fault("a.csv", "", f": the file is empty; {NEEDED}"),
    fault("a.tsv", "\n\n", f": the file is empty; {NEEDED}"),
    fault("a.csv.gz", "text,label\n", f": the file is a header but no rows; {NEEDED}"),
    fault("a.jsonl", "", NO_ROWS),
    fault("a.json", "[]", NO_ROWS),
    fault("a.txt", "\n", NO_ROWS),
    # the shape of a table
    fault("a.csv", 'text,label\n"a\nb",1\nc, d,1\n', f", line 4: 3 columns {RAGGED} ',' or a line end"),
    fault("a.tsv", "text\tlabel\nc\n", f", line 2: 1 columns {RAGGED} '\\t' or a line end"),
    fault("a.csv", 'text,label\na,1\n"never closed,2\nb,3\n', f", line 3: {QUOTING}"),
    fault("a.tsv", 'text\tlabel\n"Hi" he said\t1\n', f", line 2: {QUOTING}"),
    fault("a.csv", "t,t\na,b\n", ", line 1: a column name stands twice in ['t', 't']; give each column its own name"),
    # texts and labels that are missing
    *(fault("a.csv", f'text,label\n"a\nb",1\n{text},2\n', f", line 4: {NO_TEXT}") for text in ("", "   ", '"\n"')),
    *(fault("a.jsonl", f'{GOOD}{{"text": {v}}}', f", line 2: {NO_TEXT}") for v in ("null", '""', "NaN", "[1]")),
    *(fault("a.jsonl", f'{{"text": "b", "label": {v}}}', f", line 1: {NO_LABEL}") for v in ("null", '" "', "NaN")),
    fault("a.json", f'[{GOOD}, {{"text": ""}}]', f", row 2: {NO_TEXT}"),
    fault("a.jsonl", GOOD + '{"text": "b"}', f", line 2: {COLUMN_TEXT}; {MEND_LABEL}"),
    fault("a.txt", "a\n", f", line 1: {COLUMN_TEXT}; {MEND_LABEL}"),
    # columns that are not there
    fault("a.csv", CSV, f"* 'l' for the label; possible: text, label, stars; {MEND_LABEL}", label="l"),
    fault("a.csv", CSV, f"*; did you mean 'stars'? (columns: text, label, stars); {MEND_LABEL}", label="star"),
    fault("a.csv", CSV, f"* 'q' for the field 'text'; possible: text, label, stars; {MEND_TEXT}", text="q"),
    fault("a.csv", CSV, f"* 'q' for the field 'f'; possible: text, label, stars; {MEND_FIELD}", fields={"f": "q"}),
    fault("a.csv", f"{'long ' * 99},1\nb,2\n", f", line 2: no column*; possible: {'long ' * 7}long…, 1; {MEND_TEXT}"),
    # JSON
    fault("a.jsonl", GOOD + '{"text": "b",}\n', f", line 2, column 14: not JSON: *; {MEND_JSON}"),
    fault("a.json", f"[\n{GOOD}{GOOD}]", f", line 3, column 1: not JSON: Expecting ',' delimiter; {MEND_JSON}"),
    fault("a.json", GOOD + GOOD, f", line 2, column 1: not JSON: Extra data; {MEND_JSON}"),
    fault("a.jsonl", GOOD + "[" * 200_000, ", after line 1: this JSON cannot be read: *; simplify it"),
    fault("a.json", '{"rows": []}', f": holds {{'rows': []}}; {NO_LIST}"),
    fault("a.json", f'[{GOOD}, "b"]', f", row 2: holds 'b'; {OBJECT}"),
    fault("a.jsonl", "[1]", f", line 1: holds [1]; {OBJECT}"),
    fault(
        "a.jsonl",
        '{"a.b": "x", "a": {"b": "y"}}',
        ", line 1: 'a.b' stands twice, also in an object*; rename one of them",
    ),
    # bytes and characters
    *(fault(name, GOOD.encode() + b"abc\xff", f", line 2: {UTF8}") for name in ("a.jsonl", "a.jsonl.gz", "a.json")),
    *(fault(name, b"text,label\nabc\xff,1\n", f", line 2: {UTF8}") for name in ("a.csv", "a.csv.gz")),
    fault("a.txt", b"\xef\xbb\xbfabc\xff", f", line 1: {UTF8}"),
    fault("a.csv", "text,label\na,1\n".encode("utf-16-le"), f", line 1: {NUL}"),
    fault("a.jsonl", GOOD + "\0", f", line 2: {NUL}"),
    fault("a.jsonl", '{"text": "a\\ud83d"}', f", line 1: {HALF}"),
    fault("a.jsonl", '{"text": "a\\u0000"}', ", line 1: column 'text': holds a NUL character; remove it"),
    fault("a.parquet", b"not parquet at all", ": cannot be read as Parquet after row 0: *; write it again"),
]


@pytest.mark.parametrize(("name", "content", "message", "options"), FAULTS, ids=range(len(FAULTS)))
def test_faults(tmp_path: Path, name: str, content: str | bytes, message: str, options: dict[str, Any]) -> None:
    path = packed(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read(path, **options)
    pattern = re.escape(f"{path}{message}").replace(r"\*", "(.|\n)*")
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


def test_damaged_gzip(tmp_path: Path) -> None:
    path, damaged = tmp_path / "a.jsonl.gz", "the gzip file is damaged or cut short, make or fetch it again"
    rows = gzip.compress(json_lines(ROWS * 50).encode())
    for raw in (b"not gzip at all", rows[: len(rows) // 2], rows[:40] + b"\xff" * 40 + rows[80:]):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=f"cannot be read after line [0-9]+: .*; {damaged}"):
            read(path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    path = packed(tmp_path / "a.csv", "text,label\n")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="cannot be read after line 0: not yours; check the file"):
        read(path)


def test_wrong_names(tmp_path: Path) -> None:
    for name in ("train.csv", "test.jsonl", "notes.md"):
        (tmp_path / name).touch()
    neither = r"trian.csv' is neither a file nor a dataset on the Hub \(hf:name\); data files in '.*'; did you mean"
    with pytest.raises(DataError, match=neither + " 'train.csv'?"):
        read(tmp_path / "trian.csv")
    with pytest.raises(DataError, match="is a folder; data files in '.*'; possible: test.jsonl, train.csv$"):
        read(tmp_path)
    with pytest.raises(DataError, match="there is no folder '.*nowhere'; name a file, or a dataset on the Hub as hf:"):
        read(tmp_path / "nowhere" / "a.csv")
    with pytest.raises(DataError, match="notes.md: .md is no format that can be read; possible: .csv, .tsv, .*.txt.gz"):
        read(tmp_path / "notes.md")
    with pytest.raises(DataError, match="is neither a file nor"):
        read("A text where a file was meant. " * 200)
    with pytest.raises(ConfigError, match=r"split='train' is for datasets on the Hub \(hf:name\); .* leave it out"):
        read(tmp_path / "train.csv", split="train")


class ClassLabel:
    names = ("neg", "pos")


class Rows(list[dict[str, object]]):
    features: Mapping[str, object] = {"text": object(), "label": ClassLabel()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """A stand-in for `datasets`, and the calls made to it."""
    calls: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, name: str | None, split: str) -> Rows:
        calls.append((path, name, split))
        if split == "nope":
            raise ValueError("Unknown split")
        return Rows([{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": -1}])

    module = SimpleNamespace(load_dataset=load_dataset, ClassLabel=ClassLabel)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_names(hub: list[tuple[str, str | None, str]]) -> None:
    expected = [Example({"text": "a"}, "pos"), Example({"text": "b"}, "neg")]
    for name in ("hf:ag_news", "hf:glue/sst2", "hf:owner/name/config"):
        assert read(name, split="train", limit=2) == expected
    assert hub == [("ag_news", None, "train"), ("glue", "sst2", "train"), ("owner/name", "config", "train")]


def test_hub_faults(hub: list[tuple[str, str | None, str]]) -> None:
    with pytest.raises(DataError, match="hf:x, split 'test', row 3: the label is missing: column 'label' holds None"):
        read("hf:x", split="test")
    with pytest.raises(DataError, match="'hf:x', split 'nope', cannot be loaded: Unknown split; possible: hf:dataset"):
        read("hf:x", split="nope")
    with pytest.raises(ConfigError, match="'hf:x' needs a split; pass for example split='train'"):
        read("hf:x")
    for name in ("hf:", "hf:a/", "hf:a/b/c/d"):
        with pytest.raises(DataError, match="is no name of a dataset on the Hub; possible: hf:dataset, hf:dataset/con"):
            read(name, split="train")


def test_missing_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r'needs datasets \(.*\); pip install "deltaprompt\[datasets\]"'):
        read("hf:ag_news", split="train")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ConfigError, match=r'needs pyarrow \(.*\); pip install "deltaprompt\[data\]"'):
        read(tmp_path / "a.parquet")


def test_importing_is_cheap() -> None:
    code = "import sys, deltaprompt.data.readers; print(*sys.modules)"
    src = str(Path(__file__).parents[2] / "src")
    loaded = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": src}, capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    assert not {"pandas", "pyarrow", "datasets", "numpy", "torch"} & set(loaded.stdout.split())


def test_ag_news() -> None:
    path = DATA / "agnews" / "train.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set DELTAPROMPT_DATA to the folder with agnews/")
    rows = read(path)
    assert labels_of(rows) == ("0", "1", "2", "3")
    assert all(row.fields["text"].strip() for row in rows)
    named = read(path, label="label_name", limit=200)
    assert labels_of(named) == ("Business", "Sci/Tech", "Sports", "World")
    assert named[0].fields == {"text": rows[0].fields["text"], "label": str(rows[0].label)}


def test_shipped() -> None:
    with pytest.raises(DataError, match="the demo data has no split 'trian'; did you mean 'train'?"):
        shipped.load("trian")
    if not (Path(shipped.__file__).parent / "demo" / "train.jsonl").is_file():
        pytest.skip("the demo data is not there yet")
    for split in shipped.SPLITS:
        assert len(labels_of(shipped.load(split))) > 1


def test_a_list_of_words_is_a_text_where_it_is_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"tokens": ["A", "good", "film"], "label": "up", "mixed": ["a", 1]}\n')
    assert read(path, text="tokens")[0].fields == {"text": "A good film"}
    assert "tokens" not in read(path, text=None, fields={"words": "label"})[0].fields
    with pytest.raises(DataError, match="the field 'text' is missing: column 'mixed' holds"):
        read(path, text="mixed")
