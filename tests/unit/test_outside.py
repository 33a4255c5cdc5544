"""Texts that belong to none of the labels: the largest class score, AUROC, `evaluate --outside`, and comparisons."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import deltaprompt as dp
from deltaprompt.cli.compare_recipe import build
from deltaprompt.errors import ConfigError, TrainingError
from deltaprompt.model.class_scores import class_scores
from deltaprompt.model.label_metrics import auroc
from deltaprompt.study import (
    Called,
    Comparison,
    DataSet,
    Entry,
    Method,
    Outcome,
    Probe,
    Trained,
    as_json,
    compare,
    csv_of,
    markdown,
)
from deltaprompt.study.cells import FILE
from deltaprompt.study.data import Shots
from deltaprompt.study.probe import embedded, regression
from deltaprompt.types import Example
from tests import backbones_zoo as zoo
from tests import files
from tests.command import fails, last_json, succeeds

WORDS = {"up": ("good", "great film"), "down": "bad", "so": ("not", "the")}  # "great film" has two tokens
LABELS = tuple(WORDS)
MASKED = "{text} It was {mask}"
TEXTS = ("good", "a good film and a great plot", "not", "the cat sat on the mat , not bad", "no", "a film", "")
ROWS = [Example({"text": text}, LABELS[i % 3]) for i, text in enumerate(TEXTS)]
OTHERS = [
    Example({"text": text}, "elsewhere") for text in ("the dog was there", "a", "yes it was", "maybe , maybe not")
]


# AUROC


def by_pairs(inside: Sequence[float], outside: Sequence[float]) -> float:
    """The share of pairs in the right order, one that ties counting half."""
    each = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    return sum(each) / len(each)


@pytest.mark.parametrize("seed", range(6))
def test_auroc_is_the_share_of_pairs_in_the_right_order(seed: int) -> None:
    chance = np.random.default_rng(seed)
    inside, outside = (chance.normal(shift, 1, size).round(seed % 3) for shift, size in ((0.7, 13 + seed), (0, 9)))
    assert auroc(inside, outside) == pytest.approx(by_pairs(inside.tolist(), outside.tolist()), abs=1e-12)
    assert auroc(inside, outside) + auroc(outside, inside) == pytest.approx(1)
    assert auroc(np.exp(inside), np.exp(outside)) == auroc(inside, outside)  # the order is all


@pytest.mark.parametrize(
    ("inside", "outside", "area"),
    [
        ([2.0, 3.0], [1.0], 1.0),
        ([1.0], [2.0, 3.0], 0.0),
        ([1.0, 1.0], [1.0], 0.5),
        ([1.0, 2.0], [1.0, 0.0], 3.5 / 4),
        ([math.inf, 0.0], [-math.inf, 1.0], 3 / 4),
        (torch.tensor([1.0, 1 + 1e-7]), torch.tensor([1.0]), 3 / 4),
    ],
)
def test_auroc_by_hand(inside: Any, outside: Any, area: float) -> None:
    assert auroc(inside, outside) == pytest.approx(area)


@pytest.mark.parametrize(
    ("inside", "outside", "got"),
    [
        ([], [1.0], "0 (0 of them NaN) and 1 (0 of them NaN)"),
        ([1.0], [], "1 (0 of them NaN) and 0 (0 of them NaN)"),
        ([1.0, math.nan], [math.nan], "2 (1 of them NaN) and 1 (1 of them NaN)"),
    ],
)
def test_scores_that_cannot_be_compared(inside: Any, outside: Any, got: str) -> None:
    with pytest.raises(ConfigError) as raised:
        auroc(inside, outside)
    assert str(raised.value) == (
        "AUROC compares scores of texts that belong to a label with scores of texts that belong to none: one or more "
        f"of each, all of them numbers; got {got}"
    )


# The largest class score


def task(template: str = MASKED, verbalizer: Any = None, **more: Any) -> dp.Task:
    return dp.Task(template, LABELS, verbalizer or dp.LabelWords(WORDS), **more)


def model(family: str = "bert", asked: dp.Task | None = None, slots: int = 1) -> dp.Model:
    asked = asked or task()
    deltas = [dp.LoRA(rank=2, at=("attn.q",))] if slots == 1 else []
    return dp.Model(zoo.build(family), asked, deltas, range(slots))


def by_itself(made: dp.Model, row: Example, slot: int = 0) -> torch.Tensor:
    """The class scores of one text, from the forward path."""
    with torch.inference_mode():
        return made(made.features.collate(made.encode([Example(row.fields)], slot)), slot)["logits"][0]


CASES = {
    "words": ("bert", task()),
    "words of several tokens after a prompt": ("gpt2", task()),
    "an encoder-decoder's words": ("bart", task()),
    "a head": ("llama", task(verbalizer=dp.SoftVerbalizer(0.5))),
    "sentences": ("bert-encoder", dp.Task("{text}", {"up": "good", "down": "bad", "so": "a film"})),
    "several labels": ("bert", task(several=True)),
    "a calibration": ("bert", task(calibration=dp.Contextual())),
    "a calibration of classes": ("gpt2", task(verbalizer=dp.SoftVerbalizer(0.5), calibration=dp.Contextual())),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_largest_class_score_of_each_text_in_their_order(case: str) -> None:
    family, asked = CASES[case]
    made = dp.adapt(zoo.build(family), asked)
    each = torch.stack([by_itself(made, row) for row in ROWS])
    assert each.amax(-1).std() > 1e-3  # so that another order would be seen
    for size in (1, 3, 32):
        found = made.max_logit(ROWS, size)
        assert (found.shape, found.dtype, found.device.type) == ((len(ROWS),), torch.float32, "cpu")
        assert_close(found, each.amax(-1), rtol=0, atol=2e-5)
        likely = each.sigmoid() if asked.several else each.softmax(-1)
        assert_close(made.probabilities(ROWS, size), likely, rtol=0, atol=2e-5)
    made.adapted.remove()


def test_of_prototypes_it_says_how_near_the_nearest_is_which_probabilities_do_not() -> None:
    made = model("bert-encoder", task("{text}", dp.Prototypes(scale=4)))
    made.start(ROWS)
    z = made.scorer.tensors["z"][0].detach()
    states = made.embed(made.features, OTHERS)
    cosines = torch.nn.functional.cosine_similarity(states[:, None], z, dim=-1)
    assert_close(made.max_logit(OTHERS), 4 * cosines.amax(-1))
    with torch.no_grad():
        made.scorer.tensors["z"][0] = z[0]
    assert_close(made.probabilities(OTHERS), torch.full((len(OTHERS), 3), 1 / 3))
    assert_close(made.max_logit(OTHERS), 4 * cosines[:, 0])


def test_where_scores_are_log_probabilities_it_is_that_of_the_likeliest_label() -> None:
    made = model()
    assert_close(made.max_logit(ROWS).exp(), made.probabilities(ROWS).amax(-1))
    several = model(asked=task(several=True))
    assert_close(several.max_logit(ROWS).sigmoid(), several.probabilities(ROWS).amax(-1))


def test_texts_dictionaries_and_examples_and_what_is_no_list() -> None:
    made = model()
    assert made.max_logit(list(TEXTS)).equal(made.max_logit(ROWS))
    assert made.max_logit([{"text": text} for text in TEXTS]).equal(made.max_logit(ROWS))
    assert made.max_logit([]).shape == (0,)
    for given in ("a film", {"text": "a film"}, ROWS[0]):
        with pytest.raises(ConfigError, match=r"max_logit takes a list, and got one text; write max_logit\(\[text\]\)"):
            made.max_logit(given)


def test_each_slot_has_its_own_and_what_is_not_ready_says_so() -> None:
    made = model(asked=task(verbalizer=dp.SoftVerbalizer(0.5)), slots=2)
    first, second = (made.max_logit(ROWS, slot=slot) for slot in (0, 1))
    assert not torch.allclose(first, second)
    assert_close(second, torch.stack([by_itself(made, row, 1).amax() for row in ROWS]), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="adaptation 2 was named; 0 to 1 are possible"):
        made.max_logit(ROWS, slot=2)
    with pytest.raises(ConfigError, match="the verbalizer Prototypes has no start yet"):
        model("bert-encoder", task("{text}", dp.Prototypes())).max_logit(ROWS)
    with pytest.raises(ConfigError, match="the calibration BatchCalibration has not been measured"):
        model(asked=task(calibration=dp.BatchCalibration())).max_logit(ROWS)


@pytest.mark.parametrize("frozen", [True, False])
def test_scores_of_several_slots_are_those_of_each(frozen: bool) -> None:
    deltas = [] if frozen else [dp.LoRA(rank=2, at=("attn.q",))]
    made = dp.Model(zoo.build("bert"), task(verbalizer=dp.SoftVerbalizer(0.5)), deltas, range(3))
    for name, tensor in made.parts():
        torch.nn.init.normal_(tensor.data, std=0.3 if "delta" in name else 0.05)
    passes: list[int] = []
    handle = made.backbone.base.register_forward_hook(lambda *_: passes.append(1))
    found = class_scores(made, ROWS, [2, 0])
    handle.remove()
    assert (found.shape, len(passes)) == ((2, len(ROWS), 3), 1 if frozen else 2)
    for own, slot in zip(found, (2, 0), strict=True):
        assert_close(own.amax(-1), made.max_logit(ROWS, slot=slot), rtol=0, atol=1e-6)
    assert class_scores(made, ROWS, []).shape == (0, len(ROWS), 3)


@pytest.mark.parametrize("several", [False, True])
def test_evaluation_has_the_auroc_of_texts_outside_whose_labels_are_not_read(several: bool) -> None:
    made = model(asked=task(several=several))
    plain = made.evaluate(ROWS)
    told = made.evaluate(ROWS, 3, outside=OTHERS)
    area = by_pairs(made.max_logit(ROWS).tolist(), made.max_logit(OTHERS).tolist())
    assert told.pop("auroc") == pytest.approx(area)
    assert told == plain
    assert 0 < area < 1


# The command that measures


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, as any model on disk is."""
    folder = tmp_path_factory.mktemp("tiny")
    backbone = zoo.build("bert-encoder")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was fitted, and files of rows."""
    folder = tmp_path_factory.mktemp("place")
    rows = [
        {"review": f"{text} {n}", "label": row.label} for n in range(3) for text, row in zip(TEXTS, ROWS, strict=True)
    ]
    files.rows(folder / "rows.jsonl", *rows)
    files.rows(folder / "others.jsonl", *({"review": row.fields["text"], "label": "elsewhere"} for row in OTHERS))
    files.written(folder / "others.txt", "".join(f"{row.fields['text']}\n" for row in OTHERS))
    asked = ("--data", folder / "rows.jsonl", "--text", "review", "--backbone", tiny, "--device", "cpu", "--no-dev")
    succeeds("fit", *asked, "--steps", 2, "--delta", "lora:rank=2,at=attn.q", "--out", folder / "adapted")
    return folder


def measured(place: Path, outside: object, *more: object, stdin: str | None = None) -> Any:
    return succeeds(
        "evaluate",
        place / "adapted",
        place / "rows.jsonl",
        "--text",
        "review",
        "--outside",
        outside,
        *more,
        stdin=stdin,
    )


def test_evaluate_tells_other_texts_apart(place: Path) -> None:
    made = dp.open(place / "adapted")
    inside = [Example({"text": json.loads(line)["review"]}) for line in (place / "rows.jsonl").read_text().splitlines()]
    area = by_pairs(made.max_logit(inside).tolist(), made.max_logit(OTHERS).tolist())
    told = last_json(measured(place, place / "others.jsonl", "--json"))
    assert list(told) == ["accuracy", "macro_f1", "auroc", "examples", "outside"]
    assert (told["examples"], told["outside"], told["auroc"]) == (21, 4, pytest.approx(area))
    shown = measured(place, place / "others.jsonl").stdout
    assert [line.split() for line in shown.splitlines() if "other texts" in line] == [
        ["AUROC", "of", "other", "texts", f"{area:.4f}"],
        ["other", "texts", "4"],
    ]
    assert last_json(measured(place, place / "others.txt", "--json")) == told
    piped = (place / "others.txt").read_text()
    assert last_json(measured(place, "-", "--json", stdin=piped)) == told
    said = fails("evaluate", place / "adapted", place / "rows.jsonl", "--text", "review", "--target", "label")
    assert said == f"--target is not for {place / 'adapted'}, which gives a text a label; leave it out"
    plain = succeeds("evaluate", place / "adapted", place / "rows.jsonl", "--text", "review", "--json")
    assert last_json(plain) == {name: told[name] for name in ("accuracy", "macro_f1", "examples")}


def test_files_of_other_texts_that_cannot_be_read(place: Path, tmp_path: Path) -> None:
    asked = ("evaluate", place / "adapted", place / "rows.jsonl", "--text", "review", "--outside")
    assert "nowhere.txt" in fails(*asked, place / "nowhere.txt")
    assert "there are no rows; at least one is needed" in fails(*asked, files.written(tmp_path / "none.jsonl", ""))
    odd = files.rows(tmp_path / "odd.jsonl", {"text": "a film"})
    assert "no column 'review' for the field 'text'" in fails(*asked, odd)


def test_what_has_no_class_scores_refuses_other_texts(place: Path, tmp_path: Path) -> None:
    for name, family in (("causal", "gpt2"), ("encoder", "bert-encoder")):
        backbone = zoo.build(family)
        backbone.model.save_pretrained(tmp_path / name)
        backbone.tokenizer.save_pretrained(tmp_path / name)
    writer = dp.Generator(
        dp.load(str(tmp_path / "causal"), device="cpu"), dp.Generation("{text} =>"), [dp.LoRA(rank=2)]
    )
    writer.save(tmp_path / "writer")
    encoder = dp.load(str(tmp_path / "encoder"), kind="encoder", device="cpu")
    dp.Tagger(encoder, dp.Tagging(("film",)), [dp.LoRA(rank=2)]).save(tmp_path / "tagger")
    for folder, does in ((tmp_path / "writer", "writes texts"), (tmp_path / "tagger", "finds spans")):
        said = fails("evaluate", folder, place / "rows.jsonl", "--outside", place / "others.txt")
        assert said == f"--outside is not for {folder}, which {does}; leave it out"


def test_what_learned_from_episodes_tells_them_apart_once_it_has_seen_a_support(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{text} {n}", "label": row.label} for n in range(2) for text, row in zip(TEXTS, ROWS, strict=True)
    ]
    data = files.rows(tmp_path / "rows.jsonl", *rows)
    others = files.written(tmp_path / "others.txt", "the dog\na\n")
    backbone = dp.load(str(tiny), kind="encoder", device="cpu")
    dp.Learner(backbone, dp.Episodic(), [dp.LoRA(rank=2)]).save(tmp_path / "learner")
    asked = ("evaluate", tmp_path / "learner", data, "--outside", others, "--json")
    assert 0 <= last_json(succeeds(*asked, "--support", data))["auroc"] <= 1
    assert "give --support" in fails(*asked)
    backbone = dp.load(str(tiny), kind="encoder", device="cpu")
    dp.Learner(backbone, dp.Episodic(spans=True), [dp.LoRA(rank=2)]).save(tmp_path / "spans")
    words = files.written(tmp_path / "a.conll", "the O\ncat B-animal\n\na O\nfilm B-film\n")
    said = fails("evaluate", tmp_path / "spans", words, "--support", words, "--outside", others)
    assert "finds spans; leave it out" in said
    said = fails("evaluate", tmp_path / "spans", words, "--support", words, "--drop-empty")
    assert "--drop-empty is not for" in said


# Comparisons

GOOD = ("a good film", "so good", "good", "three good films", "it was good", "good good", "yes good", "a good plot")
BAD = ("a bad film", "so bad", "bad", "three bad films", "it was bad", "bad bad", "no bad", "a bad plot")
FILMS = [Example({"text": t}, c) for pair in zip(GOOD, BAD, strict=True) for t, c in zip(pair, "gb", strict=True)]
PLAIN = DataSet("films", FILMS[:10], FILMS[10:])
DATA = replace(PLAIN, outside=OTHERS)
PAIR = {"g": "good", "b": "bad"}
SHORT = dp.Training(steps=2)


@dataclass
class Sure(Method):
    """Answers every row rightly; what it says of texts outside is the seed's of `each`."""

    name: str
    each: tuple[float | None, ...] = (0.75, 0.25)
    together: int = 1
    asked: int = 0

    def entry(self, data: DataSet) -> Entry:
        return Entry({}, "")

    def ready(self) -> None:
        pass

    def run(self, data: DataSet, shots: Shots, seeds: Sequence[int]) -> Sequence[Outcome | str]:
        self.asked += 1
        return [Outcome(data.gold, 0.0, 1, 1, self.each[seed] if data.outside else None) for seed in seeds]


