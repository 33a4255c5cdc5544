"""Comparisons: statistics by brute force, what is kept and done again, other libraries, tables, and the command."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.testing import assert_close

import deltaprompt as dp
from deltaprompt.calibrations.contextual import Contextual
from deltaprompt.cli import compare as command
from deltaprompt.cli.compare_recipe import build
from deltaprompt.cli.recipe import read_toml
from deltaprompt.errors import ConfigError, DataError, DeltaPromptError, StoreError, TrainingError
from deltaprompt.study import (
    Called,
    Comparison,
    DataSet,
    Difference,
    Entry,
    Method,
    Outcome,
    Probe,
    Trained,
    as_json,
    compare,
    csv_of,
    markdown,
    plot,
)
from deltaprompt.study.bootstrap import Metric, accuracy, drawn, macro_f1, seen
from deltaprompt.study.cells import FILE, Cell, Key
from deltaprompt.study.comparison import marks
from deltaprompt.study.data import Shots
from deltaprompt.study.probe import regression
from deltaprompt.study.trained import answers
from deltaprompt.types import Example
from tests import backbones_zoo as zoo
from tests import files
from tests.command import fails, last_json, run, succeeds

ROOT = Path(__file__).parents[2]
GOOD = ("a good film", "so good", "good", "three good films", "it was good", "good good", "yes good", "a good plot")
BAD = ("a bad film", "so bad", "bad", "three bad films", "it was bad", "bad bad", "no bad", "a bad plot")
ROWS = [
    Example({"text": text}, label)
    for good, bad in zip(GOOD, BAD, strict=True)
    for text, label in ((good, "g"), (bad, "b"))
]
TRAIN, TEST = ROWS[:10], ROWS[10:]
DATA = DataSet("films", TRAIN, TEST)
OTHERS = [Example({"text": text}, "neither") for text in ("the cat sat on the mat", "a", "the dog was there")]
SHORT = dp.Training(steps=2)
KEY = Key("m", "x", 1, 0, "", "", "", 40)


@dataclass
class Fixed(Method):
    """Answers every row rightly but for `wrong` of them; notes what it is asked."""

    name: str
    wrong: int = 0
    option: int = 0
    zero: bool = False
    fails_at: Shots | None = None
    together: int = 2
    asked: list[tuple[str, Shots, tuple[int, ...]]] = field(default_factory=list)

    def entry(self, data: DataSet) -> Entry:
        return Entry({"option": self.option, "wrong": self.wrong}, "", self.zero)

    def ready(self) -> None:
        self.asked.append(("ready", 0, ()))

    def run(self, data: DataSet, shots: Shots, seeds: Sequence[int]) -> Sequence[Outcome | str]:
        self.asked.append((data.name, shots, tuple(seeds)))
        if shots == self.fails_at:
            raise ValueError("it broke")
        return [self._one(data, seed) for seed in seeds]

    def _one(self, data: DataSet, seed: int) -> Outcome:
        found = data.gold.copy()
        found[: self.wrong + seed % 2] = -1
        return Outcome(found, 1.5, 10, 100)

    @property
    def ran(self) -> list[tuple[str, Shots, tuple[int, ...]]]:
        done = [one for one in self.asked if one[0] != "ready"]
        self.asked.clear()
        return done


# Statistics


def every_draw(ours: Any, theirs: Any, gold: Sequence[int], classes: int, metric: Metric) -> list[float]:
    """The difference on every sequence of rows and of seeds that can be drawn, each as likely as any other."""

    def score(found: Sequence[int], rows: Sequence[int]) -> float:
        if metric == "accuracy":
            return sum(found[i] == gold[i] for i in rows) / len(rows)
        each = []
        for c in range(classes):
            both = sum(found[i] == c == gold[i] for i in rows)
            said, are = sum(found[i] == c for i in rows), sum(gold[i] == c for i in rows)
            each.append(2 * both / (said + are) if said + are else 0.0)
        return sum(each) / classes

    n, s = len(gold), len(ours)
    return [
        sum(score(ours[seed], rows) - score(theirs[seed], rows) for seed in seeds) / s
        for rows in itertools.product(range(n), repeat=n)
        for seeds in itertools.product(range(s), repeat=s)
    ]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_the_draws_are_those_of_brute_force(metric: Metric) -> None:
    gold, ours, theirs = np.array([0, 1, 2, 1]), np.array([[0, 1, 2, 0], [0, 0, 2, 1]]), np.array([[0, 2, 1, 1]] * 2)
    every = np.array(every_draw(ours, theirs, gold.tolist(), 3, metric)).round(9)
    (found,) = drawn([(ours, theirs)], gold, 3, metric)
    found = found.round(9)
    assert {*found} <= {*every}
    for value in {*every}:
        assert abs((found == value).mean() - (every == value).mean()) < 0.015
    (mean,) = seen([(ours, theirs)], gold, 3, metric)
    rows, seeds = range(4), range(2)
    assert mean == pytest.approx(
        every_draw(ours, theirs, gold.tolist(), 3, metric)[
            list(itertools.product(itertools.product(rows, repeat=4), itertools.product(seeds, repeat=2))).index(
                ((0, 1, 2, 3), (0, 1))
            )
        ]
    )
    told = Difference.of(mean, found)
    assert told.p == pytest.approx((every <= 0).mean(), abs=0.015)
    assert (told.low, told.high) == pytest.approx(tuple(np.percentile(every, (2.5, 97.5))), abs=0.05)


def test_draws_are_seeded_and_the_same_for_all_pairs() -> None:
    chance = np.random.default_rng(0)
    gold, a, b = chance.integers(0, 3, 50), chance.integers(0, 3, (3, 50)), chance.integers(0, 3, (3, 50))
    first = drawn([(a, b), (b, a), (a, a)], gold, 3, "accuracy", 200)
    assert (first[0] == -first[1]).all()
    assert not first[2].any()
    assert (first == drawn([(a, b), (b, a), (a, a)], gold, 3, "accuracy", 200)).all()
    assert (first != drawn([(a, b), (b, a), (a, a)], gold, 3, "accuracy", 200, seed=1)).any()


def test_identical_methods_and_all_right_against_all_wrong() -> None:
    gold = np.zeros(30, dtype=np.int64)
    right, wrong = np.zeros((3, 30), dtype=np.int64), np.full((3, 30), -1)

    def difference(ours: Any, theirs: Any) -> Difference:
        (each,) = drawn([(ours, theirs)], gold, 1, "accuracy")
        return Difference.of(*seen([(ours, theirs)], gold, 1, "accuracy"), each)

    same = difference(right, right)
    assert (same.mean, same.low, same.high, same.p, same.sign) == (0, 0, 0, 1, 0)
    better = difference(right, wrong)
    assert (better.mean, better.low, better.high, better.sign) == (1, 1, 1, 1)
    assert better.p < 0.001
    worse = difference(wrong, right)
    assert (worse.mean, worse.p, worse.sign) == (-1, 1, -1)


def test_scores_are_those_of_the_cells() -> None:
    chance = np.random.default_rng(1)
    labels = ("a", "b", "c", "d")
    rows = [Example({"text": str(i)}, labels[c]) for i, c in enumerate(chance.integers(0, 3, 40))]
    data = DataSet("x", rows, rows, labels=labels)
    found = chance.integers(-1, 4, (2, 40))
    once = np.ones((1, 40), dtype=np.float32)
    for seed, own in enumerate(found):
        cell = Cell.of(KEY, data, Outcome(own, 0.0, 1, 1))
        assert accuracy(once, found, data.gold, 4)[0, seed] == pytest.approx(cell.accuracy)
        assert macro_f1(once, found, data.gold, 4)[0, seed] == pytest.approx(cell.macro_f1)
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(cell.right), dtype=np.uint8))[:40]
        assert (bits == (own == data.gold)).all()


@dataclass
class Place:
    mean: float | None
    error: float = 0.0
    whole: bool = True


def test_the_error_of_a_mean_over_shots_counts_seeds_not_columns() -> None:
    found = compared(*(Fixed("m", wrong=n) for n in (1,)), shots=[1, 2])
    (total,) = found.totals
    sums = [sum(f.each[seed] for f in found.figures) / 2 for seed in range(3)]
    assert total.error == pytest.approx(np.std(sums, ddof=1) / 3**0.5)


def test_the_probe_of_a_label_with_one_row() -> None:
    states = np.eye(8)[[0, 0, 0, 0, 0, 0, 0, 1]] * 9 + np.arange(64).reshape(8, 8) / 1000
    fitted = regression(states, ["a"] * 7 + ["b"])
    assert fitted.C == 1.0
    assert set(fitted.predict(states)) == {"a", "b"}


def test_what_begins_by_chance_is_not_asked_at_zero_shots() -> None:
    backbone = zoo.build("bert-encoder")
    each = {
        name: dp.Task("{text}", ("b", "g"), v)
        for name, v in {"soft": dp.SoftVerbalizer(), "sphere": dp.Prototypes()}.items()
    }
    entries = {name: Trained(name, backbone, task).entry(DATA) for name, task in each.items()}
    assert [entry.zero_shot for entry in entries.values()] == [False, True]


def test_what_shows_examples_is_asked_where_there_are_some() -> None:
    task = dp.Task("{demos:2}{text} {mask}\n", {"b": "bad", "g": "good"}, calibration=Contextual())
    shows = Trained("shows", zoo.build("gpt2"), task)
    assert not shows.entry(DATA).zero_shot
    found = compare([DATA], [shows], shots=[0, 2], seeds=(0, 1))
    assert [(figure.shots, len(figure.each), figure.failed) for figure in found.figures] == [(0, 0, {}), (2, 2, {})]


def test_the_best_and_what_is_within_its_standard_error() -> None:
    each = [Place(0.8, 0.02), Place(0.79), Place(0.775, 0.9), Place(0.9, whole=False), Place(None)]
    assert marks(each) == [(True, False), (False, True), (False, False), (False, False), (False, False)]
    assert marks([Place(0.5), Place(0.5)]) == [(True, False)] * 2
    assert marks([Place(None)]) == [(False, False)]


# Data


@pytest.mark.parametrize("shots", [1, 3, "all"])
def test_the_support_is_the_same_with_and_without_dev(shots: Shots) -> None:
    for seed in (0, 1):
        train, dev = DATA.draw(shots, seed, dev=True)
        alone, none = DATA.draw(shots, seed, dev=False)
        assert (list(train), none) == (list(alone), None)
        assert dev is not None
        assert not [row for row in dev if row in train]
        assert len(train) == (2 * shots if shots != "all" else 8)
    assert DATA.draw(0, 0, dev=True) == ([], None)
    assert DATA.draw(1, 0, dev=True) != DATA.draw(1, 1, dev=True)


def test_rows_to_choose_by_that_are_given_or_not_wanted() -> None:
    own = replace(DATA, dev=TEST[:2])
    assert own.draw("all", 0, dev=True) == (TRAIN, TEST[:2])
    assert own.draw("all", 0, dev=False) == (TRAIN, None)
    assert replace(DATA, hold_out=False).draw("all", 0, dev=True) == (TRAIN, None)


def test_at_most_so_many_test_rows_evenly_spaced_and_what_the_digest_sees() -> None:
    assert [row.fields["text"] for row in DATA.limited(3).test] == [TEST[i].fields["text"] for i in (0, 2, 4)]
    assert DATA.limited(None) is DATA
    assert DATA.digest == DataSet("other", list(TRAIN), list(TEST)).digest
    others = [
        DATA.limited(3),
        replace(DATA, train=TRAIN[::-1]),
        replace(DATA, unlabelled=TEST),
        replace(DATA, dev=TEST),
    ]
    assert len({DATA.digest, *(other.digest for other in others)}) == 5


def test_data_that_cannot_be_compared_on() -> None:
    with pytest.raises(
        DataError, match=r"films: test row 2 has the label 'q', which is not among the 2 of the training"
    ):
        replace(DATA, test=[TEST[0], Example({"text": "x"}, "q")])
    with pytest.raises(DataError, match="films: there are no test rows"):
        replace(DATA, test=[])
    with pytest.raises(ConfigError, match="films: rows have several labels"):
        DataSet("films", [Example({"text": "x"}, labels=("a", "b"))], TEST)


# What is kept


def compared(*methods: Method, out: Path | None = None, **more: Any) -> Comparison:
    asked: dict[str, Any] = {"shots": [1, 2], "seeds": [0, 1, 2], "out": out, **more}
    return compare(asked.pop("datasets", [DATA]), methods, **asked)


ALL = [("films", k, seeds) for k in (1, 2) for seeds in ((0, 1), (2,))]


def test_what_is_kept_is_not_computed_again(tmp_path: Path) -> None:
    method = Fixed("m", wrong=1)
    first = compared(method, out=tmp_path)
    assert method.asked[0][0] == "ready"
    assert method.ran == ALL
    assert compared(method, out=tmp_path) == first
    assert method.asked == []  # not even asked whether it is ready
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    (tmp_path / FILE).write_bytes(b"".join(lines[:-1]) + lines[-1][:40])  # as a kill leaves it
    told: list[str] = []
    assert compared(method, out=tmp_path, say=told.append) == first
    assert method.ran == [("films", 2, (2,))]
    assert "1 line of cells.jsonl cut off or of another form, left out" in told
    again = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    assert (again[:5], again[5], json.loads(again[6])) == (lines[:5], lines[-1][:40] + b"\n", json.loads(lines[5]))
    assert compared(method, out=tmp_path) == first
    assert method.ran == []


@pytest.mark.parametrize("line", ["{}", "[]", "7", '{"method": "m"}', "whole"])
def test_lines_of_another_form_are_left_out(tmp_path: Path, line: str) -> None:
    method = Fixed("m")
    first = compared(method, out=tmp_path, shots=[1], seeds=[0])
    whole = json.loads((tmp_path / FILE).read_text())
    whole["found"].pop()
    files.written(tmp_path / FILE, (json.dumps(whole) if line == "whole" else line) + "\n")
    method.ran.clear()
    assert compared(method, out=tmp_path, shots=[1], seeds=[0]) == first
    assert method.ran == [("films", 1, (0,))]


def test_cells_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    a, b = Fixed("a"), Fixed("b", wrong=2)
    compared(a, b, out=tmp_path)
    assert a.ran == b.ran == ALL
    b.option = 1
    found = compared(a, b, out=tmp_path)
    assert (a.ran, b.ran) == ([], ALL)
    assert found.at("b", "films", 1).mean == pytest.approx(1 - (2 / 6 + 3 / 6 + 2 / 6) / 3)
    b.option = 0
    compared(a, b, out=tmp_path, seeds=[0, 1, 2, 3])  # the old ones are still there
    assert a.ran == b.ran == [("films", k, (3,)) for k in (1, 2)]
    compared(a, b, out=tmp_path, test_rows=5)
    assert a.ran == b.ran == ALL
    compared(a, b, out=tmp_path, datasets=[replace(DATA, train=TRAIN[::-1])])
    assert a.ran == b.ran == ALL
    compared(a, b, out=tmp_path, metric="macro_f1")
    assert a.ran == b.ran == []


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compared(Fixed("m"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be a folder of results"):
        compared(Fixed("m"), out=tmp_path / "file")


def test_a_method_that_fails_is_told_and_others_go_on(tmp_path: Path) -> None:
    bad, good = Fixed("bad", fails_at=2), Fixed("good", wrong=1)
    found = compared(bad, good, out=tmp_path, baseline="bad")
    assert found.at("bad", "films", 2).failed == dict.fromkeys((0, 1, 2), "ValueError: it broke")
    assert found.at("good", "films", 2).whole
    assert found.at("good", "films", 2).difference is None
    assert found.totals[1].difference is not None
    shown = markdown(found)
    assert "| bad | **0.944 ± 0.096** | failed | 0.944 (1 of 2) | – |" in shown
    assert "Failed: bad on films, 2 shots, seeds 0, 1, 2: ValueError: it broke" in shown
    assert len((tmp_path / FILE).read_text().splitlines()) == 9
    assert bad.ran == ALL
    bad.fails_at = None
    assert compared(bad, good, out=tmp_path).totals[0].whole
    assert bad.ran == ALL[2:]
    with pytest.raises(TrainingError, match="no cell came to its end: ValueError: it broke"):
        compared(Fixed("bad", fails_at=1), shots=[1])


def test_without_shots_there_is_one_seed_and_methods_may_have_no_answer() -> None:
    zero, needs = Fixed("zero", zero=True), Fixed("needs")
    found = compared(zero, needs, shots=[0, 1], baseline="zero")
    assert zero.ran == [("films", 0, (0,)), *ALL[:2]]
    assert needs.ran == ALL[:2]
    assert "| zero | **1.000** |" in markdown(found)
    assert "| needs | – |" in markdown(found)
    assert [f.difference is None for f in found.figures if f.method == "needs"] == [True, False]
    assert "| +0.000 [+0.000, +0.000] (1 of 2) |" in markdown(found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": []}, "seeds = []: there is one or more, and each once"),
        ({"seeds": [1, 1]}, "seeds = [1, 1]: there is one or more, and each once"),
        ({"shots": []}, 'shots = []: each is 0, a number above it or "all", and there once'),
        ({"shots": [1, -1]}, "shots = [1, -1]: each is 0"),
        ({"shots": ["all", "all"]}, "shots = ['all', 'all']: each is 0"),
        ({"baseline": "n"}, "baseline = 'n' is no method here; possible: m"),
        ({"test_rows": 0}, "test_rows = 0: it is a whole number, 1 or more, or left out for all"),
        ({"metric": "f2"}, "metric = 'f2' is not possible; possible: accuracy, macro_f1"),
        ({"datasets": []}, "there is no data set; a comparison has one or more"),
        ({"datasets": [DATA, DATA]}, "two data sets are called 'films'; give each a name of its own"),
        ({"shots": [0]}, "method 'm' on films needs examples, and shots has 0 alone; add others"),
    ],
)
def test_what_cannot_be_asked(changed: dict[str, Any], message: str) -> None:
    method = Fixed("m")
    with pytest.raises(ConfigError) as raised:
        compared(method, **changed)
    assert message in str(raised.value)
    assert method.asked == []


# Our own methods


@pytest.fixture(scope="module")
def encoder() -> Any:
    return zoo.build("bert-encoder")


@pytest.fixture(scope="module")
def masked() -> Any:
    return zoo.build("bert")


WORDS = {"g": "good", "b": "bad"}
MASKED = dp.Task("{text} it was {mask}", WORDS)
LORA = [dp.LoRA(2, at=("attn.q",))]


def test_seeds_train_together_as_fit_trains_each(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Trained("m", encoder, dp.Task("{text}", WORDS), LORA, SHORT)
    found = compared(method, shots=[2], seeds=[0, 1])
    for cell in found.figures[0].cells:
        model = dp.adapt(encoder, dp.Task("{text}", WORDS), LORA, cell.key.seed)
        train, dev = dp.few_shot(TRAIN, 2, cell.key.seed)
        run = dp.fit(model, train, dev, training=SHORT, seed=cell.key.seed)
        assert [DATA.labels[c] for c in cell.found] == [told["label"] for told in model.predict(TEST)]
        assert (cell.trainable, cell.key.backbone) == (run.trainable, encoder.fingerprint)
        assert cell.cpu_seconds > 0
        model.adapted.remove()
    apart = compared(replace(method, together=1), shots=[2], seeds=[0, 1])
    assert [c.found for c in apart.figures[0].cells] == [c.found for c in found.figures[0].cells]


def test_cpu_seconds_are_split_evenly_among_seeds_of_one_pass(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 103.0, 200.0, 201.0))
    monkeypatch.setattr("deltaprompt.study.trained.time.process_time", lambda: next(clock))
    method = Trained("m", encoder, dp.Task("{text}", WORDS), LORA, SHORT, together=2)
    found = compared(method, shots=[1], seeds=[0, 1, 2])
    assert [cell.cpu_seconds for cell in found.figures[0].cells] == [1.5, 1.5, 1.0]


def test_bytes_are_those_of_the_saved_adaptation(encoder: Any, tmp_path: Path) -> None:
    method = Trained("m", encoder, dp.Task("{text}", WORDS), LORA, SHORT)
    (cell,) = compared(method, shots=[1], seeds=[3]).figures[0].cells
    model = dp.adapt(encoder, dp.Task("{text}", WORDS), LORA, 3)
    dp.fit(model, *dp.few_shot(TRAIN, 1, 3), training=SHORT, seed=3)
    assert cell.bytes == model.save(tmp_path)
    model.adapted.remove()


@pytest.mark.parametrize("demos", ["", "{demos:2} "])
def test_a_frozen_backbone_runs_once_for_all_seeds_with_the_same_answers(masked: Any, demos: str) -> None:
    task = dp.Task(f"{demos}{{text}} it was {{mask}}", WORDS, dp.SoftVerbalizer(0.5) if not demos else None)
    model = dp.Model(masked, task, [], [0, 1])
    if demos:
        for slot in (0, 1):
            model.demonstrate(TRAIN[slot * 4 : slot * 4 + 4], slot, slot)
    passes: list[int] = []
    handle = masked.base.register_forward_hook(lambda *_: passes.append(1))
    found = answers(model, [0, 1], DATA)
    assert len(passes) == (2 if demos else 1)  # all rows fit in one batch
    outside = answers(model, [0, 1], replace(DATA, outside=OTHERS))
    handle.remove()
    assert len(passes) == 3 * (2 if demos else 1)
    for slot in (0, 1):
        classes, inside, _ = found[slot]
        assert classes.tolist() == DATA.classes([told["label"] for told in model.predict(TEST, slot=slot)]).tolist()
        assert_close(inside, model.max_logit(TEST, slot=slot), rtol=0, atol=1e-6)
        assert_close(outside[slot][1], inside, rtol=0, atol=0)
        assert_close(outside[slot][2], model.max_logit(OTHERS, slot=slot), rtol=0, atol=1e-6)
    assert answers(model, [], DATA) == {}
    model.adapted.remove()


def test_with_no_shots_nothing_is_trained(masked: Any, tmp_path: Path) -> None:
    method = Trained("m", masked, MASKED, LORA, SHORT)
    (cell,) = compared(method, shots=[0]).figures[0].cells
    model = dp.adapt(masked, MASKED)
    assert [DATA.labels[c] for c in cell.found] == [told["label"] for told in model.predict(TEST)]
    assert (cell.trainable, cell.bytes) == (0, model.save(tmp_path))
    model.adapted.remove()


def test_what_learns_nothing_answers_without_examples_alone(masked: Any) -> None:
    frozen, other = Trained("frozen", masked, MASKED), Trained("trained", masked, MASKED, LORA, SHORT)
    found = compared(frozen, other, shots=[0, 1], seeds=[0])
    assert [bool(found.at("frozen", "films", k).cells) for k in (0, 1)] == [True, False]
    assert [bool(found.at("trained", "films", k).cells) for k in (0, 1)] == [True, True]
    with pytest.raises(ConfigError, match="method 'frozen' on films learns nothing from examples, and shots has no 0"):
        compared(frozen, shots=[1])


def test_too_few_rows_of_a_label_are_one_cells_failure(encoder: Any) -> None:
    method = Trained("m", encoder, dp.Task("{text}", WORDS), LORA, SHORT)
    found = compared(method, replace(method, name="no dev", dev=False), shots=[1, 5], seeds=[0])
    assert "class 'b' has 5 rows (and 1 more class has too few)" in found.at("m", "films", 5).failed[0]
    assert found.at("no dev", "films", 5).whole
    assert found.at("m", "films", 1).whole


@pytest.mark.parametrize(
    ("task", "deltas", "message"),
    [
        (dp.Task("{title}", WORDS), LORA, "method 'm' on films: "),
        (dp.Task("{text}", WORDS), [dp.LoRA(at=("attn.z",))], "attn.z"),
        (dp.Task("{text}", {"g": "good", "c": "bad"}), LORA, "there is no label 'b'"),
        ({"other": dp.Task("{text}", WORDS)}, LORA, "method 'm' has no task for 'films'; it has other"),
    ],
)
def test_mistakes_are_told_before_anything_runs(encoder: Any, task: Any, deltas: Any, message: str) -> None:
    first = Fixed("first")
    with pytest.raises(ConfigError) as raised:
        compared(first, Trained("m", encoder, task, deltas))
    assert message in str(raised.value)
    assert first.asked == []


def test_the_probe(encoder: Any) -> None:
    found = compared(Probe("probe", encoder, max_length={"films": 8}), shots=[1, 4], seeds=[0])
    (cell,) = found.at("probe", "films", 4).cells
    assert (cell.trainable, cell.bytes) == (17, 17 * cell.bytes // 17 if cell.bytes else 0)
    assert cell.bytes in (17 * 4, 17 * 8)
    with pytest.raises(ConfigError, match="method 'probe' on films"):
        compared(Probe("probe", encoder, "{title}"))


# Other libraries' methods

PEER = '''
"""A method of another library."""
import os

def run(train, dev, test, labels, seed, options):
    assert [row.label for row in test] == [None] * len(test)
    print("much ado")
    last = "good" if options.get("good", True) else "bad"
    found = ["g" if last in row.fields["text"] else "b" for row in test]
    sizes = [len(train), -1 if dev is None else len(dev), len(labels), seed]
    if "say" in options:
        return found, options["say"]
    return found, {"trainable": sizes[options["size"]]} if "size" in options else {}

def short(train, dev, test, labels, seed, options):
    return ["g"]

def odd(train, dev, test, labels, seed, options):
    return ["good"] * len(test)

def breaks(train, dev, test, labels, seed, options):
    if seed == 1:
        raise ValueError("not today")
    return ("g",) * len(test)

def dies(train, dev, test, labels, seed, options):
    print("last words", flush=True)
    os._exit(3)
'''


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module that a process finds where this one finds its modules."""
    folder = tmp_path_factory.mktemp("peers")
    files.written(folder / "a_peer.py", PEER)
    sys.path.insert(0, str(folder))
    yield "a_peer"
    sys.path.remove(str(folder))


