"""Texts with spans: tags of every scheme and back, every form of file, and a message for each thing that is wrong."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaprompt.data import in_words, read, read_tagged, span_labels, word_tags
from deltaprompt.data.episodes import Episode
from deltaprompt.data.tagged import coarse, joiner_of, of_words
from deltaprompt.data.tags import KNOWN, SCHEMES, malformed, scheme_of, spans_of, tags_of
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.trainer.plan import told
from deltaprompt.types import Example, Message, Span
from tests.files import rows, written

LABELS = ("PER", "LOC", "person-artist/author")
quick = settings(max_examples=100, deadline=None)


@st.composite
def sentences(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Spans that do not overlap, and how many words there are."""
    found, at = list[Span](), 0
    for gap, length, label in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from(LABELS)))):
        found.append(Span(at + gap, at + gap + length, label))
        at += gap + length
    return found, at + draw(st.integers(0, 2))


# Tags


@quick
@given(sentences(), st.sampled_from([s for s in SCHEMES if s != "io"]))
def test_tags_tell_the_spans_they_were_made_of(sentence: tuple[list[Span], int], scheme: str) -> None:
    spans, count = sentence
    tags = tags_of(spans, count, scheme)
    assert len(tags) == count
    assert spans_of(tags, scheme) == spans
    assert malformed(tags, spans, scheme) == []


@quick
@given(sentences())
def test_neighbours_of_one_label_are_one_in_io(sentence: tuple[list[Span], int]) -> None:
    spans, count = sentence
    tags = tags_of(spans, count, "io")
    found = spans_of(tags, "io")
    assert tags_of(found, count, "io") == tags
    assert {(i, s.label) for s in found for i in range(s.start, s.end)} == {
        (i, s.label) for s in spans for i in range(s.start, s.end)
    }
    assert all(a.end < b.start or a.label != b.label for a, b in pairwise(found))


@pytest.mark.parametrize(
    ("scheme", "tags"),
    [
        ("io", ["x", "x", "x", "O", "y"]),
        ("bio", ["B-x", "I-x", "B-x", "O", "B-y"]),
        ("iob1", ["I-x", "I-x", "B-x", "O", "I-y"]),
        ("bmes", ["B-x", "E-x", "S-x", "O", "S-y"]),
        ("bmeo", ["B-x", "E-x", "S-x", "O", "S-y"]),
        ("bioes", ["B-x", "E-x", "S-x", "O", "S-y"]),
        ("bilou", ["B-x", "L-x", "U-x", "O", "U-y"]),
    ],
)
def test_each_scheme_by_hand(scheme: str, tags: list[str]) -> None:
    spans = [Span(0, 2, "x"), Span(2, 3, "x"), Span(4, 5, "y")]
    assert tags_of(spans, 5, scheme) == tags
    assert spans_of(tags, scheme) == (spans if scheme != "io" else [Span(0, 3, "x"), Span(4, 5, "y")])


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (["O", "O"], "bio"),
        ([], "bio"),
        (["O", "person-actor", "location-GPE"], "io"),
        (["B-x", "I-x", "B-y"], "bio"),
        (["B-x", "O", "I-x"], "bio"),  # the I is malformed: in IOB1 the B would be
        (["I-x", "I-x", "B-x"], "iob1"),
        (["I-x", "O", "I-y"], "iob1"),
        (["B-x", "M-x", "E-x"], "bmes"),
        (["B-x", "E-x", "S-y"], "bmes"),
        (["B-x", "I-x", "E-x"], "bioes"),
        (["S-x", "B-x", "I-x"], "bioes"),
        (["U-x", "O"], "bilou"),
        (["B-x", "I-x", "L-x"], "bilou"),
    ],
)
def test_the_scheme_is_told_by_the_tags(tags: list[str], scheme: str) -> None:
    assert scheme_of([["O"], tags]) == scheme