def compared(*methods: Method, data: DataSet = DATA, **more: Any) -> Comparison:
    return compare([data], methods, **{"shots": [1], "seeds": [0, 1], **more})


def test_texts_outside_are_in_the_digest_and_their_labels_are_not() -> None:
    assert replace(DATA, outside=[Example(row.fields) for row in OTHERS]).digest == DATA.digest
    assert len({PLAIN.digest, DATA.digest, replace(DATA, outside=OTHERS[:2]).digest}) == 3
    assert replace(PLAIN, outside=()).digest == PLAIN.digest == "c168a5817cd6"  # as cells that are kept have it
    few = DATA.limited(2)
    assert [row.fields["text"] for row in few.outside] == [OTHERS[0].fields["text"], OTHERS[2].fields["text"]]
    assert DATA.limited(None) is DATA


@pytest.mark.parametrize("deltas", [(), (dp.LoRA(2, at=("attn.q",)),)], ids=["frozen", "LoRA"])
def test_what_is_trained_tells_them_apart_by_its_largest_scores(deltas: tuple[Any, ...]) -> None:
    encoder = zoo.build("bert-encoder")
    asked = dp.Task("{text}", PAIR, dp.Prototypes())
    found = compared(Trained("m", encoder, asked, deltas, SHORT, dev=False), shots=[2])
    plain = compared(Trained("m", encoder, asked, deltas, SHORT, dev=False), shots=[2], data=PLAIN)
    for cell, other in zip(found.figures[0].cells, plain.figures[0].cells, strict=True):
        made = dp.adapt(encoder, asked, deltas, cell.key.seed)
        dp.fit(made, dp.few_shot(DATA.train, 2, cell.key.seed, dev=False)[0], training=SHORT, seed=cell.key.seed)
        inside, outside = (made.max_logit(rows).tolist() for rows in (DATA.test, OTHERS))
        assert cell.auroc == pytest.approx(by_pairs(inside, outside))
        assert (other.found, other.auroc) == (cell.found, None)
        made.adapted.remove()


