"""Files of label words: every form that OpenPrompt writes, each of its files, and faults with their mending."""

import json
from pathlib import Path

import pytest

from deltaprompt.cli.grid import cells_of
from deltaprompt.cli.interchange import _task_table
from deltaprompt.cli.recipe import build, grid_of, labels_of
from deltaprompt.cli.task import stands_for
from deltaprompt.data import read_label_words
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.templates import Template
from deltaprompt.types import Example
from tests import backbones_zoo
from tests.command import succeeds

TWO = ("bad", "good")


@pytest.mark.parametrize(
    ("name", "content", "choice", "words"),
    [
        ("a.txt", "terrible\ngreat", 0, (("terrible",), ("great",))),
        ("a.txt", "\ufeffterrible, awful ,\r\n great , so so\r\n", 0, (("terrible", "awful"), ("great", "so so"))),
        ("a.txt", "no\nyes\n\n\nfalse\ntrue, right\n\n", 1, (("false",), ("true", "right"))),
        ("a.txt", "No Yes", 0, (("No",), ("Yes",))),
        ("a.txt", "No,Yes it is\n\nFalse True", 0, (("No",), ("Yes it is",))),
        ("a.txt", "No,Yes it is\n\nFalse True", 1, (("False",), ("True",))),
        ("a.txt", "<!>'s,a\n<!> b", 0, (("'s", "a"), ("b",))),
        ("a.txt", "bad,bad\ngood", 0, (("bad", "bad"), ("good",))),  # a rule may say a word twice
        ("a.csv", '"terrible, really",awful\ngreat', 0, (("terrible, really", "awful"), ("great",))),
        ("a.json", '{"good": ["great"], "bad": ["terrible", "<!>ly"]}', 0, (("terrible", "ly"), ("great",))),
        ("a.json", '{"good": "great, it is", "bad": "terrible"}', 0, (("terrible",), ("great, it is",))),
        ("a.json", '[{"good": "a", "bad": "b"}, [["c", "d"], "e"]]', 0, (("b",), ("a",))),
        ("a.json", '[{"good": "a", "bad": "b"}, [["c", "d"], "e"]]', 1, (("c", "d"), ("e",))),
        ("a.jsonl", '[\n{"good": "a",\n"bad": "b"}]', 0, (("b",), ("a",))),
        ("a.jsonl", '{"good": "a",\n"bad": "b"}', 0, (("b",), ("a",))),
        ("a.jsonl", '{"good": "a", "bad": "b"}\n{"good": "c", "bad": "d", "so so": "e"}\n', 1, (("d",), ("c",))),
    ],
)
def test_words_of_each_label(tmp_path: Path, name: str, content: str, choice: int, words: tuple[object, ...]) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    assert read_label_words(path, TWO, choice) == dict(zip(TWO, words, strict=True))
    assert list(read_label_words(str(path), TWO, choice)) == list(TWO)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt has no label words in it; give each label a line"),
        ("a.txt", "a\nb\nc", "has the words of 3 labels, and there are 2 (bad, good); give each label a line, in this"),
        ("a.txt", "a b c", "has the words of 3 labels, and there are 2"),
        ("a.txt", "a", "has the words of 1 labels, and there are 2"),
        ("a.txt", ",", "has the words of 0 labels"),
        ("a.txt", "a\n , ,", "label 'good' has no word; write one at least"),
        ("a.json", '{"good": "a", "bat": "b"}', "has no words for label 'bad'; did you mean 'bat'?"),
        ("a.json", '{"good": [], "bad": "b"}', "label 'good' has no word"),
        ("a.json", '{"good": 3, "bad": "b"}', "the words of a label are a text or a list of texts, got 3"),
        (
            "a.json",
            '{"good": ["a", 3], "bad": "b"}',
            "the words of a label are a text or a list of texts, got ['a', 3]",
        ),
        ("a.json", "3", 'holds 3; label words are an object, such as {"good": ["great", "fine"]}'),
        ("a.json", "[3]", "holds 3; label words are an object"),
        ("a.json", "[]", "has no label words in it"),
        ("a.json", '{"good": "a",', "a.json is not JSON: Expecting property name"),
        ("a.json", "[" * 100_000, "a.json is not JSON: "),
        ("a.jsonl", '{"good": "a"}\n{"good"}', "a.jsonl is neither one JSON value nor one a line: "),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_label_words(path, TWO)
    assert message in str(caught.value)