@pytest.mark.parametrize(
    ("tags", "scheme", "spans", "wrong"),
    [
        (["I-x", "I-x", "I-y"], "bio", [(0, 2, "x"), (2, 3, "y")], [(0, "B-x"), (2, "B-y")]),
        (["O", "E-x", "O"], "bmes", [(1, 2, "x")], [(1, "S-x")]),
        (["B-x", "M-x", "O"], "bmes", [(0, 2, "x")], [(1, "E-x")]),
        (["M-x", "M-x", "E-x", "E-x"], "bmes", [(0, 3, "x"), (3, 4, "x")], [(0, "B-x"), (3, "S-x")]),
        (["B-x", "E-y"], "bmes", [(0, 1, "x"), (1, 2, "y")], [(0, "S-x"), (1, "S-y")]),
        (["B-x", "I-x"], "iob1", [(0, 2, "x")], [(0, "I-x")]),
        (["I-x", "B-y"], "iob1", [(0, 1, "x"), (1, 2, "y")], [(1, "I-y")]),
        (["x", "B-x", "I-x"], "io", [(0, 1, "x"), (1, 3, "x")], []),
    ],
)
def test_malformed_sequences_are_read_as_is_usual(
    tags: list[str], scheme: str, spans: list[tuple[int, int, str]], wrong: list[tuple[int, str]]
) -> None:
    found = spans_of(tags, scheme)
    assert found == spans
    assert malformed(tags, found, scheme) == wrong