def test_each_text_is_read_once_for_all_seeds_of_a_frozen_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    masked, read = zoo.build("bert"), list[int]()
    method = Trained("m", masked, dp.Task(MASKED, PAIR, dp.SoftVerbalizer()), (), SHORT, dev=False)
    method.run(PLAIN, 1, [0, 1])
    masked.base.register_forward_hook(lambda _, __, out: read.append(len(out[0])))
    method.run(PLAIN, 1, [0, 1])
    without = sum(read)
    read.clear()
    method.run(DATA, 1, [0, 1])
    assert sum(read) == without + len(OTHERS)


@pytest.mark.parametrize("labels", ["gb", "gbn"])
def test_the_probe_tells_them_apart_by_its_largest_decision_value(labels: str) -> None:
    encoder = zoo.build("bert-encoder")
    own = [Example(row.fields, labels[n // 2 % len(labels)]) for n, row in enumerate(FILMS)]
    data = DataSet("films", own[:10], own[10:], outside=OTHERS)
    (cell,) = compared(Probe("probe", encoder), data=data, seeds=[0]).figures[0].cells
    support, _ = data.draw(1, 0, dev=False)
    fitted = regression(embedded(encoder, support), [row.label for row in support])
    values = [fitted.decision_function(embedded(encoder, rows)) for rows in (data.test, OTHERS)]
    largest = [[abs(v) if labels == "gb" else max(v) for v in own] for own in values]
    assert cell.auroc == pytest.approx(by_pairs(*largest))
    assert compared(Probe("probe", encoder), data=replace(data, outside=())).figures[0].aurocs == []


PEER = '''
"""A method of another library."""

def run(train, dev, test, labels, seed, options):
    assert [row.label for row in test] == [None] * len(test)
    assert len(test) == options.get("rows", len(test))
    words = [row.fields["text"].split() for row in test]
    found = ["g" if "good" in own else "b" if "bad" in own else "none of them" for own in words]
    told = {"bytes": 1}
    if options.get("sure", True):
        told["confidence"] = [float("nan") if seed == options.get("nan") else 10 - n for n in range(len(test))]
    return found[: options.get("labels")], told

def few(train, dev, test, labels, seed, options):
    return ["g"] * len(test), {"confidence": [1.0]}

def odd(train, dev, test, labels, seed, options):
    return ["g"] * len(test), {"confidence": options["confidence"]}
'''


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("peers")
    files.written(folder / "sure_peer.py", PEER)
    sys.path.insert(0, str(folder))
    yield "sure_peer"
    sys.path.remove(str(folder))


def called(function: str = "run", outside: bool = True, **options: Any) -> Called:
    return Called("peer", f"sure_peer:{function}", options, outside=outside)


def test_a_function_is_given_them_behind_the_test_rows_and_says_how_sure_it_is(peer: str) -> None:
    (cell,) = compared(called(rows=10), seeds=[0]).figures[0].cells
    assert (cell.auroc, cell.accuracy, cell.bytes, len(cell.found)) == (1.0, 1.0, 1, 6)
    (cell,) = compared(called(rows=10, sure=False), seeds=[0]).figures[0].cells
    assert (cell.auroc, cell.accuracy) == (None, 1.0)
    (cell,) = compared(called(rows=6), seeds=[0], data=PLAIN).figures[0].cells
    assert cell.auroc is None


def test_a_function_that_does_not_ask_for_them_sees_none(peer: str) -> None:
    (cell,) = compared(called(outside=False, rows=6), seeds=[0]).figures[0].cells
    assert (cell.auroc, cell.accuracy) == (None, 1.0)
    assert called(outside=False).entry(DATA).settings == called().entry(PLAIN).settings
    assert called().entry(DATA).settings != called().entry(PLAIN).settings


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            called(labels=6),
            "it gave 6 labels for 6 test rows and 4 texts outside behind them; it must give one for each",
        ),
        (called("few"), "it gave 1 confidences for 6 test rows and 4 texts outside behind them; it must give one for"),
        (called("few", outside=False), "it gave 1 confidences for 6 test rows; it must give one for each"),
        (called("odd", confidence=7), "confidence is a list of numbers, one for each row; got 7"),
        (called("odd", confidence=["sure"]), "confidence is a list of numbers, one for each row; got ['sure']"),
        (
            called(nan=0),
            "AUROC compares scores of texts that belong to a label with scores of texts that belong to none",
        ),
    ],
)
def test_functions_that_say_too_little(peer: str, method: Called, message: str) -> None:
    with pytest.raises(TrainingError) as raised:
        compared(method, seeds=[0])
    assert message in str(raised.value)


