"""Searches: their numbers by brute force, their controls, what they may look at and when, and going on after a kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaprompt as dp
from deltaprompt import search
from deltaprompt.calibrations.contextualised import Contextualised
from deltaprompt.cli.recipe import build, read_toml
from deltaprompt.cli.search import OWN, _search_of
from deltaprompt.errors import BackboneError, ConfigError, DataError, StoreError
from deltaprompt.search._beam import Fill, Rows, Vocabulary, set_beam
from deltaprompt.search._draws import averaged
from deltaprompt.search._frozen import Frozen
from deltaprompt.search._journal import Journal
from deltaprompt.search._lexicon import LEXICON
from deltaprompt.search._null import best_of, calls, first_right, needed, permuted, success, within
from deltaprompt.search._pool import Pool
from deltaprompt.search._result import Table, mixed
from deltaprompt.search._shape import Shape, usual_shapes, written, written_out
from deltaprompt.search.label_words import _Rows, assignments
from deltaprompt.templates import parse
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo
from tests.command import fails, last_json, run

ROOT = Path(__file__).parents[2]
TASK = dp.Task("{text} It was {mask}.", {"pos": "good", "neg": "bad"})
TEXTS = {
    "pos": ("a great movie", "great plot", "it was great", "a good film", "the cat sat", "good acting", "yes", "great"),
    "neg": ("a bad film", "terrible acting", "it was bad", "not good", "the dog sat", "bad plot", "no", "terrible"),
}
ROWS = [
    Example({"text": text}, label)
    for both in zip(*TEXTS.values(), strict=True)
    for label, text in zip(TEXTS, both, strict=True)
]
TRAIN, DEV, TEST = ROWS[:6], ROWS[6:10], ROWS[10:]
SMALL = search.Lottery(size=24, shortlist=6, ensemble=3, permutations=20, together=4)
MANY = replace(SMALL, size=400)


class Unlooked:
    """Test rows that say whether somebody has read them."""

    def __init__(self, rows: Sequence[Example] = TEST) -> None:
        self.rows = rows
        self.reads = 0

    def __call__(self) -> Sequence[Example]:
        self.reads += 1
        return self.rows


def lottery(backbone: Any = None, **how: Any) -> search.SearchResult:
    return search.lottery(backbone or zoo.build("bert"), TASK, TRAIN, DEV, **{"options": SMALL, **how})


def told(result: search.SearchResult) -> dict[str, Any]:
    """All of a result but its time."""
    return {name: value for name, value in result.as_json().items() if name != "seconds"}


def by_hand(backbone: Any, task: dp.Task, rows: Sequence[Example]) -> Tensor:
    """The probabilities of a model of its own."""
    model = dp.adapt(backbone, task)
    if "{demos" in task.template:
        model.demonstrate(TRAIN)
    if task.calibration is not None:
        model.calibrate(TRAIN)
    found = model.probabilities(rows)
    model.adapted.remove()
    return found


# What guesses find ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "prompts"), [(2, 1), (2, 6), (3, 4), (4, 5)])
def test_the_null_is_what_all_sequences_of_guesses_come_to(classes: int, prompts: int) -> None:
    every = list(itertools.product(range(classes), repeat=prompts))
    tries = [guesses.index(0) + 1 if 0 in guesses else None for guesses in every]
    assert success(classes, prompts) == pytest.approx(sum(t is not None for t in tries) / len(every))
    assert calls(classes, prompts) == pytest.approx(sum(t or prompts for t in tries) / len(every))


@pytest.mark.parametrize(("classes", "rows", "guessers"), [(2, 3, 1), (2, 3, 2), (3, 2, 3)])
def test_the_best_guesser_is_the_best_of_all_sequences(classes: int, rows: int, guessers: int) -> None:
    one = [sum(g == 0 for g in guesses) / rows for guesses in itertools.product(range(classes), repeat=rows)]
    every = [max(each) for each in itertools.product(one, repeat=guessers)]
    assert best_of(classes, rows, guessers) == pytest.approx(sum(every) / len(every))


def test_the_best_of_very_many_guessers_on_many_rows() -> None:
    assert 0.5 < best_of(2, 64, 1000) < 0.75
    assert best_of(4, 2000, 1) == pytest.approx(0.25, abs=1e-6)


def test_the_first_right_prompt_by_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(3, (7, 20), generator=generator)
    classes = torch.randint(3, (20,), generator=generator)
    expected = [next((m for m in range(1, 8) if predicted[m - 1, n] == classes[n]), 8) for n in range(20)]
    assert needed(first_right(predicted, 3), classes).tolist() == expected


def test_permuted_labels_are_the_same_labels_in_seeded_orders() -> None:
    classes = torch.tensor([0, 0, 1, 2, 2])
    found = permuted(classes, 6, seed=3)
    assert found.shape == (6, 5)
    assert all(row.sort().values.tolist() == classes.tolist() for row in found)
    assert torch.equal(found, permuted(classes, 6, seed=3))
    assert not torch.equal(found, permuted(classes, 6, seed=4))


class Guessing:
    """Probabilities that know nothing, always the same for the same prompts."""

    def __call__(self, frozen: Frozen, tasks: Sequence[dp.Task], rows: Sequence[Example]) -> Tensor:
        chance = [random.Random(repr((task.template, i))) for task in tasks for i in range(len(rows))]
        p = torch.tensor([[c.random() for _ in tasks[0].names] for c in chance])
        return (p / p.sum(-1, keepdim=True)).reshape(len(tasks), len(rows), -1)


def test_a_guessing_model_finds_what_the_null_says_on_labels_that_are_permuted(monkeypatch) -> None:
    guess = Guessing()
    monkeypatch.setattr(Frozen, "probabilities", lambda *given: guess(*given))
    rows = [Example({"text": str(i)}, "abc"[i % 3]) for i in range(120)]
    task = dp.Task("{text} It was {mask}.", {"a": "good", "b": "bad", "c": "great"})
    options = search.Lottery(size=20, permutations=200)
    result = search.lottery(zoo.build("bert"), task, rows, rows[:6], options=options)
    table = result.tables[0]
    assert [row[0] for row in table.rows] == [1, 2, 3, 5, 10, 20]
    for m, own, null, interval, anew, spent, null_calls, anew_calls in table.rows:
        assert null == success(3, m)
        assert interval == f"± {within(3, m, 120):.3f}"
        assert abs(own - null) <= within(3, m, 120) + 0.01
        assert abs(anew - null) <= within(3, m, 120)
        assert abs(spent - null_calls) < 0.5
        assert abs(anew_calls - null_calls) < 0.5
    assert result.controls["permuted"] == pytest.approx(result.controls["null"], abs=0.03)
    assert result.controls["best"] == pytest.approx(result.controls["null"], abs=0.06)


def test_one_prompt_of_a_random_model_is_right_for_a_share_1_over_c_of_permuted_labels() -> None:
    table = lottery(options=replace(SMALL, permutations=400)).tables[0]
    assert table.rows[0][4] == pytest.approx(0.5, abs=0.03)


# The pool ---------------------------------------------------------------------------------------------------------


def test_a_pool_has_each_combination_once() -> None:
    pool = Pool(("{text} <a> <b> {mask}", "<a> {mask}: {text}"), {"a": ("x", "y"), "b": ("1", "2", "{3}")})
    assert len(pool) == 8
    drawn = [template for template, _ in pool.drawn(8, seed=0)]
    assert sorted(drawn) == sorted(
        [f"{{text}} {a} {b} {{mask}}" for a in "xy" for b in ("1", "2", "{{3}}")]
        + ["x {mask}: {text}", "y {mask}: {text}"]
    )
    assert pool.drawn(5, seed=0) == pool.drawn(8, seed=0)[:5]
    assert pool.drawn(8, seed=1) != pool.drawn(8, seed=0)
    assert {shape for _, shape in pool.drawn(2, seed=7)} == set(pool.shapes)


def test_the_usual_pool_is_as_large_as_the_papers_and_every_template_of_it_parses() -> None:
    for kind, causal in (("masked", False), ("causal", True)):
        pool = search.Lottery().pool(kind)
        assert len(pool) > 76_725
        templates = [template for template, _ in pool.drawn(300, seed=0)]
        assert len(set(templates)) == 300
        assert all(parse(t).masks == 1 and parse(t).fields == ("text",) for t in templates)
        assert all(t.endswith("{mask}.") for t in templates) == causal
    assert all(len(set(words)) == len(words) for words in LEXICON.values())


@pytest.mark.parametrize(
    ("shapes", "words", "message"),
    [
        ((), {}, "there are no shapes to draw templates from; give one, such as '{text} <noun>: {mask}.'"),
        (("<nown> {mask}",), {"noun": ("a",)}, "has <nown>, and there are no words of that part; did you mean 'noun'?"),
        (("<a> {mask}",), {"a": ()}, "the part of speech 'a' has no words; give some, or leave it out"),
        (("<a> {mask}",) * 2, {"a": ("x",)}, "the shape '<a> {mask}' is there twice; give it once"),
        (("<a> {mask}",), {"a": ("x", "x")}, "the part of speech 'a' has the word 'x' twice; give it once"),
    ],
)
def test_a_pool_that_cannot_be(shapes, words, message) -> None:
    with pytest.raises(ConfigError) as error:
        Pool(shapes, words)
    assert message in str(error.value)


def test_a_pool_with_fewer_templates_than_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"size = 3, and the pool has 2 templates; take fewer, or add words"):
        Pool(("<a> {mask}",), {"a": ("x", "y")}).drawn(3, seed=0)


# A frozen model through many templates ----------------------------------------------------------------------------

OTHERS = {
    "words": dp.Task("{text} It was {mask}.", {"pos": "great", "neg": ("bad", "terrible")}),
    "template": dp.Task("{text} In summary the movie was {mask}.", {"pos": "good", "neg": "bad"}),
    "long words": dp.Task("{text} It was {mask}.", {"pos": "good movie", "neg": ("bad", "the terrible cat")}),
    "calibrated": replace(TASK, calibration=Contextualised()),
    "shown": dp.Task("{demos:2}{text} It was {mask}.\n", {"pos": "good", "neg": "bad"}),
    "shown, other words": dp.Task("{demos:2}{text} It was {mask}.\n", {"pos": "great", "neg": "bad"}),
}


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5", "bart"])
def test_many_templates_at_once_are_each_alone(family: str) -> None:
    backbone = zoo.build(family)
    before = {name: t.clone() for name, t in backbone.model.state_dict().items()}
    tasks = [TASK, *OTHERS.values()]
    found = Frozen(backbone, TRAIN, batch_size=7).probabilities(tasks, ROWS)
    assert found.shape == (7, 16, 2)
    for p, task in zip(found, tasks, strict=True):
        torch.testing.assert_close(p, by_hand(backbone, task, ROWS), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(t, before[name]) for name, t in backbone.model.state_dict().items())


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_soft_tokens_that_begin_from_words_are_each_templates_own(family: str) -> None:
    backbone = zoo.build(family)
    tasks = [dp.Task(f'{{text}} {{soft:"{word}"}} {{mask}}', TASK.labels) for word in ("great", "bad", "great")]
    found = Frozen(backbone, TRAIN, batch_size=7).probabilities(tasks, ROWS)
    assert not torch.allclose(found[0], found[1])
    for p, task in zip(found, tasks, strict=True):
        torch.testing.assert_close(p, by_hand(backbone, task, ROWS), atol=1e-5, rtol=1e-4)


def tokens_run(backbone: Any, run: Callable[[], Any]) -> int:
    """The tokens that a model's layers see."""
    count = 0

    def seen(module: Any, args: Any, output: Any) -> None:
        nonlocal count
        count += (output[0] if isinstance(output, tuple) else output).shape[:2].numel()

    first = next(site for site in backbone.sites.values() if site.kind == "layer")
    handle = backbone.model.get_submodule(first.path).register_forward_hook(seen)
    run()
    handle.remove()
    return count