@quick
@given(st.lists(st.sampled_from(["O", *(f"{one}-{label}" for one in "BIES" for label in "xy")]), max_size=10))
def test_any_sequence_is_read_as_seqeval_reads_it(tags: list[str]) -> None:
    entities = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="seqeval is not installed")
    expected = [Span(first, last + 1, label) for label, first, last in entities.get_entities(tags)]
    assert spans_of(tags, "bioes") == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tag_of_no_scheme_is_an_error(scheme: str) -> None:
    bad = "" if scheme == "io" else "X-PER"
    with pytest.raises(
        DataError, match=f"tag 2: '{bad}' is no tag of the scheme {scheme}; possible: O, .* mend the tag"
    ):
        spans_of(["O", bad], scheme)
    assert {*SCHEMES[scheme]} <= KNOWN


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 3, "x")], "the span 0 to 3, 'x', is not in a text of 2 words; start is 0 or more"),
        ([(1, 1, "x")], "the span 1 to 1, 'x', is not in a text"),
        ([(0, 2, "x"), (1, 2, "y")], "the spans 0 to 2, 'x', and 1 to 2, 'y', overlap; keep one of them"),
    ],
)
def test_spans_that_have_no_tags(spans: list[tuple[int, int, str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tags_of([Span(*span) for span in spans], 2, "bio")


def test_an_unknown_scheme_names_those_there_are(tmp_path: Path) -> None:
    for ask in (lambda: tags_of([], 1, "bios"), lambda: spans_of([], "bios"), lambda: read_tagged("x", scheme="bios")):
        with pytest.raises(ConfigError, match=r"scheme='bios' is no scheme of tags; did you mean 'bioes' or 'bio'"):
            ask()


# Files

TEXTS = [
    Example(
        {"text": "Ann Lee met Bo"},
        spans=(Span(0, 7, "PER"), Span(12, 14, "PER")),
        words=((0, 3), (4, 7), (8, 11), (12, 14)),
    ),
    Example({"text": "in York"}, spans=(Span(3, 7, "LOC"),), words=((0, 2), (3, 7))),
    Example({"text": "it rains"}, words=((0, 2), (3, 8))),
]
COLUMNS = """-DOCSTART- -X- O

Ann NNP B-PER
Lee NNP I-PER
met VBD O
Bo NNP B-PER


in IN O
York NNP B-LOC
-DOCSTART- -X- O

it PRP O
rains VBZ O
"""


@pytest.mark.parametrize("name", ["a.conll", "a.txt.gz", "a.bio", "a.IOB2"])
@pytest.mark.parametrize("change", [str, lambda text: text.replace(" ", "\t"), lambda text: text.replace("\n", "\r\n")])
def test_columns(tmp_path: Path, name: str, change: Callable[[str], str]) -> None:
    path = written(tmp_path / name, "\ufeff" + change(COLUMNS))
    assert read_tagged(path) == TEXTS
    assert read_tagged(path, limit=2) == TEXTS[:2]
    bare = [Example(e.fields, words=e.words) for e in TEXTS]
    assert read_tagged(path, labelled=False) == bare


def test_tokens_alone_where_no_tags_are_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "Ann\nsat\n\nit\n")
    assert [e.fields["text"] for e in read_tagged(path, labelled=False)] == ["Ann sat", "it"]
    with pytest.raises(
        DataError, match="a.txt, line 1: got 'Ann'; a line is a token and its tag, with a tab or blanks"
    ):
        read_tagged(path)


def test_few_nerd_text(tmp_path: Path) -> None:
    text = "Bo\tperson-artist/author\nLee\tperson-artist/author\nin\tO\nYork\tlocation-GPE\n\nit\tO\n"
    found = read_tagged(written(tmp_path / "train.txt", text))
    assert found[0].spans == (Span(0, 6, "person-artist/author"), Span(10, 14, "location-GPE"))
    assert [s.label for s in coarse(found)[0].spans] == ["person", "location"]
    assert coarse(found)[0].words == found[0].words
    assert span_labels(found) == ("location-GPE", "person-artist/author")


TAGS = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-LOC"], ["O", "O"]]
WORDS = [e.fields["text"].split() for e in TEXTS]


@pytest.mark.parametrize(("words", "tags"), [("tokens", "tags"), ("words", "ner_tags"), ("word", "label"), ("a", "b")])
def test_rows_of_words_and_tags(tmp_path: Path, words: str, tags: str) -> None:
    given = [{words: w, tags: t, "id": n, "intent": "go"} for n, (w, t) in enumerate(zip(WORDS, TAGS, strict=True))]
    named = {"words": "a", "tags": "b"} if words == "a" else {}
    found = read_tagged(rows(tmp_path / "a.jsonl", *given), **named)
    assert [Example({"text": e.fields["text"]}, None, spans=e.spans, words=e.words) for e in found] == TEXTS
    assert [(e.fields["id"], e.fields["intent"]) for e in found] == [("0", "go"), ("1", "go"), ("2", "go")]
    assert [word_tags(e) for e in found] == TAGS


@pytest.mark.parametrize("column", ["spans", "entities", "label"])
def test_rows_of_a_text_and_its_spans(tmp_path: Path, column: str) -> None:
    path = rows(
        tmp_path / "a.jsonl",
        {"text": "Ann met Bo.", column: [{"start": 8, "end": 10, "type": "PER"}, [0, 3, "PER"]], "id": "7"},
        {"text": "It rains.", column: []},
        {"text": "York", column: [{"start": 0, "end": "4", "label": "LOC", "score": 0.5}]},
    )
    assert read_tagged(path) == [
        Example({"text": "Ann met Bo.", "id": "7"}, spans=(Span(0, 3, "PER"), Span(8, 10, "PER"))),
        Example({"text": "It rains."}),
        Example({"text": "York"}, spans=(Span(0, 4, "LOC"),)),
    ]
    assert read_tagged(path, tags=column) == read_tagged(path)
    assert [e.spans for e in read_tagged(path, labelled=False)] == [(), (), ()]


def test_a_dataset_on_the_hub_whose_tags_are_numbers_with_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class ClassLabel:
        names = ("O", "B-PER", "I-PER", "B-LOC")

    class Sequence:
        def __init__(self, feature: object) -> None:
            self.feature = feature

    class Rows(list[dict[str, object]]):
        features = {"tokens": Sequence(object()), "ner_tags": Sequence(ClassLabel())}  # noqa: RUF012

    numbers = [[ClassLabel.names.index(tag) for tag in tags] for tags in TAGS]
    data = Rows({"tokens": w, "ner_tags": n} for w, n in zip(WORDS, numbers, strict=True))
    module = SimpleNamespace(load_dataset=lambda *_, **__: data, ClassLabel=ClassLabel, Sequence=Sequence)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_tagged("hf:conll2003", split="train") == TEXTS
    with pytest.raises(ConfigError, match="'hf:conll2003' needs a split"):
        read_tagged("hf:conll2003")


def test_words_are_joined_by_nothing_where_each_is_a_character(tmp_path: Path) -> None:
    text = "高 B-NAME\n勇 E-NAME\n， O\nA O\n\n男 O\n"
    first, second = read_tagged(written(tmp_path / "a.bmes", text))
    assert first == Example({"text": "高勇，A"}, spans=(Span(0, 2, "NAME"),), words=((0, 1), (1, 2), (2, 3), (3, 4)))
    assert second.fields["text"] == "男"
    assert read_tagged(tmp_path / "a.bmes", joiner=" ")[0].spans == (Span(0, 3, "NAME"),)
    assert [joiner_of(texts) for texts in ([["中国", "人"]], [["a", "b"]], [["a"], ["中"]], [[]])] == [
        " ",
        " ",
        "",
        " ",
    ]
    assert [joiner_of([[c]]) for c in "中あア한𠀀a。"] == ["", "", "", "", "", " ", " "]


def test_malformed_tags_are_told(tmp_path: Path) -> None:
    path, seen = written(tmp_path / "a.conll", "a B-x\nb O\nc I-x\n\nd I-y\n"), list[str]()
    assert [e.spans for e in read_tagged(path, on_malformed=seen.append)] == [
        (Span(0, 1, "x"), Span(4, 5, "x")),
        (Span(0, 1, "y"),),
    ]
    assert seen == [
        f"{path}, line 3: 'I-x' is read as 'B-x' of the scheme bio",
        f"{path}, line 5: 'I-y' is read as 'B-y' of the scheme bio",
    ]


@quick
@given(sentences())
def test_spans_in_words_are_those_of_the_tags(sentence: tuple[list[Span], int]) -> None:
    spans, count = sentence
    example = of_words([f"w{i}" for i in range(count)], spans)
    assert in_words(example) == spans
    assert word_tags(example, "bilou") == tags_of(spans, count, "bilou")
    for span, (first, end, _) in zip(example.spans, spans, strict=True):
        words = [example.fields["text"][a:b] for a, b in example.words[first:end]]
        assert example.fields["text"][span.start : span.end] == " ".join(words)


def test_a_span_that_cuts_a_word_has_no_tags() -> None:
    example = Example({"text": "Ann sat"}, spans=(Span(0, 2, "x"),), words=((0, 3), (4, 7)))
    with pytest.raises(DataError, match="the span 'An', 0 to 2, does not begin and end where words do; the text has 2"):
        word_tags(example)


# What is wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.conll: there are no texts; at least one is needed"),
        ("\n\n-DOCSTART- O\n", "there are no texts"),
        ("a O\nb\n", "line 2: got 'b'; a line is a token and its tag, with a tab or blanks between, or is blank"),
        ("a\tO\n\tO\n", "line 2: got 'O'; a line is a token and its tag"),
        ("a\tO\nb\t\n", "line 2: got 'b'; a line is"),
        ("a O\nb X O\n", "line 2: 3 columns where line 1 has 2: 'b X O'; a line is a token, its tag last"),
        (
            "a B-x\n\nb O\nc X-x\n",
            "line 4: 'X-x' is no tag of the scheme bio; possible: O, B-…, I-…; mend the tag, or name",
        ),
        ("a B-x\nb person-x\n", "line 2: 'person-x' is no tag of the scheme bio"),
        ("a B-x\nb M-x\nc I-x\n", "line 3: 'I-x' is no tag of the scheme bmes; possible: O, B-…, E-…, M-…, S-…"),
        ("He sat\nShe stood\n", "no tag is 'O' and none begins with B- or I-, the first is 'sat': are these tags"),
        ("a\tO\nb\0\tO\n", "line 2: holds a NUL byte"),
    ],
)
def test_columns_that_are_wrong_say_where_and_how(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read_tagged(written(tmp_path / "a.conll", text))


def test_a_scheme_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.conll", "He PER\nsat PER\n")
    assert read_tagged(path, scheme="io")[0].spans == (Span(0, 6, "PER"),)
    with pytest.raises(DataError, match="line 1: 'PER' is no tag of the scheme bio"):
        read_tagged(path, scheme="bio")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 1: 2 words and 1 tags; each word has one"),
        ({"tokens": [], "tags": []}, "line 1: column 'tokens': there are no words; write it, or remove the row"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "line 1: column 'tokens': word 2 is empty"),
        ({"tokens": ["a", 1], "tags": ["O", "O"]}, "line 1: column 'tokens' holds ['a', 1]; a list of texts"),
        ({"tokens": ["a"], "tags": [3]}, "column 'tags' holds [3], numbers without names; write the names of the tags"),
        ({"tokens": ["a"], "tags": ["X-x"]}, "line 1: column 'tags', tag 1: 'X-x' is"),
        (
            {"tokens": ["a"], "tag": ["O"]},
            "line 1: no words and tags, nor a text and its spans; did you mean 'tokens'?",
        ),
        ({"tokens": "a", "tags": ["O"]}, "line 1: no words and tags, nor a text and its spans"),
        ({"text": "a"}, "line 1: a text without a list of its spans"),
        ({"text": "  ", "spans": []}, "line 1: the text is blank; write one, or remove the row"),
        (
            {"text": "abc", "spans": [[0, 4, "x"]]},
            "column 'spans', span 1: its end holds 4; a place in the text is 0 to 3",
        ),
        ({"text": "abc", "spans": [[-1, 2, "x"]]}, "span 1: its start holds -1; a place in the text is 0 to 3"),
        ({"text": "abc", "spans": [[2, 2, "x"]]}, "line 1: the span 2 to 2, 'x', is not in a text of 3 characters"),
        (
            {"text": "abc", "spans": [[0, 2, "x"], [1, 3, "y"]]},
            "line 1: the spans 0 to 2, 'x', and 1 to 3, 'y', overlap",
        ),
        ({"text": "abc", "spans": [[0, 2]]}, 'span 1 is [0, 2]; possible: {"start": 0, "end": 3, "label": "PER"} or'),
        ({"text": "abc", "spans": [{"start": 0, "end": 2}]}, "span 1 is {'start': 0, 'end': 2}; possible"),
        ({"text": "abc", "spans": [[0, 2, " "]]}, "span 1 has the label ' '; a label is a text that is not blank"),
    ],
)
def test_rows_that_are_wrong_say_where_and_how(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read_tagged(rows(tmp_path / "a.jsonl", row), scheme="bio" if "X-x" in str(row) else None)


def test_options_that_are_wrong(tmp_path: Path) -> None:
    path = written(tmp_path / "a.conll", COLUMNS)
    with pytest.raises(ConfigError, match="limit=0: a limit is 1 text or more"):
        read_tagged(path, limit=0)
    with pytest.raises(ConfigError, match=r"split='train' is for datasets on the Hub \(hf:name\); .* leave it out"):
        read_tagged(path, split="train")
    with pytest.raises(DataError, match="is neither a file nor a dataset on the Hub"):
        read_tagged(tmp_path / "b.jsonl")


# The rest of an example


def test_spans_cost_other_examples_nothing_and_count_in_a_digest(tmp_path: Path) -> None:
    (plain,) = read(rows(tmp_path / "a.jsonl", {"text": "Ann", "label": "x"}))
    assert plain.spans is Example({}).spans
    assert plain.words is Example({}).words
    assert sys.getsizeof(plain) <= 16 + 8 * 9
    marked = Example(plain.fields, plain.label, spans=(Span(0, 3, "PER"),))
    assert told([plain]) != told([marked])
    with pytest.raises(AttributeError):
        Span(0, 3, "PER").other = 1  # type: ignore[attr-defined]  # it has slots


def test_a_digest_tells_every_part_of_examples_and_episodes() -> None:
    one, other = Example({"text": "a"}, "x"), Example({"text": "b"}, "x")
    fields = {"text": "a"}
    different = [
        [one],
        [other],
        [one, other],
        [Example(fields)],
        [Example(fields, labels=("x",))],
        [Example(fields, references=("x",))],
        [Example(fields, messages=(Message("user", "x"),))],
        [Example(fields, "x", words=((0, 1),))],
        [Example(fields, "x", spans=(Span(0, 1, "x"),))],
        [Episode((one,), (other,), ("x",))],
        [Episode((one, other), (), ("x",))],
        [Episode((one,), (other,), ("y",))],
    ]
    assert len(set(map(told, different))) == len(different)
    assert told([Example({"a": "1", "b": "2"})]) == told([Example(MappingProxyType({"b": "2", "a": "1"}))])


@pytest.mark.parametrize(
    ("name", "texts", "labels", "spans", "odd", "joiner"),
    [
        ("crossner/ai_train", 100, 14, 532, 0, " "),
        ("crossner/science_test", 543, 17, 3089, 0, " "),
        ("wikigold/train", 1216, 4, 2518, 0, " "),
        ("snips/test", 700, 39, 1794, 0, " "),
        ("resume_ner/train", 3821, 8, 13440, 4, ""),
        ("weibo_ner/train", 1350, 8, 1895, 10, ""),
        ("anem/train", 2815, 11, 1879, 0, " "),
        ("sec_filings/train", 1164, 4, 1168, 0, " "),
    ],
)
def test_real_files(data_dir: Path, name: str, texts: int, labels: int, spans: int, odd: int, joiner: str) -> None:
    seen = list[str]()
    path = data_dir / f"{name}.jsonl.gz"
    found = read_tagged(path, on_malformed=seen.append)
    assert (len(found), len(span_labels(found)), sum(len(e.spans) for e in found), len(seen)) == (
        texts,
        labels,
        spans,
        odd,
    )
    given = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    scheme = "bmes" if name.startswith("resume") else "bio"
    for example, row in zip(found, given, strict=True):
        assert example.fields["text"] == joiner.join(row["tokens"])
        assert [example.fields["text"][a:b] for a, b in example.words] == row["tokens"]
        if not odd:
            assert word_tags(example, scheme) == row["tags"]