def test_a_seed_whose_scores_are_no_numbers_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaprompt.study import trained

    def some(made: dp.Model, rows: Sequence[Example], slots: Sequence[int]) -> torch.Tensor:
        found = class_scores(made, rows, slots).clone()
        found[1] = math.nan
        return found

    monkeypatch.setattr(trained, "class_scores", some)
    method = Trained("m", zoo.build("bert-encoder"), dp.Task("{text}", PAIR), (), SHORT, dev=False)
    figure = compared(method, seeds=[0, 1, 2]).figures[0]
    assert [cell.key.seed for cell in figure.cells] == [0, 2]
    assert "all of them numbers; got 6 (6 of them NaN) and 4 (4 of them NaN)" in figure.failed[1]


def test_cells_keep_it_and_lines_from_before_are_read(tmp_path: Path) -> None:
    method = Sure("m")
    first = compared(method, out=tmp_path)
    assert [cell.auroc for cell in first.figures[0].cells] == [0.75, 0.25]
    assert compared(method, out=tmp_path) == first
    assert method.asked == 2
    plain = compared(method, data=PLAIN, out=tmp_path)
    assert method.asked == 4  # another digest
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line.pop("auroc") for line in lines] == [0.75, 0.25, None, None]
    files.written(
        tmp_path / FILE, "".join(json.dumps(line) + "\n" for line in lines[2:])
    )  # as they were written before
    assert compared(method, data=PLAIN, out=tmp_path) == plain
    assert method.asked == 4