def test_a_text_is_run_once_for_tasks_that_differ_in_words_or_behind_the_text() -> None:
    words = [
        dp.Task(TASK.template, {"pos": a, "neg": b}) for a, b in itertools.permutations(["good", "bad", "great"], 2)
    ]
    bert = zoo.build("bert")
    one = tokens_run(bert, lambda: Frozen(bert, TRAIN).probabilities(words[:1], ROWS))
    assert tokens_run(bert, lambda: Frozen(bert, TRAIN).probabilities(words, ROWS)) == one
    gpt2 = zoo.build("gpt2")
    text = [
        Example({"text": f"{first} text of a review is good or bad and the movie was great"}, "pos")
        for first in ("the", "a", "it was")
    ]
    behind = [word for text in TEXTS["pos"] for word in text.split()]
    others = [dp.Task(f"{{text}} {word} {{mask}}", TASK.labels) for word in dict.fromkeys(behind)]
    alone = sum(tokens_run(gpt2, lambda t=t: Frozen(gpt2, TRAIN).probabilities([t], text)) for t in others)
    Frozen(gpt2, TRAIN).probabilities(others, text)  # which tries the model out once
    assert tokens_run(gpt2, lambda: Frozen(gpt2, TRAIN).probabilities(others, text)) < alone / 2