def called(function: str, **options: Any) -> Called:
    return Called("peer", f"a_peer:{function}", options)


def test_a_function_is_called_in_a_process_of_its_own(peer: str) -> None:
    found = compared(called("run"), shots=[2], seeds=[7])
    (cell,) = found.figures[0].cells
    assert (cell.accuracy, cell.trainable, cell.bytes, cell.key.backbone) == (1.0, None, None, "")
    assert cell.cpu_seconds < 1
    assert "a_peer" not in sys.modules
    for size, value in enumerate([4, -1, 2, 7]):  # rows to train on, to choose by, labels, seed
        (cell,) = compared(called("run", size=size), shots=[2], seeds=[7]).figures[0].cells
        assert cell.trainable == value
    (cell,) = compared(replace(called("run", size=1), dev=True), shots=[2], seeds=[7]).figures[0].cells
    assert cell.trainable == 4


def test_what_a_function_may_say_beside_its_labels(peer: str) -> None:
    said = {"trainable": 3, "bytes": 12, "cpu_seconds": 0.25}
    (cell,) = compared(called("run", say=said), shots=[1], seeds=[0]).figures[0].cells
    assert (cell.trainable, cell.bytes, cell.cpu_seconds) == (3, 12, 0.25)
    with pytest.raises(TrainingError, match="beside labels it gave 'seconds'; possible: trainable, bytes, cpu_seconds"):
        compared(called("run", say={"seconds": 1}), shots=[1], seeds=[0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "it gave 1 labels for 6 test rows; it must give one for each"),
        ("odd", "it gave test row 1 the label 'good'"),
        ("dies", "its process ended with exit code 3: last words"),
    ],
)
def test_functions_that_fail(peer: str, function: str, message: str) -> None:
    with pytest.raises(TrainingError) as raised:
        compared(called(function), shots=[1], seeds=[0])
    assert message in str(raised.value)