@pytest.fixture
def found() -> Comparison:
    data = [DATA, replace(PLAIN, name="plain"), replace(DATA, name="a | b", outside=OTHERS[:3])]
    methods = [Sure("first"), Sure("best", (1.0, 0.5)), Sure("silent", (None, None)), Sure("half", (1.0, None))]
    return compare(data, methods, shots=[1, "all"], seeds=[0, 1])


def test_the_second_table(found: Comparison) -> None:
    lines = markdown(found).splitlines()
    start = lines.index("| AUROC | films, 1 shot | films, all rows | a \\| b, 1 shot | a \\| b, all rows |")
    assert lines[start - 1] == ""
    assert lines[start + 1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[start + 2] == "| first |" + " 0.500 ± 0.354 |" * 4
    assert lines[start + 3] == "| best |" + " **0.750 ± 0.354** |" * 4
    assert lines[start + 4] == "| silent |" + " – |" * 4
    assert lines[start + 5] == "| half |" + " 1.000 (1 of 2 seeds) |" * 4  # which is not ranked
    assert lines[start + 7].endswith("chance is 0.5. Such texts: films 4, a | b 3.")
    assert "| AUROC |" not in markdown(compared(Sure("m"), data=PLAIN))


def test_the_figures_for_programs(found: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_of(found))))
    by = {(row["method"], row["data"], row["shots"]): row["auroc"] for row in rows}
    assert (by["best", "films", "1"], by["half", "films", "all"]) == ("0.75", "1.0")
    assert by["silent", "films", "1"] == by["best", "plain", "1"] == ""
    told = as_json(found)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["outside"] == {"films": 4, "a | b": 3}
    assert [f["auroc"] for f in told["figures"][:4]] == [0.5, 0.75, None, 1.0]


