"""Entity rows: every form of them, PLET's templates over them, and pairs that mention one entity or two."""

from collections import Counter

import pytest

from deltaprompt.data import labels_of
from deltaprompt.data.entities import BLANK, hidden, mention, read_entities
from deltaprompt.data.linked import Linked, entity_of, find_mentions, grouped, rows_of_pair
from deltaprompt.data.tags import spans_of
from deltaprompt.errors import ConfigError, DataError, TemplateError
from deltaprompt.model import Model, Task
from deltaprompt.templates import entity, parse
from deltaprompt.types import Example
from deltaprompt.verbalizers.hierarchical import Hierarchical
from tests import backbones_zoo as zoo
from tests.files import rows, written

FEW_NERD = """Ann\tperson-actor
Lee\tperson-actor
met\tO
Bo\tperson-artist/author
in\tO
New\tlocation-GPE
York\tlocation-GPE

It\tO
rained\tO

Bo\tB-person-other
Bo\tB-person-other
Lee\tI-person-other
"""


def told(example):
    return [example.fields[name] for name in ("left", "mention", "right")]


# Reading


@pytest.mark.parametrize("name", ["a.txt", "a.conll.gz", "a.iob"])
def test_a_run_of_one_tag_is_a_mention(tmp_path, name):
    found = read_entities(written(tmp_path / name, FEW_NERD))
    assert [(told(e), e.label) for e in found] == [
        (["", "Ann Lee", " met Bo in New York"], "person-actor"),
        (["Ann Lee met ", "Bo", " in New York"], "person-artist/author"),
        (["Ann Lee met Bo in ", "New York", ""], "location-GPE"),
        (["", "Bo", " Bo Lee"], "person-other"),
        (["Bo ", "Bo Lee", ""], "person-other"),
    ]
    assert all(e.fields["text"] == "".join(told(e)) and e.labels == () for e in found)
    assert read_entities(tmp_path / name, labelled=False, limit=2) == [Example(e.fields) for e in found[:2]]


def test_tokens_and_tags_may_be_the_columns_of_a_row(tmp_path):
    row = {"tokens": ["the", "cat", "sat"], "tags": ["O", "I-X", "B-X"], "id": 3}
    assert [(told(e), e.label) for e in read_entities(rows(tmp_path / "a.jsonl", row))] == [
        (["the ", "cat", " sat"], "X"),
        (["the cat ", "sat", ""], "X"),
    ]


@pytest.mark.parametrize(
    "tags",
    [
        ["B-PER", "M-PER", "E-PER", "O", "S-LOC"],
        ["B-PER", "I-PER", "E-PER", "O", "S-LOC"],
        ["B-PER", "I-PER", "L-PER", "O", "U-LOC"],
        ["B-PER", "I-PER", "I-PER", "O", "B-LOC"],
        ["I-PER", "I-PER", "I-PER", "O", "I-LOC"],
        ["PER", "PER", "PER", "O", "LOC"],
    ],
)
def test_the_tags_of_all_rows_tell_their_scheme(tmp_path, tags):
    words, last = ["Anna", "van", "Dam", "in", "Rome"], {"tokens": ["Oslo"], "tags": tags[-1:]}
    found = read_entities(rows(tmp_path / "a.jsonl", {"tokens": words, "tags": tags}, last))
    assert [(e.fields["mention"], e.label) for e in found] == [
        ("Anna van Dam", "PER"),
        ("Rome", "LOC"),
        ("Oslo", "LOC"),
    ]
    with pytest.raises(DataError, match="line 1: tag 2: 'M-PER' is no tag of the scheme bilou"):
        read_entities(rows(tmp_path / "b.jsonl", {"tokens": words, "tags": ["B-PER", "M-PER", "L-PER", "O", "U-LOC"]}))


def test_a_scheme_may_be_named(tmp_path):
    path = written(tmp_path / "a.txt", "Ann person\nx@y.org E-mail\nit O\n")
    with pytest.raises(DataError, match="line 1: tag 1: 'person' is no tag of the scheme bmes.*name another"):
        read_entities(path)
    assert [e.label for e in read_entities(path, scheme="io")] == ["person", "E-mail"]
    with pytest.raises(ConfigError, match="scheme='iox' is no scheme of tags"):
        read_entities(path, scheme="iox")


