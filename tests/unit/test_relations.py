"""Relation rows: every form of them, markers around both mentions, and a message for each thing that is wrong."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaprompt.data import labels_of, read_relations
from deltaprompt.data.relations import MARKERS, relation
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.model import Model, Task
from deltaprompt.templates import parse
from deltaprompt.types import Example, Span
from tests import backbones_zoo as zoo
from tests.files import rows, written

PIECES = ("before", "first", "between", "second", "after")
quick = settings(max_examples=100, deadline=None)


def pieces(example: Example) -> list[str]:
    return [example.fields[name] for name in PIECES]


TEXT = "Bo Lee was born in York ."
WORDS = ((0, 2), (3, 6), (7, 10), (11, 15), (16, 18), (19, 23), (24, 25))
BORN = relation(TEXT, (0, 6), (19, 23), "born in")


# Markers


def test_the_fields_and_spans_of_a_relation() -> None:
    assert BORN.fields == {
        "text": TEXT,
        "head": "Bo Lee",
        "tail": "York",
        "marked": "<e1> Bo Lee </e1> was born in <e2> York </e2> .",
        "before": "",
        "first": "<e1> Bo Lee </e1>",
        "between": " was born in ",
        "second": "<e2> York </e2>",
        "after": " .",
    }
    assert BORN.spans == (Span(0, 6, "head"), Span(19, 23, "tail"))
    assert (BORN.label, BORN.words) == ("born in", ())
    turned = relation(TEXT, (19, 23), (0, 6), markers=("[1]", "[/1]", "[2]", "[/2]"))
    assert turned.fields["marked"] == "[2]Bo Lee[/2] was born in [1]York[/1] ."
    assert pieces(turned) == ["", "[2]Bo Lee[/2]", " was born in ", "[1]York[/1]", " ."]
    assert turned.spans == (Span(0, 6, "tail"), Span(19, 23, "head"))


@pytest.mark.parametrize(
    ("head", "tail", "marked"),
    [
        ((0, 2), (2, 4), "(ab)[cd]ef"),
        ((2, 4), (0, 2), "[ab](cd)ef"),
        ((0, 2), (0, 4), "[(ab)cd]ef"),
        ((0, 4), (0, 2), "([ab]cd)ef"),
        ((2, 4), (0, 4), "[ab(cd)]ef"),
        ((0, 4), (2, 4), "(ab[cd])ef"),
        ((1, 5), (2, 3), "a(b[c]de)f"),
        ((0, 4), (0, 4), "([abcd])ef"),
        ((0, 3), (2, 5), "(ab[c)de]f"),
        ((5, 6), (0, 1), "[a]bcde(f)"),
    ],
)
def test_markers_of_mentions_that_touch_or_hold_each_other(
    head: tuple[int, int], tail: tuple[int, int], marked: str
) -> None:
    example = relation("abcdef", head, tail, markers=("(", ")", "[", "]"))
    assert example.fields["marked"] == marked
    assert "".join(pieces(example)) == marked
    if head[0] < tail[1] and tail[0] < head[1]:
        assert pieces(example)[2:4] == ["", ""]


places = st.tuples(st.integers(0, 9), st.integers(1, 5)).map(lambda pair: (pair[0], min(10, pair[0] + pair[1])))


@quick
@given(places, places)
def test_without_its_markers_a_marked_text_is_the_text(head: tuple[int, int], tail: tuple[int, int]) -> None:
    example = relation("0123456789", head, tail, markers=("(", ")", "[", "]"))
    marked = example.fields["marked"]
    assert "".join(pieces(example)) == marked
    assert re.sub(r"[()\[\]]", "", marked) == example.fields["text"] == "0123456789"
    assert re.sub(r"[\[\]]", "", marked[marked.index("(") + 1 : marked.index(")")]) == example.fields["head"]
    assert re.sub(r"[()]", "", marked[marked.index("[") + 1 : marked.index("]")]) == example.fields["tail"]


@pytest.mark.parametrize("place", [(3, 3), (-1, 2), (4, 11), (5, 4)])
def test_a_mention_that_is_nothing(place: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=re.escape(f"the tail is at {place}, which is nothing in a text of 10 char")):
        relation("0123456789", (0, 1), place)


def test_a_template_keeps_the_mentions_whatever_is_cut() -> None:
    template = "{before|truncate:head}{first|keep}{between}{second|keep}{after} {mask}"
    assert str(parse(template)) == template
    backbone = zoo.build("bert")
    model = Model(backbone, Task(template, {"a": "good", "b": "bad"}, max_length=48), [])
    filler = "the cat sat on the mat ; " * 9
    text = f"{filler}the dog {filler}was not there {filler}"
    dog, there = ((text.index(words), text.index(words) + len(words)) for words in ("dog", "not there"))
    for example in (relation(text, dog, there), relation(text, there, dog)):
        (row,) = model.encode([example])[0].variants
        shown = backbone.tokenizer.decode([i for i in row.ids if i < backbone.vocabulary])
        assert len(row.ids) <= 48
        assert shown.count("dog") == shown.count("not there") == 1


# Forms


@pytest.mark.parametrize(
    "row",
    [
        {"text": TEXT, "head": {"start": 0, "end": 6}, "tail": {"start": "19", "end": 23}},
        {"text": TEXT, "head": "Bo Lee", "tail": "York"},
        {"text": "<e1>Bo Lee</e1> was born in <e2>York</e2> ."},
        {"text": "<e1> Bo Lee </e1> was born in <e2> York </e2> ."},
    ],
)
def test_rows_of_texts(tmp_path: Path, row: dict[str, object]) -> None:
    path = rows(tmp_path / "a.jsonl.gz", row | {"relation": "born in", "source": "web", "n": 3})
    assert read_relations(path) == [
        Example({"source": "web", "n": "3", **BORN.fields}, "born in", spans=BORN.spans),
    ]
    assert read_relations(path, labelled=False)[0].label is None
    assert read_relations(path, label="source")[0].label == "web"


@pytest.mark.parametrize(
    "row",
    [
        {"head": {"name": "bo lee", "id": "Q1", "pos": [0, 1]}, "tail": {"name": "york", "id": "Q2", "pos": [5]}},
        {"h": ["bo lee", "Q1", [[0, 1], [4]]], "t": ["york", "Q2", [[5], [0]]]},
        {"head": {"pos": [[0, 1]]}, "tail": {"pos": [[5]]}},
        {"head": {"pos": [[0, 1], [2], [4]]}, "tail": {"pos": [[5], [2], [3]]}},
    ],
)
def test_rows_of_tokens(tmp_path: Path, row: dict[str, object]) -> None:
    path = rows(tmp_path / "a.jsonl", {"tokens": TEXT.split(), "relation": "born in", **row})
    (found,) = read_relations(path)
    assert found == Example(BORN.fields, "born in", spans=BORN.spans, words=WORDS)


def test_an_object_of_relations_as_fewrel_has_it(tmp_path: Path) -> None:
    one = {"tokens": TEXT.split(), "h": ["bo lee", "Q1", [[0, 1]]], "t": ["york", "Q2", [[5]]]}
    path = written(tmp_path / "val.json", json.dumps({"P19": [one, one], "P20": [one]}))
    found = read_relations(path)
    assert [e.label for e in found] == ["P19", "P19", "P20"]
    assert {e.fields["marked"] for e in found} == {BORN.fields["marked"]}
    assert [e.label for e in read_relations(path, label="kind", limit=1)] == ["P19"]
    alone = written(tmp_path / "alone.json.gz", json.dumps([one]))
    assert [e.label for e in read_relations(alone, labelled=False)] == [None]
    with pytest.raises(DataError, match="alone.json.gz, row 1: no column 'relation' for the label"):
        read_relations(alone)
    with pytest.raises(
        DataError, match=re.escape(f"{path}, 'P20': holds 3; a .json file is a list of rows, or an obj")
    ):
        read_relations(written(path, json.dumps({"P19": [one], "P20": 3})))
    with pytest.raises(DataError, match="'P19', row 1: holds 3; each row is an object"):
        read_relations(written(path, json.dumps({"P19": [3]})))


def test_semeval_as_it_is_published(tmp_path: Path) -> None:
    text = (
        '1\t"The <e1>fire</e1> caused <e2>damage</e2>."\nCause-Effect(e1,e2)\nComment: a\ttab\n\n'
        '2\t"A "<e2>wheel</e2>" of a <e1>car</e1>."\r\nComponent-Whole(e2,e1)\r\n\r\n'
    )
    found = read_relations(written(tmp_path / "TRAIN_FILE.TXT", text))
    assert [(e.fields["text"], e.fields["head"], e.fields["tail"], e.label) for e in found] == [
        ("The fire caused damage.", "fire", "damage", "Cause-Effect(e1,e2)"),
        ('A "wheel" of a car.', "car", "wheel", "Component-Whole(e2,e1)"),
    ]
    assert found[1].fields["marked"] == 'A "<e2> wheel </e2>" of a <e1> car </e1>.'
    bare = written(tmp_path / "test.txt", '8\t"<e1>a</e1> <e2>b</e2>"\n9\t"<e1>c</e1> <e2>d</e2>"\n')
    assert [e.fields["text"] for e in read_relations(bare, labelled=False)] == ["a b", "c d"]
    with pytest.raises(DataError, match="test.txt, line 1: no column 'relation' for the label"):
        read_relations(bare)
    with pytest.raises(DataError, match="line 1: got 'He sat'; possible: a number, a tab and"):
        read_relations(written(bare, "He sat\n"))


def test_lines_of_head_tail_relation_and_text(tmp_path: Path) -> None:
    found = read_relations(
        written(tmp_path / "a.txt", "2008\t北京\t举办\t北京2008年奥运会\n上航\t东航\tunknown\t东航与上航合并\n")
    )
    assert [(e.fields["marked"], e.label) for e in found] == [
        ("<e2> 北京 </e2><e1> 2008 </e1>年奥运会", "举办"),
        ("<e2> 东航 </e2>与<e1> 上航 </e1>合并", "unknown"),
    ]


@pytest.mark.parametrize(
    ("text", "head", "tail", "marked"),
    [
        ("我和我同事", "我", "我同事", "<e1> 我 </e1>和<e2> 我同事 </e2>"),
        ("他的助手和他", "他", "他的助手", "<e2> 他的助手 </e2>和<e1> 他 </e1>"),
        ("a a b", "a", "a", "<e1> a </e1> <e2> a </e2> b"),
        ("a b", "a", "a", "<e1> <e2> a </e2> </e1> b"),
        ("黑狗的尾巴", "黑狗的尾巴", "黑狗", "<e1> <e2> 黑狗 </e2>的尾巴 </e1>"),
        ("aXa+b", "+", "X", "a<e2> X </e2>a<e1> + </e1>b"),
        ("a concatenated cat sat", "cat", "sat", "a concatenated <e1> cat </e1> <e2> sat </e2>"),
        ("cats, 9cat, cat\u0301 (cat)", "cat", "s", "cat<e2> s </e2>, 9cat, cat\u0301 (<e1> cat </e1>)"),
        ("cats and dogs", "cat", "dog", "<e1> cat </e1>s and <e2> dog </e2>s"),
        ("我在中国人中", "中", "国人", "我在<e1> 中 </e1><e2> 国人 </e2>中"),
    ],
)
def test_mentions_are_looked_for_where_they_do_not_overlap(
    tmp_path: Path, text: str, head: str, tail: str, marked: str
) -> None:
    (found,) = read_relations(rows(tmp_path / "a.jsonl", {"text": text, "head": head, "tail": tail, "relation": "x"}))
    assert found.fields["marked"] == marked


# What is wrong


def test_a_mention_that_is_not_in_the_text_is_an_error_or_left_out(tmp_path: Path) -> None:
    good = {"text": TEXT, "head": "Bo Lee", "tail": "York", "relation": "born in"}
    path = rows(tmp_path / "a.jsonl", good, good | {"tail": "Rome"}, good | {"relation": None}, good | {"head": " "})
    with pytest.raises(
        DataError, match="line 2: the tail 'Rome' is not in the text 'Bo Lee was.*; write it as it stands"
    ):
        read_relations(path)
    left = list[str]()
    assert read_relations(path, on_empty=left.append) == [BORN]
    assert [re.sub(".*line ", "", one)[:30] for one in left] == [
        "2: the tail 'Rome' is not in t",
        "3: the label is missing: colum",
        "4: the head is missing: column",
    ]
    with pytest.raises(DataError, match="there are no relations; at least one is needed"):
        read_relations(rows(tmp_path / "b.jsonl", good | {"tail": "Rome"}), on_empty=left.append)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a"}, "line 1: no text; possible: sentence"),
        ({"text": "a b"}, "line 1: no mentions in the columns text; possible: text with head and tail"),
        ({"text": "a b", "head": "a"}, "line 1: no mentions in the columns text, head; possible"),
        ({"text": "ab", "head": {"start": 0, "end": 3}, "tail": {"start": 0, "end": 1}}, "'head.end' holds 3; a place"),
        (
            {"text": "ab", "head": {"start": 1, "end": 1}, "tail": {"start": 0, "end": 1}},
            "the head is from 1 to 1, which",
        ),
        (
            {"tokens": ["a"], "head": {"pos": [0]}, "tail": {"pos": [1]}},
            "the tokens of the tail are [1]; numbers from 0",
        ),
        ({"tokens": ["a"], "head": {"pos": []}, "tail": {"pos": [0]}}, "the tokens of the head are []; numbers from 0"),
        ({"tokens": ["a"], "h": ["a", "Q", []], "t": ["a", "Q", [[0]]]}, "the tokens of the head are []"),
        ({"tokens": ["a"], "head": "a", "tail": "a"}, "the tokens of the head are None; numbers from 0 to 0"),
        ({"text": "<e1>a</e1> <e1>b</e1> <e2>c</e2>"}, "<e1> stands twice in '<e1>a</e1> <e1>b"),
        ({"text": "<e1></e1> <e2>c</e2>"}, "a mention is empty in '<e1></e1> <e2>c"),
        ({"text": "</e1>a<e1> <e2>c</e2>"}, "a mention is empty in '</e1>a<e1>"),
        ({"text": "a b", "head": "a", "tail": "b"}, "no column 'relation' for the label"),
    ],
)
def test_rows_that_are_wrong_say_where_and_how(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read_relations(rows(tmp_path / "a.jsonl", row))


def test_options_that_are_wrong(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", {"text": "a b", "head": "a", "tail": "b", "relation": "x"})
    with pytest.raises(ConfigError, match="limit=0: a limit is 1 row or more"):
        read_relations(path, limit=0)
    for markers in (("<e1>", "</e1>"), "()[]"):
        with pytest.raises(ConfigError, match="four are possible, around the head and around the tail"):
            read_relations(path, markers=markers)
    with pytest.raises(ConfigError, match="split='x' is for datasets on the Hub"):
        read_relations(tmp_path / "a.json", split="x")
    with pytest.raises(DataError, match="is neither a file nor a dataset on the Hub"):
        read_relations(tmp_path / "none.json")
    with pytest.raises(DataError, match="none.json.*there are no relations"):
        read_relations(written(tmp_path / "none.json", ""))


# Real data


@pytest.mark.parametrize(
    ("name", "count", "relations", "overlap"),
    [
        ("fewrel/val_wiki", 11200, 16, 0),
        ("fewrel/val_pubmed", 1000, 10, 0),
        ("finre/train", 13486, 44, 0),
        ("finre/test", 3727, 44, 0),
        ("sanwen/dev", 1793, 10, 108),
        ("sanwen/test", 2220, 10, 136),
    ],
)
def test_real_files(data_dir: Path, name: str, count: int, relations: int, overlap: int) -> None:
    path = data_dir / f"{name}.jsonl.gz"
    found = read_relations(path)
    assert (len(found), len(labels_of(found))) == (count, relations)
    assert sum(not e.fields["second"] for e in found) == overlap
    given = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for example, row in zip(found, given, strict=True):
        text = example.fields["text"]
        for span in example.spans:
            assert example.fields[span.label] == text[span.start : span.end]
            named = row[span.label]
            words = " ".join(row["tokens"][i] for i in named["pos"]) if isinstance(named, dict) else named
            assert example.fields[span.label] == words
        bare = example.fields["marked"]
        for marker in MARKERS:
            assert marker in bare
            bare = bare.replace(marker, "")
        assert bare == text
        assert "".join(pieces(example)) == example.fields["marked"]
        assert [text[a:b] for a, b in example.words] == row.get("tokens", [])


def test_relations_without_labels(data_dir: Path) -> None:
    found = read_relations(data_dir / "fewrel/unlabeled_pubmed.jsonl.gz", labelled=False)
    assert len(found) == 2500
    assert {e.label for e in found} == {None}