# Protocol ---------------------------------------------------------------------------------------------------------


def test_train_ranks_dev_chooses_and_test_is_measured() -> None:
    backbone = zoo.build("bert")
    result = lottery(backbone, test=TEST)
    drawn = [template for template, _ in SMALL.pool("masked").drawn(24, seed=0)]
    tasks = [replace(TASK, template=template) for template in drawn]

    def score(task: dp.Task, rows: Sequence[Example]) -> tuple[float, float]:
        p = by_hand(backbone, task, rows)
        gold = torch.tensor([TASK.names.index(str(row.label)) for row in rows])
        return float((p.argmax(-1) == gold).double().mean()), float(p.double().gather(1, gold[:, None]).log().mean())

    ordered = [candidate.task for candidate in result.shortlist]
    best = sorted((score(task, TRAIN) for task in tasks), reverse=True)[:6]
    found = sorted((score(task, TRAIN) for task in ordered), reverse=True)
    assert [list(s) for s in found] == [pytest.approx(s) for s in best]  # words unknown to the model read alike
    chosen_by = [score(task, DEV) for task in ordered]
    assert [list(s) for s in sorted(chosen_by, reverse=True)] == [pytest.approx(s) for s in chosen_by]
    assert all(task in tasks for task in ordered)
    assert result.task == ordered[0]
    names = [answer.name for answer in result.answers]
    assert names == ["baseline", "chosen", "ensemble"]
    gold = torch.tensor([TASK.names.index(str(row.label)) for row in TEST])
    together = mixed([by_hand(backbone, task, TEST) for task in ordered[:3]])
    for answer, p in zip(
        result.answers, (by_hand(backbone, TASK, TEST), by_hand(backbone, ordered[0], TEST), together), strict=True
    ):
        assert answer.test["accuracy"] == float((p.argmax(-1) == gold).double().mean())
    assert result.answers[2].tasks == tuple(ordered[:3])


@pytest.mark.parametrize("task", [TASK, OTHERS["calibrated"], OTHERS["shown"]], ids=["plain", "calibrated", "shown"])
def test_the_chosen_prompt_becomes_a_model(task: dp.Task, tmp_path: Path) -> None:
    backbone = zoo.build("gpt2")
    options = replace(
        SMALL,
        size=2,
        shapes=("{demos:2}{text} <noun> {mask}.\n" if task is OTHERS["shown"] else "{text} <noun> {mask}",),
    )
    result = search.lottery(backbone, task, TRAIN, DEV, options=options)
    model = result.model()
    gold = torch.tensor([TASK.names.index(str(row.label)) for row in DEV])
    assert float((model.probabilities(DEV).argmax(-1) == gold).double().mean()) == result.answers[1].dev.accuracy
    model.save(tmp_path / "chosen")
    model.adapted.remove()
    assert search.lottery(backbone, task, TRAIN, DEV, options=options).task == result.task


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    p, q = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.3, 0.7], [0.4, 0.6]])
    torch.testing.assert_close(mixed([p, q]), torch.tensor([[0.6, 0.4], [0.3, 0.7]]))


@pytest.mark.parametrize("kind", ["lottery", "label_words", "templates"])
def test_no_test_row_is_read_before_everything_is_chosen(kind: str, monkeypatch) -> None:
    asked: list[bool] = []
    whole, test = Frozen.probabilities, Unlooked()

    def watched(frozen: Frozen, tasks: Sequence[dp.Task], rows: Sequence[Example]) -> Tensor:
        asked.append(any(row in TEST for row in rows))
        assert test.reads == int(asked[-1])
        return whole(frozen, tasks, rows)

    monkeypatch.setattr(Frozen, "probabilities", watched)
    options = {
        "lottery": (lottery, {}),
        "label_words": (search.label_words, {"options": search.WordSearch(words=4, shortlist=3)}),
        "templates": (search.templates, {"options": search.TemplateSearch(beam=3, longest=1)}),
    }
    run, how = options[kind]
    backbones = [zoo.build("bert"), *([zoo.build("t5")] if kind == "templates" else [])]
    result = run(*backbones, **how, test=test) if kind == "lottery" else run(*backbones, TASK, TRAIN, DEV, test, **how)
    assert test.reads == 1
    assert asked == sorted(asked)
    assert (asked[0], asked[-1]) == (False, True)
    assert result.looked_at["test"]["also in train or dev"] == 0
    assert result.measured([*TEST, TRAIN[0]]).looked_at["test"]["also in train or dev"] == 1


def test_the_same_seed_is_the_same_search() -> None:
    backbone = zoo.build("bert")
    one, same, other = (lottery(backbone, test=TEST, seed=seed) for seed in (0, 0, 1))
    assert told(one) == told(same)
    assert {c.task.template for c in one.shortlist} != {c.task.template for c in other.shortlist}


