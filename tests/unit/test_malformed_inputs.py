"""A newcomer's own file: what `deltaprompt fit` says of each that is malformed, and that nothing is written."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests import backbones_zoo
from tests.command import fails, last_json, succeeds

BAD, GOOD = ["awful film", "I hated it", "dull and long", "so boring"], ["great film", "I loved it", "a joy", "moving"]
REVIEWS = [*((text, "bad") for text in BAD), *((text, "good") for text in GOOD)]
LARGE = "word " * 200_000  # 1 MB


def csv(*more: Sequence[str], header: str = "text,label") -> str:
    each = (",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in (*REVIEWS, *more))
    return "\n".join((header, *each)) + "\n"


def jsonl(*more: object) -> str:
    rows: Iterable[object] = (*({"text": text, "label": label} for text, label in REVIEWS), *more)
    return "\n".join(json.dumps(row) for row in rows)


PLAIN = csv()
FAULTS: dict[str, tuple[str, str | bytes, str]] = {  # what is wrong -> the file, what it holds, what is said
    "no label column": (
        "a.csv",
        csv(header="text,topic"),
        "line 2: no column 'label' for the label; possible: text, topic",
    ),
    "no text column": (
        "a.csv",
        csv(header="review,label"),
        "no column 'text' for the field 'text'; possible: review, label",
    ),
    "no header": ("a.csv", PLAIN.partition("\n")[2], "line 2: no column 'text' for the field 'text'; possible: awful"),
    "a duplicated header": ("a.csv", csv(header="text,text"), "line 1: a column name stands twice in ['text', 'text']"),
    "one class": ("a.csv", "text,label\n" + "".join(f"{text},bad\n" for text in BAD), "all 4 rows of"),
    "an empty file": ("a.csv", "", "the file is empty; a header line and at least one row are needed"),
    "a header alone": ("a.csv", "text,label\n", "a header but no rows"),
    "blank lines alone": ("a.csv", "\n\n\n", "the file is empty"),
    "an empty text": (
        "a.csv",
        csv(("", "bad")),
        "line 10: the field 'text' is missing: column 'text' holds ''; put a text",
    ),
    "a blank text": ("a.csv", csv((" \t", "bad")), "line 10: the field 'text' is missing: column 'text' holds ' \\t'"),
    "an empty label": (
        "a.csv",
        csv(("fine", "")),
        "line 10: the label is missing: column 'label' holds ''; put a text",
    ),
    "a blank label": ("a.csv", csv(("fine", "  ")), "line 10: the label is missing: column 'label' holds '  '"),
    "blanks around a label": ("a.csv", csv(("fine", " good ")), "line 10: the label ' good ' is 'good' but for blanks"),
    "a column more": (
        "a.csv",
        PLAIN + "a,b,c\n",
        "line 10: 3 columns where the header has 2 (text, label); put quotes",
    ),
    "a column less": ("a.csv", PLAIN + "alone\n", "line 10: 1 columns where the header has 2 (text, label)"),
    "an open quote": ("a.csv", PLAIN + '"never closed,bad\n', "line 10: the record that starts here is badly quoted"),
    "a NUL byte": ("a.csv", PLAIN + "a\0b,bad\n", "line 10: holds a NUL byte; this is no UTF-8 text file (UTF-16?)"),
    "Latin-1": (
        "a.csv",
        PLAIN.encode() + "café,good\n".encode("latin-1"),
        "line 10: byte 0xe9 at position 4 is not UTF-8",
    ),
    "UTF-16": ("a.csv", PLAIN.encode("utf-16"), "line 1: holds a NUL byte; this is no UTF-8 text file (UTF-16?)"),
    "semicolons": (
        "a.csv",
        PLAIN.replace(",", ";"),
        "divided by ',', its header 'text;label' by ';'; save it with ','",
    ),
    "commas in a .tsv": ("a.tsv", PLAIN, "divided by '\\t', its header 'text,label' by ','; save it with '\\t'"),
    "texts and numbers": ("a.jsonl", jsonl({"text": "a", "label": 1}), "line 9: the label 1 is a number, and that of"),
    "truths and texts": (
        "a.jsonl",
        jsonl({"text": "a", "label": True}),
        "line 9: the label True is true or false, and",
    ),
    "a null label": (
        "a.jsonl",
        jsonl({"text": "a", "label": None}),
        "line 9: the label is missing: column 'label' holds",
    ),
    "a NaN label": (
        "a.jsonl",
        jsonl({"text": "a", "label": float("nan")}),
        "line 9: the label is missing: column 'label'",
    ),
    "a NaN text": ("a.jsonl", jsonl({"text": float("nan"), "label": "bad"}), "line 9: the field 'text' is missing"),
    "a null text": (
        "a.jsonl",
        jsonl({"text": None, "label": "bad"}),
        "line 9: the field 'text' is missing: column 'text'",
    ),
    "no label in a row": ("a.jsonl", jsonl({"text": "a"}), "line 9: no column 'label' for the label; possible: text"),
    "an object for a text": ("a.jsonl", jsonl({"text": {"a": "b"}, "label": "bad"}), "did you mean 'text.a'?"),
    "a list for a row": (
        "a.jsonl",
        jsonl(["a", "bad"]),
        "line 9: holds ['a', 'bad']; each row is an object, for example",
    ),
    "broken JSON": (
        "a.jsonl",
        jsonl() + '\n{"text": "a"',
        "line 9, column 13: not JSON: Expecting ',' delimiter; mend",
    ),
    "no list": ("a.json", '{"text": "a"}', "holds {'text': 'a'}; a .json file is a list of objects"),
    "half a character": (
        "a.jsonl",
        jsonl({"text": "\ud800", "label": "bad"}),
        "character 1 is half of a surrogate pair",
    ),
    "no gzip": ("a.csv.gz", PLAIN, "the gzip file is damaged or cut short, make or fetch it again"),
    "a cut gzip": (
        "a.csv.gz",
        gzip.compress(PLAIN.encode())[:-10],
        "cannot be read after line 8: Compressed file ended",
    ),
    "no Parquet": ("a.parquet", PLAIN, "cannot be read as Parquet after row 0"),
    "a spreadsheet": ("a.xlsx", PLAIN, ".xlsx is no format that can be read; possible: .csv, .tsv, .jsonl"),
}
TESTS = {  # of the file to measure on
    "a label unseen": (
        "text,label\nx,bad\ny,gold\n",
        "row 2: no training row has the label 'gold'; did you mean 'good'?",
    ),
    "no labels": ("text\nx\n", "line 2: no column 'label' for the label; possible: text"),
    "nothing": ("", "the file is empty"),
}
FINE: dict[str, tuple[str, str | bytes, int]] = {  # what may look malformed -> the file, what it holds, its labels
    "a byte order mark": ("a.csv", b"\xef\xbb\xbf" + PLAIN.encode(), 2),
    "carriage returns": ("a.csv", PLAIN.replace("\n", "\r\n"), 2),
    "a cell of 1 MB": ("a.csv", csv((LARGE, "bad")), 2),
    "the word nan": ("a.csv", csv(("nan", "bad")), 2),
    "emoji": ("a.csv", csv(("😀🎉", "🎉")), 3),
    "line ends in quotes": ("a.csv", csv(("two\nlines", "bad")), 2),
    "truths": ("a.jsonl", "\n".join(json.dumps({"text": t, "label": label == "bad"}) for t, label in REVIEWS), 2),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    backbone = backbones_zoo.build("bert-encoder")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


def put(path: Path, held: str | bytes) -> Path:
    path.write_bytes(held if isinstance(held, bytes) else held.encode())
    return path


def asked(tiny: Path, data: Path) -> tuple[object, ...]:
    few = ("--steps", "1", "--no-dev", "--delta", "lora:rank=2,at=attn.q", "--device", "cpu")
    return ("fit", "--data", data, "--backbone", tiny, *few, "--out", data.parent / "out")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_file_is_named_with_its_line_and_nothing_is_written(tiny: Path, tmp_path: Path, fault: str) -> None:
    name, held, said = FAULTS[fault]
    path = put(tmp_path / name, held)
    told = fails(*asked(tiny, path))
    assert said in told
    assert str(path) in told
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("fault", TESTS)
def test_a_malformed_test_file_is_named_before_anything_trains(tiny: Path, tmp_path: Path, fault: str) -> None:
    held, said = TESTS[fault]
    path = put(tmp_path / "test.csv", held)
    told = fails(*asked(tiny, put(tmp_path / "a.csv", PLAIN)), "--test", path)
    assert said in told
    assert str(path) in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("odd", FINE)
def test_what_only_looks_malformed_is_learned_and_answered(tiny: Path, tmp_path: Path, odd: str) -> None:
    name, held, labels = FINE[odd]
    path = put(tmp_path / name, held)
    succeeds(*asked(tiny, path))
    answer = last_json(succeeds("predict", tmp_path / "out", path, "--device", "cpu", "--json"))
    assert len(answer["scores"]) == labels


def test_a_folder_says_what_is_in_it(tiny: Path, tmp_path: Path) -> None:
    put(tmp_path / "a.csv", PLAIN)
    assert f"{str(tmp_path)!r} is a folder; data files in" in fails(*asked(tiny, tmp_path))


def test_too_few_rows_of_a_label_say_how_many_there_are(tiny: Path, tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", PLAIN)
    told = fails(*asked(tiny, path), "--shots", "8")
    assert "class 'bad' has 4 rows (and 1 more class has too few); shots=8 needs 8 of each class" in told