def test_choices_and_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("a\nb\n\nc\nd", encoding="utf-8")
    for choice in (2, -1):
        with pytest.raises(DataError, match=f"words.txt has the choices 0 to 1, got {choice}"):
            read_label_words(path, TWO, choice)
    with pytest.raises(DataError, match="there is no file of label words .*word.txt'; did you mean 'words.txt'"):
        read_label_words(tmp_path / "word.txt", TWO)
    with pytest.raises(
        ConfigError, match=r"label words are read from \.txt, \.csv, \.json, \.jsonl files, got '\.toml'"
    ):
        read_label_words(tmp_path / "words.toml", TWO)
    path.write_bytes(b"a\xff\nb")
    with pytest.raises(DataError, match=r"words.txt is not UTF-8: .*; save it as UTF-8"):
        read_label_words(path, TWO)


# On the command line


def test_file_without_names_is_left_for_the_labels_of_the_data(tmp_path: Path) -> None:
    lines, choices, named = tmp_path / "words.txt", tmp_path / "words.json", tmp_path / "named.json"
    lines.write_text("awful\nfine\n\nsad,bad\nglad")
    choices.write_text('[{"good": "fine", "bad": "awful"}, [["sad", "bad"], "glad"]]')
    named.write_text('{"good": "fine, really", "bad": ["awful"]}')
    assert labels_of([str(named)]) == {"good": "fine, really", "bad": ["awful"]}
    first, second = {"bad": ("awful",), "good": ("fine",)}, {"bad": ("sad", "bad"), "good": ("glad",)}
    for path in (lines, choices):
        assert labels_of([str(path)]) == str(path)
        assert stands_for(str(path), TWO, ordered=True) == first
        assert labels_of([f"{path}#1"]) == f"{path}#1"
        assert stands_for(f"{path}#1", TWO, ordered=True) == second
    with pytest.raises(
        ConfigError, match=r"words.txt does not name its labels, and theirs \(bad, good\) have no order"
    ):
        stands_for(str(lines), TWO)
    assert stands_for(str(lines), ("0", "1")) == {"0": ("awful",), "1": ("fine",)}
    assert stands_for(str(choices), TWO) == first  # which names them
    assert stands_for(f"{named}#0", TWO) == {"bad": ("awful",), "good": ("fine, really",)}
    assert stands_for(None, TWO) is None
    assert stands_for(("a", "b"), TWO) == ("a", "b")
    assert grid_of([f"labels={lines}", f"labels={lines}#1"]) == {"labels": [str(lines), f"{lines}#1"]}
    made = build({"task": {"labels": str(lines)}, "grid": {"shots": [1, 2]}})
    assert made.task.labels == str(lines)


def test_grid_of_files_and_named_words_has_one_order_of_labels(tmp_path: Path) -> None:
    lines = tmp_path / "words.txt"
    lines.write_text("awful\nfine")
    backbone = backbones_zoo.build("bert")
    examples = [Example({"text": f"{label} film {n}"}, label) for label in TWO for n in range(4)]
    tables = {
        "grid": {"labels": [{"good": "fine", "bad": "sad"}, str(lines)]},
        "task": {"template": "{text} {mask}", "order": TWO},
    }
    cells = cells_of(build(tables), backbone, examples, None)
    assert [cell.task.words() for cell in cells] == [
        {"bad": ("sad",), "good": ("fine",)},
        {"bad": ("awful",), "good": ("fine",)},
    ]
    assert [cell.task.names for cell in cells] == [TWO, TWO]