# Going on ---------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_search_that_was_broken_off_ends_as_one_that_was_not(tmp_path: Path, monkeypatch) -> None:
    backbone, whole, made = zoo.build("bert"), Frozen.probabilities, []

    def some(frozen: Frozen, tasks: Sequence[dp.Task], rows: Sequence[Example]) -> Tensor:
        if len(made) == 4:
            raise Killed
        made.append(tasks)
        return whole(frozen, tasks, rows)

    expected = lottery(backbone, test=TEST)
    monkeypatch.setattr(Frozen, "probabilities", some)
    with pytest.raises(Killed):
        lottery(backbone, test=TEST, out=tmp_path)
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"name": "train 16-19", "value": [[0.')  # what a kill leaves of a line
    made.clear()
    made.extend([()] * -20)
    monkeypatch.setattr(Frozen, "probabilities", whole)
    calls_before = len((tmp_path / "journal.jsonl").read_bytes().split(b"\n"))
    result = lottery(backbone, test=TEST, out=tmp_path, resume=True)
    assert told(result) == told(expected)
    assert len((tmp_path / "journal.jsonl").read_bytes().split(b"\n")) > calls_before

    def never(*given: Any) -> Tensor:
        raise AssertionError("what is known is computed again")

    monkeypatch.setattr(Frozen, "probabilities", never)
    assert told(lottery(backbone, test=TEST, out=tmp_path, resume=True)) == told(expected)


KILL = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import deltaprompt as dp
from tests.unit.test_search import MANY, lottery
lottery(dp.load({model!r}, device="cpu"), out={out!r}, options=MANY)
"""


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on(tmp_path: Path) -> None:
    model, out = saved("bert", tmp_path / "tiny"), tmp_path / "killed"
    code = KILL.format(root=str(ROOT), model=str(model), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    journal, began = out / "journal.jsonl", time.monotonic()
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        assert process.poll() is None
        assert time.monotonic() - began < 240
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.read_bytes().count(b"\n") < 100
    backbone = dp.load(model, device="cpu")
    assert told(lottery(backbone, options=MANY, out=out, resume=True)) == told(lottery(backbone, options=MANY))


def test_a_journal_keeps_what_it_is_told_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"a": 1})
    assert journal.once("x", lambda: [0.1, 1 / 3]) == [0.1, 1 / 3]
    again = Journal(tmp_path, {"a": 1}, resume=True)
    assert "x" in again
    assert again.once("x", lambda: 2) == [0.1, 1 / 3]
    assert "x" not in Journal(tmp_path, {"a": 1})


def test_a_journal_of_another_search_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    lottery(out=tmp_path)
    with pytest.raises(ConfigError, match=r"seed was 0 and is now 1. Set it back, or start anew"):
        lottery(out=tmp_path, resume=True, seed=1)
    with pytest.raises(ConfigError, match=r"train was '6 rows \(.*\)' and is now '5 rows"):
        search.lottery(zoo.build("bert"), TASK, TRAIN[:5], DEV, options=SMALL, out=tmp_path, resume=True)
    file = tmp_path / "journal.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b"predicted", b"predicteb", 1)
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(
        StoreError, match=r"journal.jsonl, line 3: it is damaged; start the search anew, without resume"
    ):
        lottery(out=tmp_path, resume=True)


# Label words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "words"), [(2, 5), (3, 4)])
def test_the_best_assignments_are_those_of_brute_force(classes: int, words: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    scores = torch.randn(12, classes, words, generator=generator)
    gold = torch.randint(classes, (12,), generator=generator)
    ids = torch.stack([torch.randperm(words + 2, generator=generator)[:words] for _ in range(classes)])

    def fit(assignment: Sequence[int]) -> tuple[float, float]:
        own = torch.stack([scores[:, c, j] for c, j in enumerate(assignment)], 1)
        likely = sum(float(row.log_softmax(-1)[g]) for row, g in zip(own, gold, strict=True))
        return float((own.argmax(-1) == gold).sum()), likely

    every = itertools.product(range(words), repeat=classes)
    allowed = [a for a in every if len({int(ids[c, j]) for c, j in enumerate(a)}) == classes]
    expected = sorted(allowed, key=fit, reverse=True)
    found, tried = assignments(scores, gold, ids, keep=7)
    assert tried == len(allowed) < words**classes
    assert [tuple(a) for a in found.tolist()] == expected[:7]
    wide, _ = assignments(scores, gold, ids, keep=7, beam=10_000)
    assert torch.equal(wide, found)
    narrow, fewer = assignments(scores, gold, ids, keep=7, beam=2)
    assert fewer <= 2 * words
    assert fit(narrow[0].tolist()) <= fit(found[0].tolist())


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
def test_label_words_are_the_likeliest_whole_words_of_each_class(family: str) -> None:
    backbone = zoo.build(family)
    result = search.label_words(backbone, TASK, TRAIN, DEV, options=search.WordSearch(words=5, shortlist=8))
    vocabulary = backbone.tokenizer.get_vocab()
    likeliest = {str(name): str(told).split(", ") for name, told in result.tables[0].rows}
    model = dp.adapt(backbone, TASK)
    usable = model.features.whole_words()
    sums = dict.fromkeys(TASK.names, torch.zeros(len(vocabulary), dtype=torch.float64))
    for row in TRAIN:  # the whole model, row by row
        at = model.at_mask(model.features.collate(model.encode([row])))
        with torch.no_grad():
            scores = backbone.head.logits(at.hidden[0, 0, 0])
        sums[str(row.label)] = sums[str(row.label)] + scores.double().log_softmax(-1)[: len(vocabulary)]
    model.adapted.remove()
    for name, told_ in likeliest.items():
        order = sorted(usable, key=lambda i, n=name: -float(sums[n][i]))
        assert told_ == [backbone.tokenizer.decode([i]).strip() for i in order[:5]]
    for candidate in result.shortlist:
        words = [own for (own,) in candidate.task.labels.values()]
        assert len(set(words)) == 2
        assert all(word.isalpha() for word in words)
        assert candidate.task.template == TASK.template


def test_the_ranking_of_assignments_is_the_models_own_accuracy() -> None:
    backbone = zoo.build("bert")
    result = search.label_words(backbone, TASK, TRAIN, DEV, options=search.WordSearch(words=6, shortlist=40))
    gold = torch.tensor([TASK.names.index(str(row.label)) for row in TRAIN])
    for candidate in result.shortlist[:5]:
        right = (by_hand(backbone, candidate.task, TRAIN).argmax(-1) == gold).double().mean()
        assert candidate.train.accuracy == float(right)
    assert max(c.train.accuracy for c in result.shortlist) == result.controls["best"]
    assert result.controls["candidates"] <= 36


def test_assignments_that_were_found_stay_what_blocks_of_the_journal_are_of(tmp_path: Path, monkeypatch) -> None:
    how = {"options": search.WordSearch(words=5, shortlist=8, together=4), "out": tmp_path}
    expected = search.label_words(zoo.build("bert"), TASK, TRAIN, DEV, **how)

    def otherwise(*given: Any) -> Any:
        raise AssertionError("assignments are found again")

    monkeypatch.setattr(_Rows, "best", otherwise)
    assert told(search.label_words(zoo.build("bert"), TASK, TRAIN, DEV, **how, resume=True)) == told(expected)


# Templates --------------------------------------------------------------------------------------------------------

LONGEST = 2


def tabled(seed: int, size: int = 6) -> Callable[[Tensor], Tensor]:
    """A model of fills: log p of what comes next depends on all that is written."""

    def step(written: Tensor) -> Tensor:
        made = []
        for row in written.tolist():
            generator = torch.Generator().manual_seed(hash((seed, *row)) % 2**31)
            made.append(torch.randn(size, generator=generator, dtype=torch.float64).log_softmax(-1) * 3)
        return torch.stack(made)

    return step


def every_fill(step: Callable[[Tensor], Tensor], allowed: Sequence[int], closers: tuple[int, int]) -> list[Fill]:
    """All fills of at most LONGEST tokens a gap, by explicit loops."""
    found = []
    for first in range(LONGEST + 1):
        for second in range(LONGEST + 1):
            for tokens in itertools.product(allowed, repeat=first + second):
                whole = [*tokens[:first], closers[0], *tokens[first:], closers[1]]
                score = sum(
                    float(step(torch.tensor([whole[:i]], dtype=torch.long))[0, whole[i]]) for i in range(len(whole))
                )
                found.append(Fill((tokens[:first], tokens[first:]), score))
    return sorted(found, key=lambda fill: -fill.score)


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_fills(seed: int) -> None:
    allowed = [0, 1, 2]
    vocabulary = Vocabulary(torch.tensor([i in allowed for i in range(6)]), (3, 4))
    expected = every_fill(tabled(seed), allowed, (3, 4))
    found = set_beam(tabled(seed), vocabulary, beam=1000, longest=LONGEST)
    assert [fill.gaps for fill in found] == [fill.gaps for fill in expected]
    assert [fill.score for fill in found] == pytest.approx([fill.score for fill in expected])
    narrow = set_beam(tabled(seed), vocabulary, beam=3, longest=LONGEST)
    assert len(narrow) == 3
    scores = {fill.gaps: fill.score for fill in expected}
    assert all(fill.score == pytest.approx(scores[fill.gaps]) for fill in narrow)


def test_a_beam_of_one_takes_the_likeliest_step_each_time() -> None:
    vocabulary, step = Vocabulary(torch.tensor([True] * 3 + [False] * 3), (3, 4)), tabled(5)
    written, gap, inside, fills = [], 0, 0, []
    while gap < 2:
        scores = step(torch.tensor([written], dtype=torch.long))[0]
        closer = (3, 4)[gap]
        if gap == 1:
            fills.append(list(written))  # it may end here too
        options = ([0, 1, 2] if inside < LONGEST else []) + ([closer] if gap == 0 else [])
        if not options:
            break
        best = max(options, key=lambda i, s=scores: float(s[i]))
        written, inside = [*written, best], inside + 1
        if best == closer:
            gap, inside = gap + 1, 0
    (found,) = set_beam(step, vocabulary, beam=1, longest=LONGEST)
    assert [*found.gaps[0], 3, *found.gaps[1]] in fills


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_a_step_is_the_sum_over_rows_of_the_whole_models_log_p(family: str, monkeypatch) -> None:
    backbone = zoo.build(family)
    known, tokenizer = backbone.tokenizer.get_vocab(), backbone.tokenizer
    shape = Shape.of("{text} <X> <word> <Y>")
    ids = shape.token_ids(backbone, TRAIN, {"pos": "good", "neg": "bad"}, 40)
    rows = Rows.of(backbone, ids)
    monkeypatch.setattr("deltaprompt.search._beam.SEQUENCES", 5)  # in several passes
    (s0, s1, s2), end = (known[f"<extra_id_{i}>"] for i in range(3)), tokenizer.eos_token_id
    written = torch.tensor([[7, s1], [9, s1], [s1, 8]])
    expected = torch.zeros(3, backbone.head.size, dtype=torch.float64)
    for h, begun in enumerate(written.tolist()):
        for own in ids:
            decoder = torch.tensor([[backbone.config["decoder_start_token_id"], s0, *begun]])
            with torch.no_grad():
                scores = backbone.model(input_ids=torch.tensor([own]), decoder_input_ids=decoder).logits[0, -1]
            log_p = scores.double().log_softmax(-1)
            log_p[s2] = torch.logsumexp(log_p[[s2, end]], 0)
            expected[h] += log_p
    torch.testing.assert_close(rows.step(written), expected, atol=1e-4, rtol=1e-5)


def test_rows_stand_with_their_words_between_the_sentinels() -> None:
    backbone = zoo.build("t5")
    tokenizer = backbone.tokenizer
    s0, s1 = (tokenizer.get_vocab()[f"<extra_id_{i}>"] for i in range(2))
    end = tokenizer.eos_token_id

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    words = {"pos": "great", "neg": "terrible"}
    behind, front = Shape.of("{text} <X> <word> <Y>"), Shape.of("<X> <word> <Y> {text|lower}")
    row = Example({"text": "The cat sat"}, "neg")
    assert behind.token_ids(backbone, [row], words, 40) == [[*plain("The cat sat"), s0, *plain("terrible"), s1, end]]
    assert front.token_ids(backbone, [row], words, 40) == [[s0, *plain("terrible"), s1, *plain("the cat sat"), end]]
    long = Example({"text": "good " * 50}, "pos")
    (cut,) = behind.token_ids(backbone, [long], words, 20)
    assert len(cut) == 20
    assert cut[-len(plain("great")) - 3 :] == [s0, *plain("great"), s1, end]
    with pytest.raises(ConfigError, match=r"max_length leaves 0 tokens for the texts of '\{text\} <X> <word> <Y>'"):
        behind.token_ids(backbone, [long], words, 3)


def test_fills_become_templates() -> None:
    backbone = zoo.build("t5")
    tokenizer = backbone.tokenizer

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    gaps = (plain("It was"), plain("."))
    assert written_out(backbone, plain("It was")) == " It was"
    behind, front = Shape.of("{text} <X> <word> <Y>"), Shape.of("<X> <word> <Y> {text}")
    assert behind.template(backbone, gaps) == "{text} It was {mask} ."
    assert front.template(backbone, gaps) == "It was {mask} . {text}"
    assert front.template(backbone, ((), ())) == "{mask} {text}"
    two = Shape.of("{a} <X> <word> <Y> {b}")
    assert two.template(backbone, ((), plain(","))) == "{a} {mask} , {b}"
    assert usual_shapes(parse("{text|lower} It was {mask}"), "masked") == (
        "{text|lower} <X> <word> <Y>",
        "<X> <word> <Y> {text|lower}",
    )
    assert usual_shapes(parse("{text} {mask}"), "causal") == ("{text} <X> <word> <Y>",)
    assert usual_shapes(parse("{a}? {mask}, {b}"), "masked") == ("{a} <X> <word> <Y> {b}",)


def test_templates_are_written_by_one_model_and_chosen_for_another() -> None:
    backbone, writer = zoo.build("bert"), zoo.build("t5")
    before = {name: t.clone() for name, t in writer.model.state_dict().items()}
    options = search.TemplateSearch(beam=6, longest=2, shortlist=4, ensemble=2)
    result = search.templates(backbone, writer, TASK, TRAIN, DEV, TEST, options=options)
    assert 1 <= len(result.shortlist) <= 4
    assert all(c.task.labels == TASK.labels and parse(c.task.template).masks == 1 for c in result.shortlist)
    assert result.tables[0].title == "What was written"
    assert [row[1] for row in result.tables[0].rows] == [6, 6]
    assert {a.name for a in result.answers} == {"baseline", "chosen", "ensemble"}
    assert all(torch.equal(t, before[name]) for name, t in writer.model.state_dict().items())


def test_templates_that_a_left_to_right_model_cannot_answer_are_left_out_with_the_reason(monkeypatch) -> None:
    backbone, writer = zoo.build("gpt2"), zoo.build("t5")

    def plain(text: str) -> tuple[int, ...]:
        return tuple(writer.tokenizer(text, add_special_tokens=False)["input_ids"])

    fills = [Fill((plain("It was"), plain(end)), -float(n)) for n, end in enumerate(("good", ".", "."))]
    monkeypatch.setattr(
        sys.modules["deltaprompt.search.templates"], "set_beam", lambda *given: fills
    )  # not the function
    result = search.templates(backbone, writer, TASK, TRAIN, DEV, options=search.TemplateSearch())
    assert [c.task.template for c in result.shortlist] == ["{text} It was {mask} ."]
    table, left = result.tables
    assert table.rows[0][:3] == ("`{text} <X> <word> <Y>`", 3, 1)
    assert left.title == "Left out, 1 in all"
    assert left.rows[0][0] == "`{text} It was {mask} good`"
    assert "a left-to-right model does not see what stands after {mask}" in str(left.rows[0][1])
    options = search.TemplateSearch(shapes=("<X> <word> <Y> {text}",))
    with pytest.raises(ConfigError, match="no template that was written suits this backbone: a left-to-right model"):
        search.templates(backbone, writer, TASK, TRAIN, DEV, options=options)


# Tuning -----------------------------------------------------------------------------------------------------------


def test_tuned_candidates_are_chosen_by_what_tuning_makes_of_them() -> None:
    seen: list[tuple[int, Any]] = []

    def run(tasks: Sequence[dp.Task], train: Any, dev: Any, asked: Any) -> Tensor:
        seen.append((len(tasks), asked))
        gold = torch.tensor([TASK.names.index(str(row.label)) for row in asked])
        right = torch.nn.functional.one_hot(gold, 2).float() * 0.8 + 0.1
        return torch.stack([right if task.labels == wanted else 1 - right for task in tasks])

    backbone, options = zoo.build("bert"), search.WordSearch(words=4, shortlist=5)
    wanted = search.label_words(backbone, TASK, TRAIN, DEV, options=options).shortlist[-1].task.labels
    tuning = search.Tuning(run, {"by": "hand"})
    result = search.label_words(backbone, TASK, TRAIN, DEV, TEST, options=options, tuning=tuning)
    assert result.task.labels == wanted
    assert result.shortlist[0].tuned.accuracy == 1.0
    baseline, chosen = result.answers[:2]
    assert (baseline.tuned_test["accuracy"], chosen.tuned_test["accuracy"]) == (0.0, 1.0)
    assert [count for count, _ in seen] == [6, 2]
    assert seen[0][1] == DEV
    assert seen[1][1] == TEST


# What is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda: lottery(zoo.build("bert-encoder")),
            ConfigError,
            "a search needs a language model, which answers at {mask}",
        ),
        (lambda: lottery(resume=True), ConfigError, "to resume needs the folder of the search that was broken off"),
        (
            lambda: search.lottery(zoo.build("bert"), replace(TASK, verbalizer=SoftVerbalizer()), TRAIN, DEV),
            ConfigError,
            "a search asks a frozen model, and a soft verbalizer that begins from no words has to be trained before it",
        ),
        (
            lambda: search.lottery(zoo.build("bert"), TASK, [], DEV),
            DataError,
            "there are no train rows; a search ranks",
        ),
        (
            lambda: search.lottery(zoo.build("bert"), TASK, TRAIN, []),
            DataError,
            "there are no dev rows; a search ranks",
        ),
        (
            lambda: search.lottery(zoo.build("bert"), TASK, TRAIN[:1], DEV),
            DataError,
            "no train row has the label 'neg'; give one or more of every label",
        ),
        (
            lambda: search.lottery(zoo.build("bert"), TASK, [*TRAIN, Example({"text": "a"}, "posi")], DEV),
            DataError,
            "train row 7: there is no label 'posi'; did you mean 'pos'?",
        ),
        (
            lambda: search.lottery(zoo.build("bert"), TASK, TRAIN, [Example({"text": "a"})]),
            DataError,
            "dev row 1 has no label; a search needs one on each",
        ),
        (lambda: lottery(test=[]), DataError, "there are no test rows to measure on"),
        (
            lambda: lottery(test=[Example({"text": "a"}, "x")]),
            DataError,
            "test row 1 has the label 'x', and the task has pos, neg",
        ),
        (lambda: search.Lottery(size=0), ConfigError, "size = 0 is not possible: it is a whole number, 1 or more"),
        (lambda: search.Lottery(shortlist=True), ConfigError, "shortlist = True is not possible"),
        (lambda: search.WordSearch(beam=0), ConfigError, "beam = 0 is not possible"),
        (
            lambda: search.TemplateSearch(max_length=7),
            ConfigError,
            "max_length = 7 is not possible: it is a whole number, 8",
        ),
        (
            lambda: search.label_words(zoo.build("bert"), TASK, TRAIN, DEV, options=search.WordSearch(words=2000)),
            ConfigError,
            "2000 words for each of 2 classes are 4,000,000 assignments, and 2,000,000 at most are tried; take "
            "words = 1414, or beam = 1000",
        ),
        (
            lambda: search.label_words(zoo.build("bert"), TASK, TRAIN, DEV, options=search.WordSearch(words=1000)),
            ConfigError,
            "whole words; take fewer",
        ),
        (
            lambda: search.templates(zoo.build("bert"), zoo.build("bart"), TASK, TRAIN, DEV),
            BackboneError,
            "written by an encoder-decoder with the sentinels <extra_id_0>, <extra_id_1>, <extra_id_2>, such as T5, "
            "and this one has no <extra_id_0>; take another",
        ),
        (lambda: Shape.of("{text} <X> <Y>"), ConfigError, "has <X>, <word> and <Y> once each and in this order"),
        (lambda: Shape.of("{text} <Y> <word> <X>"), ConfigError, "has <X>, <word> and <Y> once each and in this order"),
        (lambda: Shape.of("{text} {mask} <X> <word> <Y>"), ConfigError, "has {mask}; besides its marks it has fields"),
        (lambda: Shape.of("so <X> <word> <Y>"), ConfigError, "has no field, so all rows would read alike"),
        (
            lambda: usual_shapes(parse("{a} {b} {c} {mask}"), "masked"),
            ConfigError,
            "the template has 3 fields, and there are usual shapes for one or two; give shapes",
        ),
    ],
)
def test_what_is_wrong_is_said(run: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        run()
    assert message in str(raised.value)


def test_words_that_all_classes_share() -> None:
    with pytest.raises(ConfigError, match="words = 1: the classes have the same likeliest words; take more"):
        assignments(torch.zeros(2, 2, 1), torch.tensor([0, 1]), torch.tensor([[5], [5]]), keep=1)


# Tables -----------------------------------------------------------------------------------------------------------


def test_tables_are_averaged_where_they_differ_in_numbers_alone() -> None:
    one, two = (Table("t", ("m", "share", "how"), ((1, share, "±"), (2, 0.5, "±"))) for share in (0.2, 0.4))
    found = averaged([one, two])
    assert found is not None
    assert found.rows == ((1, pytest.approx(0.3), "±"), (2, 0.5, "±"))
    assert averaged([one, replace(two, rows=((1, 0.1, "other"), (2, 0.5, "±")))]) is None
    assert averaged([one, replace(two, rows=((1, 0.1, "±"), (3, 0.5, "±")))]) is None
    assert one.markdown() == "**t**\n\n| m | share | how |\n| --- | --- | --- |\n| 1 | 0.200 | ± |\n| 2 | 0.500 | ± |"


# The command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lottery", "lmbff-words", "lmbff-templates"])
def test_the_recipes_are_sound(name: str) -> None:
    tables = read_toml(ROOT / "recipes" / f"{name}.toml")
    own = {key: tables.pop(key) for key in OWN if key in tables}
    recipe = build(tables)
    kind, _ = _search_of(own, recipe, "training" in tables)
    assert kind == {"lmbff-words": "label_words", "lmbff-templates": "templates"}.get(name, name)
    assert recipe.shots == 16
    assert recipe.backbone.kind == "masked"


def saved(family: str, folder: Path) -> Path:
    backbone = zoo.build(family)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


RECIPE = """
seeds = "0-1"
shots = 3
[backbone]
name = "{model}"
device = "cpu"
[data]
train = "train.jsonl"
test = "test.jsonl"
[task]
template = "{{text}} It was {{mask}}."
labels = {{ pos = "good", neg = "bad" }}
{search}
"""
LOTTERY = '[search]\nkind = "lottery"\nsize = 12\nshortlist = 4\nensemble = 2\npermutations = 3'
WORDS = '[search]\nkind = "label_words"\nwords = 4\nshortlist = 2\n'
TUNED = WORDS + '[[deltas]]\nkind = "lora"\nrank = 2\nat = ["attn.q"]\n[training]\nsteps = 2\n'
WRITTEN = '[generator]\nname = "{writer}"\n[search]\nkind = "templates"\nbeam = 3\nlongest = 1\nshortlist = 2'


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A folder with data and a tiny model in it, where the command runs."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train", ROWS[:12]), ("test", ROWS[12:])):
        lines = [json.dumps({**row.fields, "label": row.label}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    saved("bert", tmp_path / "tiny")
    return tmp_path


def command(place: Path, table: str, *arguments: str) -> Any:
    (place / "recipe.toml").write_text(RECIPE.format(model=place / "tiny", search=table))
    return run("search", "recipe.toml", *arguments)


@pytest.mark.parametrize("table", [LOTTERY, WORDS, TUNED, WRITTEN], ids=["lottery", "words", "tuned", "templates"])
def test_a_recipe_is_run_from_one_line(place: Path, table: str) -> None:
    if table == WRITTEN:
        table = table.format(writer=saved("t5", place / "writer"))
    done = command(place, table, "--out", "out", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seeds"] == [0, 1]
    assert found["answers"][0]["name"] == "baseline"
    assert all(
        0 <= a["test"]["accuracy"]["mean"] <= 1 and len(a["test"]["accuracy"]["each"]) == 2 for a in found["answers"]
    )
    assert ("tuned_test" in found["answers"][1]) == (table == TUNED)
    assert [run["looked_at"]["test"]["rows"].split()[0] for run in found["runs"]] == ["4", "4"]
    for file in ("result.json", "result.md", "seed-0/result.json", "seed-1/result.md", "seed-0/journal.jsonl"):
        assert (place / "out" / file).stat().st_size
    if table in (LOTTERY, WORDS):
        chosen = found["runs"][1]["answers"][1]["test"]["accuracy"]
        assert dp.open(place / "out" / "seed-1" / "chosen").evaluate(ROWS[12:])["accuracy"] == chosen
    more = ["--generator", str(place / "writer")] if "templates" in table else []
    again = command(place, table, "--out", "out", "--resume", *more)
    assert again.exit_code == 0, again.output
    assert again.stdout.strip() == (place / "out" / "result.md").read_text().strip()
    assert "| baseline |" in again.stdout
    now = json.loads((place / "out" / "result.json").read_text())
    assert [{**run, "seconds": 0} for run in now["runs"]] == [{**run, "seconds": 0} for run in found["runs"]]


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ("", (), "the recipe has no table [search]; give one, with kind = one of label_words, lottery, templates"),
        ("[search]\nsize = 3", (), "a search needs the key 'kind'; possible: label_words, lottery, templates"),
        ('[search]\nkind = "loterry"', (), "no search 'loterry'; did you mean 'lottery'?"),
        ('[search]\nkind = "lottery"\nsice = 3', (), "search 'lottery' has no option 'sice'; did you mean 'size'?"),
        (
            LOTTERY + "\n[training]\nsteps = 2",
            (),
            "[training] says how candidates are tuned, and no [[deltas]] say what",
        ),
        (
            LOTTERY + '\n[[deltas]]\nkind = "lora"',
            (),
            "lottery prompts are tried on a frozen model; leave [[deltas]] out",
        ),
        (
            LOTTERY + '\n[generator]\nname = "x"',
            (),
            "[generator] writes templates, and this search is lottery; leave it",
        ),
        (
            '[search]\nkind = "templates"',
            (),
            "name it with --generator, or in the recipe's [generator]; such as t5-small, or a folder",
        ),
        (LOTTERY, ("--generator", "x"), "[generator] writes templates, and this search is lottery; leave it out"),
        (LOTTERY, ("--resume",), "--resume needs --out, the folder of the search that was broken off"),
        (LOTTERY, ("--test", "tset.jsonl"), "there is no file of test rows 'tset.jsonl'; mend test in [data]"),
        (LOTTERY + "\n[grid]\nlearning_rate = [1e-3]", (), "leave [grid], [generation], [chat] and [pairs] out"),
        (LOTTERY, ("--shots", "6"), "shots=6 needs 7 of each class, one of them for dev"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_line(
    place: Path, table: str, arguments: Sequence[str], message: str
) -> None:
    done = command(place, table, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_a_share_of_the_file_is_kept_from_the_search_and_measured_on(place: Path) -> None:
    text = RECIPE.replace('test = "test.jsonl"', "test_share = 0.3").replace("shots = 3", "shots = 2")
    (place / "recipe.toml").write_text(text.format(model=place / "tiny", search=LOTTERY))
    done = run("search", "recipe.toml", "--json")
    assert done.exit_code == 0, done.output
    found = last_json(done)
    assert [each["looked_at"]["test"]["rows"].split()[0] for each in found["runs"]] == ["4", "4"]


def test_data_that_a_search_has_no_use_for_is_said(place: Path) -> None:
    text = RECIPE.replace('test = "test.jsonl"', 'unlabelled = "test.jsonl"')
    (place / "recipe.toml").write_text(text.format(model=place / "tiny", search=LOTTERY))
    assert "unlabelled in [data] is not for a search; leave it out" in fails("search", "recipe.toml")


def test_draws_are_averaged_over_those_that_have_an_answer() -> None:
    several = search.lottery(zoo.build("bert"), TASK, TRAIN, DEV, options=SMALL)
    alone = replace(several, answers=several.answers[:2])
    draws = search.Draws((alone, several))
    assert [answer["name"] for answer in draws.as_json()["answers"]] == ["baseline", "chosen", "ensemble"]
    assert len(draws.as_json()["answers"][2]["dev"]["accuracy"]["each"]) == 1
    assert "| ensemble |" in draws.markdown()


def test_literal_braces_reach_the_generator_as_they_are() -> None:
    assert written(parse("a }} {{b").pieces[0], Example({})) == "a } {b"


def test_the_test_file_is_read_after_the_last_seed_has_chosen(place: Path, monkeypatch) -> None:
    from deltaprompt.cli import data

    order: list[str] = []
    whole, probabilities = data.rows, Frozen.probabilities

    def read(source: str, *rest: Any) -> list[Example]:
        order.append(Path(source).stem)
        return whole(source, *rest)

    def asked(frozen: Frozen, tasks: Any, rows: Any) -> Tensor:
        order.append("asked")
        return probabilities(frozen, tasks, rows)

    monkeypatch.setattr(data, "rows", read)
    monkeypatch.setattr(Frozen, "probabilities", asked)
    assert command(place, LOTTERY).exit_code == 0
    assert order.count("test") == 1
    at = order.index("test")
    assert order[:at].count("asked") == 2 * 3  # the pool, the baseline and the shortlist of both seeds
    assert order[at:].count("asked") == 2 * 3  # the baseline, the chosen and one more of the ensemble