def test_a_function_that_fails_from_one_seed(peer: str, tmp_path: Path) -> None:
    found = compared(called("breaks"), Fixed("base"), shots=[1], seeds=[0, 1, 2], out=tmp_path, baseline="base")
    assert found.figures[0].failed == {1: "ValueError: not today"}
    assert [c.key.seed for c in found.figures[0].cells] == [0, 2]
    assert found.figures[0].difference is not None
    assert "| peer | 0.500 ± 0.000 ▼ (2 of 3 seeds) |" in markdown(found)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("a_peer:walk", "method 'peer', function 'a_peer:walk': LookupError: there is no function 'walk' in a_peer"),
        ("nowhere.at_all:run", "ModuleNotFoundError: No module named 'nowhere'"),
        ("a_peer", "method 'peer': function = 'a_peer'; write module:function"),
        ("a peer:run", "function = 'a peer:run'; write module:function"),
    ],
)
def test_functions_that_are_not_there(peer: str, function: str, message: str) -> None:
    first = Fixed("first")
    with pytest.raises(ConfigError) as raised:
        compared(first, Called("peer", function))
    assert message in str(raised.value)
    assert first.ran == []
    with pytest.raises(ConfigError, match="its options cannot be written as JSON"):
        Called("peer", "a_peer:run", {"at": DATA})


