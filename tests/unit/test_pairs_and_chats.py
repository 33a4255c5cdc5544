"""Rows of what is given and what is to be written, and conversations: what is read, dealt, and refused."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deltaprompt.data import grouped, hold_out, read_chats, read_pairs, told_apart
from deltaprompt.data.chats import read_questions
from deltaprompt.data.pairs import given_of, linearised, read_inputs
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example, Message


def written(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TRIPLES = [["Aarhus_Airport", "cityServed", '"Aarhus, Denmark"'], ["Aarhus", "leaderName", "Jacob_Bundsgaard"]]


# Pairs


def test_a_text_is_a_field_and_a_list_are_references(tmp_path):
    path = written(
        tmp_path,
        {"source": "name : A", "target": "A is there .", "n": 3},
        {"source": "name : B", "target": ["B .", "It is B ."], "odd": [1]},
    )
    assert read_pairs(path) == [
        Example({"source": "name : A", "n": "3", "target": "A is there ."}),
        Example({"source": "name : B"}, references=("B .", "It is B .")),
    ]
    assert len(read_pairs(path, limit=1)) == 1


def test_triples_are_written_as_a_text(tmp_path):
    (row,) = read_pairs(written(tmp_path, {"triples": TRIPLES, "references": ["x"]}), target="references")
    assert row.fields == {
        "triples": "Aarhus Airport | cityServed | Aarhus, Denmark && Aarhus | leaderName | Jacob Bundsgaard"
    }
    assert linearised([["a", "b", '"']]) == 'a | b | "'


def test_columns_may_go_by_other_names(tmp_path):
    path = written(tmp_path, {"t": TRIPLES[:1], "summary": "x", "target": "not this"})
    (row,) = read_pairs(path, target="summary", fields={"given": "t"})
    assert row.fields == {"given": "Aarhus Airport | cityServed | Aarhus, Denmark", "target": "x"}


@pytest.mark.parametrize(
    ("row", "how", "message"),
    [
        ({"source": "a"}, {}, r"line 1: no column 'target' for the target; .*source"),
        ({"source": "a", "target": " "}, {}, "line 1: the target is missing: column 'target' holds ' '"),
        ({"source": "a", "target": []}, {}, r"column 'target' is a list of texts to be written, and holds \[\]"),
        ({"source": "a", "target": ["b", ""]}, {}, "put one text or more there, none of them blank"),
        ({"source": "a", "target": ["b", 3]}, {}, "is a list of texts to be written"),
        ({"source": "a", "target": "b"}, {"fields": {"x": "y"}}, "no column 'y' for the field 'x'"),
        ({"source": " ", "target": "b"}, {"fields": {"x": "source"}}, "the field 'x' is missing"),
        ({"source": "a\0", "target": "b"}, {}, "NUL"),
    ],
)
def test_rows_that_are_refused(tmp_path, row, how, message):
    with pytest.raises(DataError, match=message):
        read_pairs(written(tmp_path, row), **how)


def test_no_rows_and_no_limit(tmp_path):
    with pytest.raises(DataError, match="there are no rows; at least one is needed"):
        read_pairs(written(tmp_path))
    with pytest.raises(ConfigError, match="limit=0: a limit is 1 row or more"):
        read_pairs(tmp_path / "rows.jsonl", limit=0)
    with pytest.raises(ConfigError, match="limit=0: a limit is 1 row or more"):
        read_chats(tmp_path / "rows.jsonl", limit=0)
    with pytest.raises(DataError, match="there are no rows; at least one is needed"):
        read_chats(tmp_path / "rows.jsonl")


def test_rows_without_a_target_are_inputs(tmp_path, monkeypatch):
    path = written(tmp_path, {"triples": TRIPLES[:1], "target": "left out"})
    assert [e.fields for e in read_inputs(path)] == [{"triples": "Aarhus Airport | cityServed | Aarhus, Denmark"}]
    stream = io.TextIOWrapper(io.BytesIO(b"one line\nanother\n"))
    monkeypatch.setattr(sys, "stdin", stream)
    assert [e.fields for e in read_inputs("-")] == [{"text": "one line"}, {"text": "another"}]


def test_equal_rows_are_grouped_with_all_their_texts():
    rows = [
        Example({"source": "a", "target": "1"}),
        Example({"source": "b", "target": "2"}),
        Example({"target": "3", "source": "a"}),
        Example({"source": "a", "target": "1"}),
        Example({"source": "a"}, "seen", ("4",)),
    ]
    assert grouped(rows) == [
        Example({"source": "a"}, None, ("1", "3")),
        Example({"source": "b"}, None, ("2",)),
        Example({"source": "a"}, "seen", ("4",)),
    ]
    talk = Example({}, messages=(Message("user", "a"), Message("assistant", "b")))
    assert grouped([talk, talk]) == [talk]


def test_what_is_given_is_held_out_with_all_that_is_written_for_it():
    rows = [Example({"source": str(n // 3), "target": str(n)}) for n in range(90)]
    train, dev = hold_out(rows, 0.2, seed=1)
    assert (len(train), len(dev)) == (72, 18)
    assert not {given_of(e) for e in train} & {given_of(e) for e in dev}
    assert sorted(e.fields["target"] for e in (*train, *dev)) == sorted(e.fields["target"] for e in rows)
    assert hold_out(rows, 0.2, seed=1) == (train, dev)
    assert hold_out(rows, 0.2, seed=2) != (train, dev)
    assert len(hold_out(rows[:6], 0.01, 0)[1]) == 3
    with pytest.raises(ConfigError, match="fraction=1: the dev set's share lies between 0 and 1"):
        hold_out(rows, 1, 0)
    with pytest.raises(DataError, match="all rows give the same, so none can go to the dev set"):
        hold_out(rows[:3], 0.5, 0)


def test_seen_and_unseen_are_told_apart():
    train = [Example({"category": "City"})]
    found = told_apart([Example({"category": "City"}), Example({"category": "Artist"})], train, "category")
    assert [e.label for e in found] == ["seen", "unseen"]
    with pytest.raises(DataError, match="test example 2 has no field 'category'"):
        told_apart([*train, Example({"x": "y"})], train, "category")


def test_webnlg_2017(data_dir):
    folder = data_dir / "webnlg2017"
    train, test = (read_pairs(folder / f"{part}.jsonl.gz", target="references") for part in ("train", "test"))
    assert (len(train), len(test)) == (6940, 1862)
    assert Counter(e.label for e in told_apart(test, train, "category")) == {"seen": 971, "unseen": 891}


def test_e2e(data_dir):
    test = grouped(read_pairs(data_dir / "e2e_nlg" / "test.jsonl.gz"))
    assert len(test) == 630
    assert sum(len(e.references) for e in test) > 4500


# Conversations


def test_both_forms_of_conversations(tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = written(
        tmp_path,
        {"id": "1", "data": ["a", "b", "c", "d"]},
        {"messages": [{"role": "system", "content": "s"}, *said], "n": 1},
        {"messages": said[:1]},
    )
    turns = (Message("user", "a"), Message("assistant", "b"))
    assert read_chats(path) == [
        Example({"id": "1"}, messages=(*turns, Message("user", "c"), Message("assistant", "d"))),
        Example({}, messages=(Message("system", "s"), *turns)),
        Example({}, messages=turns[:1]),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 1: neither of the columns messages and data"),
        ({"data": []}, r"line 1: column 'data' is a list of what is said, and holds \[\]"),
        ({"messages": "a"}, "column 'messages' is a list of what is said, and holds 'a'"),
        ({"data": ["a", " "]}, "line 1: message 2 says nothing, it holds ' '; put a text there, or leave the row out"),
        ({"data": ["a", None]}, "message 2 says nothing, it holds None"),
        ({"messages": [{"role": "user"}]}, "message 1 is .*; it is an object, for example"),
        ({"messages": ["a"]}, "message 1 is 'a'; it is an object"),
        (
            {"messages": [{"role": "user", "content": "a"}] * 2},
            "message 2 is of the role 'user', and the next to speak is 'assistant'; after a system message",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "message 1 is of the role 'assistant', and the next to",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "message 1 is of the role 'tool'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]},
            "message 2 is of the role 'system', and the next to speak is 'assistant'",
        ),
        ({"messages": [{"role": "system", "content": "a"}]}, "nobody speaks but the system"),
    ],
)
def test_conversations_that_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_chats(written(tmp_path, row))


def test_a_line_of_text_is_a_question(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("Is it there ?\n")
    assert list(read_questions(path)) == [Example({}, messages=(Message("user", "Is it there ?"),))]