def test_what_failed_everywhere_says_so_in_the_second_table() -> None:
    class Broken(Sure):
        def run(self, data: DataSet, shots: Shots, seeds: Sequence[int]) -> Sequence[Outcome | str]:
            return ["it broke"] * len(seeds)

    assert "| broken | failed |" in markdown(compared(Sure("m"), Broken("broken"))).split("| AUROC |")[1]


RECIPE = """
shots = [2]
seeds = "0-1"
[backbone]
name = "{tiny}"
device = "cpu"
[[data]]
name = "films"
train = "{place}/films.jsonl"
test_share = 0.4
text = "review"
outside = "{place}/others.jsonl"
[[data]]
name = "plain"
train = "{place}/films.jsonl"
test = "{place}/films.jsonl"
text = "review"
[[methods]]
name = "prototypes"
verbalizer = "prototypes"
deltas = "none"
training = {{ dev = false }}
[[methods]]
name = "probe"
kind = "probe"
[[methods]]
name = "peer"
kind = "call"
function = "sure_peer:run"
outside = true
[[methods]]
name = "deaf"
kind = "call"
function = "sure_peer:run"
"""


@pytest.fixture
def recipe(tiny: Path, place: Path, tmp_path: Path) -> Path:
    files.rows(place / "films.jsonl", *({"review": r.fields["text"], "label": r.label} for r in FILMS))
    return files.written(tmp_path / "recipe.toml", RECIPE.format(tiny=tiny, place=place))