# Tables


@pytest.fixture
def found() -> Comparison:
    other = DataSet("other | one", TRAIN, TEST[:4])
    methods = [Fixed("base", wrong=3), Fixed("best"), Fixed("near", wrong=0, option=1), Fixed("worst", wrong=6)]
    return compared(*methods, datasets=[DATA, other], shots=[1, "all"], seeds=[0, 1], baseline="base")


def test_the_table(found: Comparison) -> None:
    lines = markdown(found).splitlines()
    assert lines[0] == (
        "| accuracy | films, 1 shot | films, all rows | other \\| one, 1 shot | other \\| one, all rows | mean | "
        "mean − base [95 %] | CPU-seconds | trained | bytes |"
    )
    assert lines[2].startswith("| base | 0.417 ± 0.118 | 0.417 ± 0.118 | 0.125 ± 0.177 |")
    assert lines[2].endswith("| 0.271 | – | 1.5 | 10 | 100 |")
    assert lines[3].startswith("| best | **0.917 ± 0.118** ▲ |")
    assert "| **0.896** | +0.625 [+0." in lines[3]
    assert "▼" in lines[5]
    assert "Mean ± sample standard deviation over 2 seeds. Test rows: films 6, other | one 4." in lines[7]


def test_the_mean_difference_is_over_all_cells(found: Comparison) -> None:
    total = found.totals[1].difference
    each = [f.difference for f in found.figures if f.method == "best"]
    assert total is not None
    assert total.mean == pytest.approx(np.mean([d.mean for d in each if d is not None]))
    assert total.low >= min(d.low for d in each if d is not None)
    assert (total.sign, total.p < 0.01) == (1, True)