def test_fit_takes_a_file_of_words(tmp_path: Path) -> None:
    backbone, data, words = backbones_zoo.build("bert"), tmp_path / "data.jsonl", tmp_path / "words.txt"
    backbone.model.save_pretrained(tmp_path / "tiny")
    backbone.tokenizer.save_pretrained(tmp_path / "tiny")
    rows = [{"text": f"a film {n}", "label": label} for label in TWO for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words.write_text("terrible,awful\ngreat\n")
    task = (
        "--backbone",
        tmp_path / "tiny",
        "--template",
        "{text} It was {mask}.",
        "--labels",
        words,
        "--order",
        "bad,good",
    )
    more = ("--data", data, "--steps", 1, "--delta", "bitfit", "--no-dev", "--device", "cpu", "--out", tmp_path / "out")
    succeeds("fit", *task, *more)
    record = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert record["verbalizer"]["words"] == {"bad": ["terrible", "awful"], "good": ["great"]}


def test_import_needs_the_names_of_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a.txt has words without the names of their labels; give a .toml or .json"):
        _task_table(None, [str(tmp_path / "a.txt")], None, None)


# The files that came with OpenPrompt

LABELS = {  # how many a file without label names is for
    "FewGLUE/BoolQ": 2,
    "FewGLUE/CB": 3,
    "FewGLUE/RTE": 2,
    "FewGLUE/WiC": 2,
    "LMBFF/SST-2": 2,
    "SuperGLUE/BoolQ": 2,
    "SuperGLUE/CB": 3,
    "SuperGLUE/COPA": 2,
    "SuperGLUE/MultiRC": 2,
    "SuperGLUE/RTE": 2,
    "SuperGLUE/WiC": 2,
    "TextClassification/agnews": 4,
    "TextClassification/amazon": 2,
    "TextClassification/dbpedia": 14,
    "TextClassification/imdb": 2,
}
REFUSED = {"SuperGLUE/WSC/manual_verbalizer.txt": "has no label words in it"}  # the file is empty


def named(path: Path) -> list[list[str]]:
    """The labels that the choices of a JSON file name."""
    found = json.loads(path.read_text())
    return [list(one) for one in (found if isinstance(found, list) else [found])]


def test_every_file_of_label_words_is_read_or_refused_with_a_reason(data_dir: Path) -> None:
    folder = data_dir / "verbalizers_templates"
    every = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(every) == 77
    kinds = ("temp", "generation_verbalizer")  # tested as templates
    files = [path for path in every if not any(kind in path.name for kind in kinds)]
    read: dict[str, list[dict[str, tuple[str, ...]]]] = {}
    for path in files:
        name, task = path.relative_to(folder).as_posix(), path.parent.relative_to(folder).as_posix()
        if name in REFUSED:
            with pytest.raises(DataError) as caught:
                read_label_words(path, TWO)
            assert REFUSED[name] in str(caught.value)
        elif path.suffix == ".txt":
            read[name] = [read_label_words(path, [str(n) for n in range(LABELS[task])])]
        else:
            read[name] = [read_label_words(path, labels, n) for n, labels in enumerate(named(path))]
    assert len(read) + len(REFUSED) == len(files) == 30
    words = [word for choices in read.values() for one in choices for own in one.values() for word in own]
    assert len(words) > 10_000
    assert all(word and word == word.strip() and "<!>" not in word and "," not in word for word in words)
    assert read["FewGLUE/CB/manual_verbalizer.txt"] == [{"0": ("Yes",), "1": ("No",), "2": ("Maybe",)}]
    assert read["RelationClassification/TACRED/ptr_verbalizer.jsonl"][0]["per:title"] == (
        *("person", "'s", "title", "is", "title"),
    )
    agnews = read["TextClassification/agnews/multiwords_verbalizer.jsonl"]
    assert agnews[1]["Sports"] == ("sports", "competition")
    assert [len(one["Sports"]) for one in agnews] == [1, 2]


def test_texts_of_a_generation_verbalizer_are_templates(data_dir: Path) -> None:
    path = data_dir / "verbalizers_templates/SuperGLUE/COPA/generation_verbalizer.txt"
    assert [str(t) for t in Template.all_from_openprompt(path)] == [" {meta.choice1|keep}", " {meta.choice2|keep}"]