def test_chinese_tokens_stand_side_by_side(tmp_path):
    tagged = {"tokens": [*"他在北京。"], "tags": ["O", "O", "B-LOC", "I-LOC", "O"]}
    around = {"left": [*"他在"], "mention": "北京", "right": ["。"], "label": "LOC"}
    for row in (tagged, around):
        assert [told(e) for e in read_entities(rows(tmp_path / "a.jsonl", row))] == [["他在", "北京", "。"]]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ([], []),
        (["O", "O"], []),
        (["a", "a", "b"], [(0, 2, "a"), (2, 3, "b")]),
        (["I-a", "I-a", "O", "I-a"], [(0, 2, "a"), (3, 4, "a")]),
        (["B-a", "I-a", "B-a", "I-b"], [(0, 2, "a"), (2, 3, "a"), (3, 4, "b")]),
    ],
)
def test_spans(tags, found):
    assert spans_of(tags, "io") == found


def test_a_place_in_the_text_or_the_context_says_where_a_mention_is(tmp_path):
    path = rows(
        tmp_path / "a.jsonl",
        {"text": "He saw (Ann) .", "start": 8, "end": 11, "labels": ["person", "actor", "person"]},
        {"left": ["He", "saw"], "mention": "New York", "right": ["."], "labels": ["place"]},
        {"left": [], "mention": "He", "right": [], "label": "person"},
        {"left": "He saw (", "mention": "Ann", "right": ").", "label": 3},
        {"left": "in", "mention": "York", "right": "it rains", "label": "x"},
        {"left": None, "mention": "York", "right": "", "label": "x"},
    )
    found = read_entities(path)
    assert [told(e) for e in found] == [
        ["He saw (", "Ann", ") ."],
        ["He saw ", "New York", " ."],
        ["", "He", ""],
        ["He saw (", "Ann", ")."],
        ["in ", "York", " it rains"],
        ["", "York", ""],
    ]
    assert [(e.label, e.labels) for e in found[:4]] == [
        (None, ("person", "actor")),
        (None, ("place",)),
        ("person", ()),
        ("3", ()),
    ]


def test_who_is_mentioned_is_kept_and_types_may_have_another_column(tmp_path):
    row = {"text": "Ann sat", "start": 0, "end": 3, "entity": "Q1", "coarse": "person", "kinds": ["x"], "label": "no"}
    (found,) = read_entities(rows(tmp_path / "a.jsonl", row), label="kinds")
    assert (found.fields["entity"], found.fields["coarse"], found.labels) == ("Q1", "person", ("x",))
    assert "kinds" not in found.fields
    assert hidden(found).fields["entity"] == "Q1"