def test_the_table_as_csv_and_json(found: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_of(found))))
    assert len(rows) == 16
    told = as_json(found)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    best = next(row for row in rows if (row["method"], row["data"], row["shots"]) == ("best", "films", "all"))
    assert best["best"] == "True"
    assert json.loads(best["each"]) == [1.0, pytest.approx(5 / 6)]
    assert float(best["difference"]) == pytest.approx(0.5)
    assert [best[name] for name in ("cpu_seconds", "trainable", "bytes", "test_rows")] == ["1.5", "10", "100", "6"]
    figure = next(f for f in told["figures"] if (f["method"], f["data"], f["shots"]) == ("best", "films", "all"))
    assert figure["difference"] == pytest.approx(float(best["difference"]))
    assert [t["method"] for t in told["totals"]] == ["base", "best", "near", "worst"]


def test_the_plot(found: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    plot(found, tmp_path / "plot.svg")
    drawn_text = (tmp_path / "plot.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn_text for name in ("base", "best", "near", "worst", "shots", "all"))


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, peer: str) -> Path:
    """A folder with a tiny encoder, two files of rows and a recipe."""
    folder = tmp_path_factory.mktemp("place")
    backbone = zoo.build("bert-encoder")
    backbone.model.save_pretrained(folder / "tiny")
    backbone.tokenizer.save_pretrained(folder / "tiny")
    files.rows(folder / "train.jsonl", *({"text": r.fields["text"], "label": r.label} for r in TRAIN))
    files.rows(folder / "test.jsonl", *({"review": r.fields["text"], "stars": r.label} for r in TEST))
    files.rows(folder / "all.jsonl", *({"review": r.fields["text"], "stars": r.label} for r in ROWS))
    return folder


RECIPE = """
shots = [1, 2]
seeds = "0-1"
baseline = "probe"
[backbone]
name = "{place}/tiny"
device = "cpu"
[[data]]
name = "films"
train = "{place}/all.jsonl"
test_share = 0.4
text = "review"
label = "stars"
[data.task]
max_length = 16
[data.task.labels]
g = "good"
b = "bad"
[[data]]
name = "others"
train = "{place}/train.jsonl"
test = "{place}/train.jsonl"
[[methods]]
name = "prototypes"
verbalizer = "prototypes:scale=5"
template = "it was {{text}}"
deltas = "lora:rank=2,at=attn.q"
[methods.training]
steps = 2
dev = false
[methods.tasks.films]
template = "so {{text}}"
max_length = 20
[[methods]]
name = "probe"
kind = "probe"
[[methods]]
name = "peer"
kind = "call"
function = "a_peer:run"
options = {{ good = false }}
"""


@pytest.fixture
def recipe(place: Path, tmp_path: Path) -> Path:
    return files.written(tmp_path / "recipe.toml", RECIPE.format(place=place))


def test_the_command(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    done = succeeds("compare", recipe, "--out", out)
    assert "24 cells, 0 of them in" in done.stderr
    assert "1 of 24: films, 1 shot: prototypes, seeds 0, 1" in done.stderr
    assert (out / "table.md").read_text() == done.stdout
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [(row["method"], row["data"], row["shots"]) for row in rows[:4]] == [
        ("prototypes", "films", "1"),
        ("probe", "films", "1"),
        ("peer", "films", "1"),
        ("prototypes", "films", "2"),
    ]
    assert (out / "plot.png").stat().st_size > 1000
    cells = [json.loads(line) for line in (out / FILE).read_text().splitlines()]
    assert {(c["data"], c["shots"], c["seed"]) for c in cells if c["method"] == "peer"} == {
        (data, k, seed) for data in ("films", "others") for k in (1, 2) for seed in (0, 1)
    }
    again = succeeds("compare", recipe, "--out", out, "--json")
    assert "24 cells, 24 of them in" in again.stderr
    assert last_json(again)["baseline"] == "probe"
    files.written(recipe, recipe.read_text().replace("steps = 2", "steps = 3"))
    changed = succeeds("compare", recipe, "--out", out)
    assert "24 cells, 16 of them in" in changed.stderr
    assert "1 of 8: films, 1 shot: prototypes" in changed.stderr
    assert [line for line in changed.stderr.splitlines() if "peer" in line or ": probe" in line] == []


def test_what_a_method_asks_of_each_data_set(recipe: Path) -> None:
    made = build(read_toml(recipe))
    method, (films, others) = made.methods[0], made.datasets
    assert method.task_of(films).template == "so {text}"
    assert method.task_of(films).labels == {"g": "good", "b": "bad"}
    assert (method.task_of(films).max_length, method.task_of(others).max_length) == (20, None)
    assert made.methods[1].task_of(films).max_length == 16
    assert method.task_of(others).template == "it was {text}"
    assert method.task_of(others).verbalizer == {"kind": "prototypes", "scale": "5"}
    assert (method.training.steps, method.dev, made.methods[2].dev) == (2, False, False)


def test_a_recipe_of_zero_shots_and_words(place: Path, tmp_path: Path) -> None:
    backbone = zoo.build("bert")
    backbone.model.save_pretrained(tmp_path / "tiny")
    backbone.tokenizer.save_pretrained(tmp_path / "tiny")
    recipe = f"""
shots = [0, "all"]
seeds = [3]
test_rows = 4
metric = "macro_f1"
[backbone]
name = "{tmp_path}/tiny"
device = "cpu"
[[data]]
name = "films"
train = "{place}/train.jsonl"
test = "{place}/train.jsonl"
[data.task]
template = "{{text}} it was {{mask}}"
labels = {{ g = ["good", "yes"], b = "bad" }}
[[methods]]
name = "words"
calibration = "contextualised"
deltas = []
[[methods]]
name = "encoder"
backbone = {{ kind = "encoder" }}
template = "{{text}}"
training = {{ steps = 2 }}
"""
    done = succeeds("compare", files.written(tmp_path / "r.toml", recipe), "--json")
    told = last_json(done)
    assert [(f["method"], f["shots"]) for f in told["figures"]] == [
        ("words", 0),
        ("encoder", 0),
        ("words", "all"),
        ("encoder", "all"),
    ]
    assert all(f["test_rows"] == 4 and f["mean"] == f["macro_f1"] for f in told["figures"])
    assert told["figures"][0]["backbone"] != told["figures"][1]["backbone"]


def test_the_command_is_stopped_and_goes_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    arguments = ["compare", str(recipe), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["deltaprompt", *arguments])
    with monkeypatch.context() as patched:
        patched.setattr(Called, "_one", stop)
        said = fails(*arguments, code=130)
    assert said.endswith(f"stopped by Ctrl-C; go on with: deltaprompt compare {recipe} --out {tmp_path / 'out'}")
    assert "24 cells, 4 of them in" in succeeds(*arguments).stderr


def test_without_matplotlib_the_command_says_what_to_install(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command, "_data", lambda *_: pytest.fail("nothing is read"))
    said = fails("compare", recipe, "--out", tmp_path / "out")
    assert "pip install 'deltaprompt[plots]'" in said
    assert not (tmp_path / "out").exists()


MISTAKES = [
    ("shots = [1, 2]", "shot = [1, 2]", "unknown key 'shot' in the recipe; did you mean 'shots'?"),
    ("shots = [1, 2]", 'shots = ["some"]', "shots"),
    ('seeds = "0-1"', 'seeds = "a"', "seeds 'a': 'a' is no seed"),
    ('"probe"\n[backbone]', '"prob"\n[backbone]', "baseline = 'prob' is no method here; did you mean 'probe'?"),
    ("shots = [1, 2]", "metric = 'f1'", "metric = 'f1' is not possible; possible: accuracy, macro_f1"),
    ("shots = [1, 2]", "together = 0", "together = 0 is not possible"),
    ('device = "cpu"', 'devise = "cpu"', "unknown key 'devise' in [backbone]; did you mean 'device'?"),
    ('name = "films"', "", "[[data]] 1 has no name"),
    ('name = "films"', 'name = "others"', "two data sets are called 'others'"),
    ('text = "review"', 'txt = "review"', "unknown key 'txt' in [[data]] 1; did you mean 'text'?"),
    ('text = "review"', 'seen = "review"', "seen in [[data]] 'films' is not for a comparison; leave it out"),
    ("test_share = 0.4", "", "[[data]] 'films' has no test rows; give test = \"FILE\", or test_share = 0.2"),
    (
        "max_length = 16",
        "length = 16",
        "unknown key 'length' in the task of [[data]] 'films'; did you mean 'max_length'?",
    ),
    ("[methods.tasks.films]", "[methods.tasks.film]", "tasks has 'film', no data set; did you mean 'films'?"),
    ('deltas = "lora', 'delta = "lora', "unknown key 'delta' in [[methods]] 1; did you mean 'deltas'?"),
    ("rank=2", "rang=2", "delta 'lora' has no option 'rang'; did you mean 'rank'?"),
    ("prototypes:scale", "prototype:scale", "no verbalizer 'prototype'; did you mean"),
    ("steps = 2", "step = 2", "unknown key 'step' in training of [[methods]] 'prototypes'; did you mean 'steps'?"),
    ("dev = false", "dev = 3", "[[methods]] 'prototypes' dev"),
    ('kind = "probe"', 'kind = "prob"', "[[methods]] 2: kind = 'prob' is not possible; possible: fit, probe, call"),
    ('kind = "probe"', 'kind = "probe"\ndeltas = []', "unknown key 'deltas' in [[methods]] 2; possible: "),
    ('function = "a_peer:run"', "", "[[methods]] 'peer' has no function"),
    ('function = "a_peer:run"', 'function = "a_peer"', "function = 'a_peer'; write module:function"),
    ('function = "a_peer:run"', 'function = "a_peer:ran"', "there is no function 'ran' in a_peer"),
    ('text = "review"', 'text = "revue"', "revue"),
    ("so {text}", "so {text", "this '{' is never closed"),
    ("so {text}", "so {title}", "title"),
    ("at=attn.q", "at=attn.z", "method 'prototypes' on films: "),
    ('g = "good"', 'c = "good"', "method 'prototypes' on films: there is no label 'g'"),
]


@pytest.mark.parametrize(("before", "after", "message"), MISTAKES, ids=[after[:30] for _, after, _ in MISTAKES])
def test_mistakes_of_recipes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, message: str
) -> None:
    text = recipe.read_text()
    assert before in text
    files.written(recipe, text.replace(before, after, 1))
    for method in (Trained, Probe, Called):
        monkeypatch.setattr(method, "run", lambda *_: pytest.fail("something ran"))
    assert message in fails("compare", recipe)


def test_one_table_for_a_list_is_told() -> None:
    with pytest.raises(ConfigError, match=r"a comparison may have several data: write \[\[data\]\], each with a name"):
        build({"data": {"name": "x"}})
    with pytest.raises(DeltaPromptError, match="there is no data set; a comparison has one or more"):
        build({})


def test_the_example_recipe() -> None:
    path = ROOT / "recipes" / "compare.toml"
    made = build(read_toml(path))
    assert f"deltaprompt compare recipes/{path.name}" in path.read_text()
    assert [d.name for d in made.datasets] == ["agnews", "cr"]
    assert [m.name for m in made.methods] == ["frozen probe", "prototypes, frozen", "prototypes + LoRA"]


def test_the_recipe_that_the_page_shows() -> None:
    page = (ROOT / "docs" / "compare.md").read_text()
    made = build(tomllib.loads(page.partition("```toml\n")[2].partition("```")[0]))
    ours, probe, peer = made.methods
    task = ours.task_of(made.datasets[0])
    assert (task.template, task.labels["Sports"]) == ("{text}", "Sports news about games, teams and players.")
    assert (ours.backbone.kind, probe.backbone.kind, len(ours.deltas or ())) == ("encoder", None, 1)
    assert (made.shots, peer.options) == ((0, 1, 16, "all"), {"epochs": 1})


def test_help() -> None:
    assert "paired bootstrap" in " ".join(run("compare", "--help").output.split())