def test_the_command_that_compares(recipe: Path, peer: str, tmp_path: Path) -> None:
    told = last_json(succeeds("compare", recipe, "--json"))
    assert told["outside"] == {"films": 4}
    areas = {(f["method"], f["data"]): f["auroc"] for f in told["figures"]}
    assert {name for (name, data), area in areas.items() if area is not None} == {"prototypes", "probe", "peer"}
    assert areas["peer", "films"] == 1.0
    assert {area for (_, data), area in areas.items() if data == "plain"} == {None}
    done = succeeds("compare", recipe, "--test-rows", 3)
    assert "AUROC 1.000" in done.stderr
    assert "| AUROC | films, 2 shots |" in done.stdout
    assert "| deaf | – |" in done.stdout.split("| AUROC |")[1]
    assert "Such texts: films 3." in done.stdout


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("outside = true", "outside = 3", "[[methods]] 'peer' outside"),
        ('kind = "probe"', 'kind = "probe"\noutside = true', "unknown key 'outside' in [[methods]] 2"),
        ('outside = "{place}/others.jsonl"', "outside = 3", "[[data]] 'films' outside"),
        ("others.jsonl", "nowhere.jsonl", "nowhere.jsonl"),
        ('outside = "', 'outsite = "', "unknown key 'outsite' in [[data]] 1; did you mean 'outside'?"),
    ],
)
def test_mistakes_of_recipes(recipe: Path, peer: str, place: Path, before: str, after: str, message: str) -> None:
    text, before = recipe.read_text(), before.format(place=place)
    assert before in text
    files.written(recipe, text.replace(before, after, 1))
    assert message in fails("compare", recipe)


def test_a_row_outside_without_a_field_is_told_before_anything_runs() -> None:
    odd = replace(PLAIN, outside=[Example({"title": "a"})])
    for method in (
        Trained("m", zoo.build("bert-encoder"), dp.Task("{text}", PAIR)),
        Probe("m", zoo.build("bert-encoder")),
    ):
        with pytest.raises(ConfigError, match="method 'm' on films: .*text"):
            compared(method, data=odd)


def test_fit_has_no_such_rows() -> None:
    made = build({"data": [{"name": "a", "train": "a", "test": "b", "outside": "c"}], "methods": [{"name": "m"}]})
    assert made.datasets[0].outside == "c"
    from deltaprompt.cli.recipe import build as of_fit

    with pytest.raises(ConfigError, match="unknown key 'outside'"):
        of_fit({"data": {"train": "a", "outside": "c"}})