def test_a_mention_without_a_type_is_an_error_or_left_out(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"text": "Ann", "start": 0, "end": 3, "labels": []})
    with pytest.raises(DataError, match="line 1: the label is missing: column 'labels' holds"):
        read_entities(path)
    left = []
    with pytest.raises(DataError, match="there are no mentions"):
        read_entities(path, on_empty=left.append)
    assert len(left) == 1
    assert len(read_entities(path, labelled=False)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 1: no mention in the columns text; possible: text, start, end; left, mention"),
        ({"text": "abc", "start": 1, "end": 4, "label": "x"}, "column 'end' holds 4; a place in the text is 0 to 3"),
        ({"text": "abc", "start": "x", "end": 1, "label": "x"}, "column 'start' holds 'x'; a place"),
        ({"text": "a  b", "start": 1, "end": 3, "label": "x"}, "the mention is blank"),
        ({"tokens": ["a"], "tags": []}, "1 tokens and 0 tags; each token has one"),
        ({"tokens": ["a", 1], "tags": ["O", "O"]}, "a list of texts is possible"),
        ({"left": 3, "mention": "a", "right": "", "label": "x"}, "column 'left' holds 3; a text is possible"),
        ({"text": "abc", "start": 0, "end": 1}, "no column 'labels' for the label"),
    ],
)
def test_a_row_that_is_wrong_says_where_and_how(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_entities(rows(tmp_path / "a.jsonl", row))


def test_a_line_that_is_no_token_and_tag_says_where(tmp_path):
    with pytest.raises(DataError, match=r"a.txt, line 2: got 'b'; a line is a token and its tag, with a tab or blanks"):
        read_entities(written(tmp_path / "a.txt", "a\tO\nb\n"))
    with pytest.raises(DataError, match=r"a.txt, line 2: 3 columns where line 1 has 2: 'It may rain'; a line is"):
        read_entities(written(tmp_path / "a.txt", "It rains\nIt may rain\n"))
    with pytest.raises(ConfigError, match="split='train' is for datasets on the Hub"):
        read_entities(tmp_path / "a.txt", split="train")
    with pytest.raises(DataError, match="data files in"):
        read_entities(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="limit=0"):
        read_entities(tmp_path / "a.txt", limit=0)


def test_real_files_of_every_form(data_dir):
    left = []
    general = read_entities(data_dir / "open_entity/general9_train.jsonl.gz", on_empty=left.append)
    assert (len(general), len(left)) == (1644, 354)
    assert {*labels_of(general)} == {*(data_dir / "open_entity/general9_types.txt").read_text().split()}
    fine = read_entities(data_dir / "open_entity/dev.jsonl.gz")
    assert len(fine) == 1998
    assert max(len(e.labels) for e in fine) > 5
    gold = read_entities(data_dir / "wikigold/test.jsonl.gz")
    assert Counter(e.label for e in gold).keys() == {"PER", "LOC", "ORG", "MISC"}
    for e in (*general, *fine, *gold):
        assert e.fields["text"] == "".join(told(e))


# Templates


@pytest.mark.parametrize("template", [entity.HARD1, entity.HARD2, entity.HARD3, entity.soft(), entity.soft(5)])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_the_mention_stays_whatever_is_cut(template, family):
    assert str(parse(template)) == template
    backbone = zoo.build(family)
    words = {"a": "good", "b": "bad"}
    task = Task(template, words, Hierarchical(words=words), max_length=56)
    model = Model(backbone, task, [])
    example = mention("the cat sat on the mat ; " * 9, "the dog", " was not there , the cat sat on the mat" * 9)
    (row,) = model.encode([example])[0].variants
    assert len(row.ids) <= 56
    plain = [i for i in row.ids if i < backbone.vocabulary]
    text = backbone.tokenizer.decode(plain)
    assert text.count("dog") == 2
    assert "mat ; the dog was not there" in text.replace(" ;", ";").replace(";", " ;")  # what is nearest stays


def test_soft_templates_have_one_token_before_and_some_behind_the_mention():
    assert [soft.size for soft in parse(entity.soft(3)).softs] == [1, 3]
    with pytest.raises(TemplateError, match="got length 0; 1 or more"):
        entity.soft(0)


# Pairs


def linked(name, text, **more):
    row = mention(f"{text} ", name, " sat")
    return Example({**row.fields, **more})


ROWS = [linked(name, str(i)) for i, name in enumerate(["Ann", "ann", "ANN", "Bo", "Bo", "Cy", "he", "he", "Dee"])]
PLAIN = Linked(hidden=0.0)


def test_an_entity_is_what_it_is_linked_to_or_its_surface_and_no_pronoun():
    assert [entity_of(row) for row in ROWS] == ["ann", "ann", "ann", "bo", "bo", "cy", "", "", "dee"]
    assert entity_of(linked("he", "0", entity="Q42")) == "Q42"
    assert {name: len(own) for name, own in grouped([*ROWS, ROWS[0]]).items()} == {"ann": 3, "bo": 2, "cy": 1, "dee": 1}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("negatives", [1, 2])
def test_pairs_are_of_one_entity_or_of_two_as_their_label_says(seed, negatives):
    made = Linked(hidden=0.0, negatives=negatives).pairs(ROWS, seed)
    assert Counter(pair.label for pair in made) == {"same": 4, "apart": 4 * negatives}  # 3 of ann, 1 of bo
    for pair in made:
        one, other = rows_of_pair(pair)
        assert one.fields["text"] != other.fields["text"]
        assert (entity_of(one) == entity_of(other)) == (pair.label == "same")
        assert one in ROWS
        assert other in ROWS
    assert made == Linked(hidden=0.0, negatives=negatives).pairs(ROWS, seed)
    assert Linked(hidden=0.0, negatives=negatives, most=3).pairs(ROWS, seed) == made[:3]


def test_sentences_of_one_entity_are_limited():
    many = [linked("Ann", str(i)) for i in range(30)] + ROWS
    same = [pair for pair in Linked(hidden=0.0, sentences=5).pairs(many) if pair.label == "same"]
    assert sum(entity_of(rows_of_pair(pair)[0]) == "ann" for pair in same) == 5


def test_negatives_differ_in_their_coarse_type_where_it_is_known():
    kinds = {"Ann": "person", "Bo": "person", "York": "place", "Rome": "place"}
    known = [linked(name, str(i), coarse=kinds[name]) for i, name in enumerate([*kinds, *kinds])]
    for pair in Linked(hidden=0.0, negatives=3).pairs(known):
        one, other = rows_of_pair(pair)
        assert (one.fields["coarse"] == other.fields["coarse"]) == (pair.label == "same")
    with pytest.raises(DataError, match="every mention has the coarse type 'person'"):
        PLAIN.pairs([row for row in known if row.fields["coarse"] == "person"])


def test_mentions_are_hidden_in_four_of_ten_and_everywhere_at_once():
    many = [linked(f"Name {i % 200}", str(i)) for i in range(600)]
    each = [row for pair in Linked().pairs(many) for row in rows_of_pair(pair)]
    blank = [row for row in each if row.fields["mention"] == BLANK]
    assert len(blank) / len(each) == pytest.approx(0.4, abs=0.03)
    for row in blank:
        assert "Name" not in row.fields["text"]
        assert row.fields["text"] == "".join(told(row))
    assert told(hidden(ROWS[0], "…")) == ["0 ", "…", " sat"]


def test_some_pairs_are_held_out():
    many = [linked(f"Name {i % 200}", str(i)) for i in range(600)]
    train, dev = Linked(held_out=0.1).dealt(many)
    assert len(dev) == round(0.1 * (len(train) + len(dev)))
    assert Linked(held_out=0.1).pairs(many) == [*dev, *train]
    assert len(Linked().dealt(ROWS)[1]) == 1
    assert Linked(held_out=0.0).dealt(ROWS)[1] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([linked("Ann", "0"), linked("Bo", "1")], "no entity is mentioned in two texts of these 2 rows"),
        ([linked("Ann", "0"), linked("Ann", "1")], "all mentions are of one entity, 'ann'"),
        ([linked("he", "0"), linked("he", "1")], "no entity is mentioned"),
    ],
)
def test_rows_of_which_no_pairs_can_be_made_are_an_error(given, message):
    with pytest.raises(DataError, match=message):
        PLAIN.pairs(given)


@pytest.mark.parametrize(
    "options",
    [
        {"negatives": 0},
        {"sentences": 1},
        {"hidden": 1.0},
        {"hidden": -0.1},
        {"held_out": 1.0},
        {"blank": " "},
        {"most": 0},
    ],
)
def test_options_that_are_not_possible(options):
    with pytest.raises(ConfigError, match="possible: negatives >= 1, sentences >= 2"):
        Linked(**options)


def test_names_in_plain_texts_are_what_is_capitalised_within_sentences():
    texts = [
        "The cat saw Ann Lee . She met Ann in New York , and the cat sat.",
        "Ann sat. Cats like the old man in New York.",
    ]
    found = find_mentions(texts)
    assert [row.fields["mention"] for row in found] == ["Ann Lee", "Ann", "New York", "Ann", "New York"]
    assert all(row.fields["text"] in texts and row.fields["text"] == "".join(told(row)) for row in found)


@pytest.mark.parametrize("name", ["Jose\u0301 Pen\u0303a", "E\u0301lise"])
def test_names_whose_accents_are_characters_of_their_own_are_whole(name):
    assert [e.fields["mention"] for e in find_mentions([f"we saw {name} today"])] == [name]
