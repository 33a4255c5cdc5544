"""The training loop on a tiny model: what it learns, keeps, refuses and says."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from deltaprompt import store
from deltaprompt.backbone import Backbone
from deltaprompt.deltas._base import Delta
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError, TrainingError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.trainer import Run, SeedsResult, Training, fit, fit_seeds
from deltaprompt.trainer.order import Order
from deltaprompt.trainer.seeds import told
from deltaprompt.types import Batch, Example
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo

TEMPLATE = "{text} It was {mask}."
WORDS = {"good": ("great",), "bad": ("terrible",)}
TEXTS = {
    "good": ["a great movie", "a good film", "great plot", "a great film", "good acting", "a good great plot"],
    "bad": ["terrible acting", "a bad film", "terrible movie", "bad plot", "a terrible bad movie", "bad bad film"],
}
TRAIN = [
    Example({"text": text}, label)
    for pair in zip(*TEXTS.values(), strict=True)
    for text, label in zip(pair, TEXTS, strict=True)
]
FAST = Training(steps=10, batch_size=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbones_zoo.build("bert")


@pytest.fixture
def model(backbone: Backbone) -> Any:
    made = make(backbone)
    yield made
    made.adapted.remove()


def make(backbone: Backbone, *deltas: Delta, seeds: Sequence[int] = (0,), **task: Any) -> Model:
    verbalizer = task.get("verbalizer", LabelWords(WORDS))
    return Model(backbone, Task(TEMPLATE, WORDS, verbalizer), deltas or [LoRA(rank=2, dropout=0.2)], seeds)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.parts()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(
    backbone: Backbone, training: Training = FAST, seed: int = 0, **fit_options: Any
) -> tuple[Run, dict[str, Tensor]]:
    """A run of a new model, and the tensors that it came to."""
    model = make(backbone, *fit_options.pop("deltas", ()))
    try:
        run = fit(model, fit_options.pop("train", TRAIN), training=training, seed=seed, **fit_options)
        return run, weights(model)
    finally:
        model.adapted.remove()


# Learning


def test_learns_what_can_be_told_apart(model: Model) -> None:
    run = fit(model, TRAIN, TRAIN, training=Training(steps=160, learning_rate=2e-2, batch_size=8))
    assert model.evaluate(TRAIN)["accuracy"] == 1.0
    assert run.best["accuracy"] == 1.0
    assert run.history[-1]["loss"] < 0.5 * run.history[0]["loss"]
    assert not model.training


@pytest.mark.parametrize("verbalizer", [Prototypes(), SoftVerbalizer()], ids=["prototypes", "soft"])
def test_trains_the_verbalizer_too_at_its_own_rate_without_decay(backbone: Backbone, verbalizer: Any) -> None:
    model = make(backbone, verbalizer=verbalizer)
    still = Training(steps=3, verbalizer_learning_rate=1e-30, weight_decay=0.9)
    model.start(TRAIN)
    before = weights(model)
    fit(model, TRAIN, training=still)
    moved = {name for name, tensor in model.parts() if not torch.allclose(tensor, before[name], atol=1e-12, rtol=0)}
    fit(model, TRAIN, training=replace(still, verbalizer_learning_rate=0.1))
    later = {name for name, tensor in model.parts() if not torch.allclose(tensor, before[name], atol=1e-2, rtol=0)}
    model.adapted.remove()
    assert moved
    assert all(name.startswith("delta.") for name in moved)
    assert any(name.startswith("verbalizer.") for name in later)


def test_the_backbone_is_as_it_was(backbone: Backbone) -> None:
    before = backbone.fingerprint
    trained(backbone)
    assert backbones_zoo.build("bert").fingerprint == before
    del vars(backbone)["fingerprint"]
    assert backbone.fingerprint == before


def test_the_frozen_backbones_dropout_is_off_unless_asked_for(backbone: Backbone, model: Model) -> None:
    seen = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.add((module.training, model.adapted.patches[0].training))

    handle = backbone.model.register_forward_hook(note)
    base = backbone.base.register_forward_hook(note)
    fit(model, TRAIN, training=Training(steps=1))
    assert seen == {(False, True)}
    seen.clear()
    fit(model, TRAIN, training=Training(steps=1, backbone_dropout=True))
    assert seen == {(True, True)}
    handle.remove()
    base.remove()


def test_two_batches_of_4_are_one_of_8(backbone: Backbone) -> None:
    plain = [LoRA(rank=2)]
    whole = trained(backbone, Training(steps=5, batch_size=8, learning_rate=1e-2), deltas=plain)
    parts = trained(backbone, Training(steps=5, batch_size=4, accumulate=2, learning_rate=1e-2), deltas=plain)
    odd = trained(backbone, Training(steps=5, batch_size=3, accumulate=3, learning_rate=1e-2), deltas=plain)
    nine = trained(backbone, Training(steps=5, batch_size=9, learning_rate=1e-2), deltas=plain)
    for one, other in ((whole, parts), (nine, odd)):  # 12 rows: the last step of an epoch has 4, or 3
        assert [h["loss"] for h in one[0].history] == pytest.approx([h["loss"] for h in other[0].history], rel=1e-5)
        for name, tensor in one[1].items():
            torch.testing.assert_close(other[1][name], tensor, atol=2e-5, rtol=1e-3)
    assert not torch.allclose(whole[1]["delta.0.layers.0.attn.q.b"], nine[1]["delta.0.layers.0.attn.q.b"], atol=1e-3)


def test_bf16_trains_and_the_next_run_is_in_full_precision_again(backbone: Backbone) -> None:
    full = trained(backbone)[1]
    half = trained(backbone, replace(FAST, precision="bf16"))[1]
    assert not same(full, half)
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    assert same(full, trained(backbone)[1])


# Chance


def test_the_same_seed_gives_the_same_numbers(backbone: Backbone) -> None:
    first, second, other = (trained(backbone, seed=seed, dev=TRAIN[:4]) for seed in (3, 3, 4))
    assert same(first[1], second[1])
    assert first[0].history == second[0].history
    assert not same(first[1], other[1])


def test_the_callers_chance_is_left_alone(backbone: Backbone) -> None:
    def draws() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random()

    def seeded() -> None:
        torch.manual_seed(5)
        numpy.random.seed(5)
        random.seed(5)

    seeded()
    expected = draws()
    seeded()
    trained(backbone)
    assert draws() == expected


def test_every_row_once_an_epoch_in_another_order_each() -> None:
    for rows in (10, 5000):
        order = Order([i % 7 + 1 for i in range(rows)], 4, 2, seed=1)
        epochs = [[order.batches(step) for step in range(n * order.epoch, (n + 1) * order.epoch)] for n in (0, 1)]
        flat = [[row for batches in epoch for batch in batches for row in batch] for epoch in epochs]
        assert [sorted(rows_of) for rows_of in flat] == [list(range(rows))] * 2
        assert flat[0] != flat[1]
        assert max(len(batch) for batches in epochs[0] for batch in batches) == 4
        assert epochs[0] == [order.batches(step) for step in range(order.epoch)]  # back again


def test_rows_of_a_class_stand_together_and_each_comes_once_an_epoch() -> None:
    classes = [row % 50 for row in range(230)]
    order = Order([1] * 230, 16, 1, 3, classes, per_class=4)
    epochs = [[order.batches(step)[0] for step in range(n * order.epoch, (n + 1) * order.epoch)] for n in (0, 1)]
    assert all(sorted(row for batch in epoch for row in batch) == list(range(230)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    in_groups = [Counter(classes[row] for row in batch) for batch in epochs[0][:-1]]
    alone = [Counter(classes[row] for row in Order([1] * 230, 16, 1, 3).batches(step)[0]) for step in range(14)]
    pairs = [sum(n * (n - 1) // 2 for found in drawn for n in found.values()) for drawn in (in_groups, alone)]
    assert pairs[0] > 3 * pairs[1]


def test_rows_without_a_class_cannot_stand_by_it() -> None:
    with pytest.raises(ConfigError, match="per_class = 2: rows of one class stand together where each has one"):
        Order([1, 1], 2, 1, 0, [0, None], per_class=2)


# How long, and at what rate


@pytest.mark.parametrize(
    ("training", "steps"),
    [(Training(), 30), (Training(batch_size=2), 36), (Training(epochs=2, batch_size=5), 6), (Training(steps=4), 4)],
)
def test_length_of_a_run(model: Model, training: Training, steps: int) -> None:
    run = fit(model, TRAIN, training=training)
    assert (run.steps, run.best_step, run.stopped, run.best) == (steps, steps, "done", {})
    assert run.epochs == pytest.approx(steps / math.ceil(12 / training.rows), abs=1e-3)
    assert run.trainable == model.parameter_count()


def test_schedules() -> None:
    for schedule, last in (("linear", 1 / 18), ("cosine", 0.0076), ("constant", 1.0)):
        rates = [Training(schedule=schedule).rate(step, 20) for step in range(20)]  # type: ignore[arg-type]
        assert rates[:3] == [0.5, 1.0, 1.0]
        assert rates[-1] == pytest.approx(last, abs=1e-3)
        assert all(rate > 0 for rate in rates)
        assert sorted(rates[2:], reverse=True) == rates[2:]
    assert Training(warmup=0).rate(0, 1) == Training(warmup=1).rate(0, 1) == 1.0


@pytest.mark.parametrize(
    ("option", "value", "possible"),
    [
        ("epochs", 0, "whole number, 1 or more"),
        ("batch_size", 2.5, "whole number, 1 or more"),
        ("learning_rate", -1, "above 0"),
        ("learning_rate", math.nan, "above 0"),
        ("warmup", 1.5, "0 to 1"),
        ("schedule", "step", "linear, cosine or constant"),
        ("precision", "fp8", "no, bf16 or fp16"),
        ("patience", 0, "or none"),
        ("backbone_dropout", 0.1, "true or false"),
    ],
)
def test_impossible_options(option: str, value: Any, possible: str) -> None:
    with pytest.raises(ConfigError, match=possible) as e:
        Training(**{option: value})
    assert f"{option} = {value!r}" in str(e.value)


def test_epochs_and_steps_together() -> None:
    with pytest.raises(ConfigError, match="epochs = 2 and steps = 3 were both given; give one of them"):
        Training(epochs=2, steps=3)


def test_what_cannot_be_trained(backbone: Backbone, model: Model) -> None:
    with pytest.raises(ConfigError, match="there are no examples to train on"):
        fit(model, [])
    with pytest.raises(ConfigError, match="the dev set has no examples"):
        fit(model, TRAIN, [])
    with pytest.raises(ConfigError, match="dev example 2 has no label"):
        fit(model, TRAIN, [TRAIN[0], Example({"text": "a film"})])
    with pytest.raises(ConfigError, match="'fp16' needs a GPU and the model is on the CPU; possible here: no, bf16"):
        fit(model, TRAIN, training=Training(precision="fp16"))
    with pytest.raises(ConfigError, match="there are no rows to measure on"):
        model.measure([])
    with pytest.raises(ConfigError, match="row 1 of 1 has no label to be compared with"):
        model.measure(model.encode([Example({"text": "a film"})]))
    with pytest.raises(ConfigError, match="adaptation 7"):
        model.encode(TRAIN, 7)
    model.adapted.remove()
    for bare, message in (
        (adapt(backbone, Task(TEMPLATE, WORDS)), "nothing in this model trains: add a delta"),
        (
            Model(backbone, Task(TEMPLATE, WORDS), [LoRA()], seeds=(0, 1)),
            "fit trains one adaptation, and this model has 2",
        ),
    ):
        bare.adapted.remove()
        with pytest.raises(ConfigError, match=message):
            fit(bare, TRAIN)


# Early stopping, and what is kept


def planted(monkeypatch: pytest.MonkeyPatch, *accuracies: float) -> list[dict[str, Tensor]]:
    """dev gives these accuracies in turn; the tensors that it saw."""
    seen: list[dict[str, Tensor]] = []

    def measure(of: Model, rows: Any, batch_size: int, slot: int, through: Any) -> dict[str, float]:
        seen.append(weights(of))
        return {"accuracy": accuracies[len(seen) - 1], "macro_f1": 0.0, "loss": 1.0}

    monkeypatch.setattr(Model, "measure", measure)
    return seen


def test_stops_early_and_the_best_is_back(monkeypatch: pytest.MonkeyPatch, model: Model, tmp_path: Path) -> None:
    seen = planted(monkeypatch, 0.2, 0.7, 0.5, 0.7, 0.6, 0.9)
    training = Training(epochs=6, batch_size=4, patience=3, learning_rate=1e-2)
    run = fit(model, TRAIN, TRAIN, training=training, out=tmp_path)
    assert (run.stopped, run.steps, run.best_step, run.best["accuracy"]) == ("early", 15, 6, 0.7)
    assert [h["step"] for h in run.history] == [3, 6, 9, 12, 15]
    assert same(weights(model), seen[1])
    record, saved = store.read(tmp_path)
    assert same({name: tensor[None] for name, tensor in saved.items()}, seen[1])
    assert record["metrics"]["dev"] == run.best
    assert record["training"]["run"] == run.record()
    assert run.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adaptation.json", "adaptation.safetensors"]


def test_equal_accuracy_is_decided_by_the_loss(backbone: Backbone) -> None:
    run, _ = trained(backbone, Training(steps=100, learning_rate=2e-2), dev=TRAIN)
    best = [h for h in run.history if h["dev"]["accuracy"] == run.best["accuracy"]]
    assert len(best) > 1
    assert run.best == min((h["dev"] for h in best), key=lambda m: m["loss"])


def test_no_patience(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    planted(monkeypatch, *[0.5] * 30)
    assert fit(model, TRAIN, TRAIN, training=Training(patience=None)).stopped == "done"


def poisoned(monkeypatch: pytest.MonkeyPatch, at: int, effect: Any) -> None:
    """From the training batch of that number on, counted from 1, the loss is what `effect` makes of it."""
    plain, calls = Model.forward, [0]

    def forward(self: Model, batch: Batch, adaptation: Any = None) -> dict[str, Tensor]:
        out = plain(self, batch, adaptation)
        calls[0] += torch.is_grad_enabled()
        return {**out, "loss": effect(out["loss"])} if torch.is_grad_enabled() and calls[0] >= at else out

    monkeypatch.setattr(Model, "forward", forward)


@pytest.mark.parametrize(
    ("effect", "told_of"),
    [
        (lambda loss: loss * math.nan, "the loss is nan at step 8"),
        (lambda loss: (loss - loss.detach()).sqrt() * 0 + loss, "the gradient's norm is nan at step 8"),
    ],
    ids=["loss", "gradient"],
)
def test_a_loss_that_is_no_number(
    monkeypatch: pytest.MonkeyPatch, model: Model, tmp_path: Path, effect: Any, told_of: str
) -> None:
    poisoned(monkeypatch, 8, effect)
    seen = planted(monkeypatch, 0.6, 0.5)
    with pytest.raises(TrainingError, match=told_of) as e:
        fit(model, TRAIN, TRAIN, training=replace(FAST, steps=None, epochs=9), out=tmp_path)
    assert f"the best so far, of step 3 (dev accuracy 0.600), is kept in the model and in {tmp_path}" in str(e.value)
    assert "a third of the learning rate" in str(e.value)
    assert same(weights(model), seen[0])
    record, saved = store.read(tmp_path)
    assert same({name: tensor[None] for name, tensor in saved.items()}, seen[0])
    assert record["training"]["finished"] is False


def test_a_loss_that_is_no_number_at_once(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    before = weights(model)
    poisoned(monkeypatch, 1, lambda loss: loss * math.inf)
    with pytest.raises(TrainingError, match="nothing was better than the start, which is back in the model"):
        fit(model, TRAIN)
    assert same(weights(model), before)


def raising(error: BaseException) -> Any:
    def effect(loss: Tensor) -> Tensor:
        raise error

    return effect


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "mps", "python"],
)
def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch, model: Model, error: Exception) -> None:
    poisoned(monkeypatch, 4, raising(error))
    with pytest.raises(TrainingError, match="memory ran out with batch_size = 6") as e:
        fit(model, TRAIN, training=Training(batch_size=6, accumulate=2))
    assert "the best so far, of step 1, is kept in the model" in str(e.value)
    assert "Try batch_size = 3 with accumulate = 4" in str(e.value)
    assert e.value.__cause__ is error


def test_memory_that_runs_out_with_one_row(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    poisoned(monkeypatch, 1, raising(MemoryError()))
    with pytest.raises(TrainingError, match="That is one row already: cut texts with max_length"):
        fit(model, TRAIN, training=Training(batch_size=1))


def test_other_errors_are_not_of_memory(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    poisoned(monkeypatch, 1, raising(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        fit(model, TRAIN)


def test_interrupted_by_hand(monkeypatch: pytest.MonkeyPatch, model: Model, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        seen = planted(patch, 0.9, 0.5)
        poisoned(patch, 8, raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fit(model, TRAIN, TRAIN, training=replace(FAST, steps=None, epochs=4), out=tmp_path)
    assert same(weights(model), seen[0])
    assert not model.training
    assert (tmp_path / "checkpoint" / "step-6").is_dir()


# What is shown


class Told:
    """Progress that is written down."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, total: int, what: str) -> None:
        self.calls.append(("start", total, what))

    def step(self, step: int, loss: float) -> None:
        self.calls.append(("step", step))

    def evaluated(self, metrics: Mapping[str, float], best: bool) -> None:
        self.calls.append(("evaluated", best))

    def done(self) -> None:
        self.calls.append(("done",))


def test_progress(model: Model) -> None:
    told_of = Told()
    fit(model, TRAIN, TRAIN, training=Training(epochs=1, batch_size=6), progress=told_of, what="seed 1")
    steps = [("step", 0), ("step", 1), ("step", 2)]
    assert told_of.calls == [("start", 2, "seed 1"), *steps, ("evaluated", True), ("done",)]


def test_the_bar_goes_to_standard_error(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    from deltaprompt.trainer import RichProgress

    fit(model, TRAIN, TRAIN, training=FAST, progress=RichProgress())
    out, err = capsys.readouterr()
    assert out == ""
    assert "10/10" in err
    assert "loss" in err
    assert "best dev accuracy" in err


def test_nothing_is_shown_where_nobody_watches(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    fit(model, TRAIN, training=Training(steps=1))
    assert capsys.readouterr() == ("", "")


# Several seeds


def test_several_seeds(backbone: Backbone, tmp_path: Path) -> None:
    def sets(seed: int) -> tuple[list[Example], list[Example]]:
        return TRAIN[seed:], TRAIN[:6]

    def fitted(resume: bool) -> SeedsResult:
        return fit_seeds(
            lambda seeds: make(backbone, seeds=seeds),
            sets,
            TRAIN,
            seeds=[0, 1, 2],
            training=FAST,
            out=tmp_path,
            progress=shown,
            resume=resume,
        )

    shown = Told()
    result = fitted(resume=False)
    told_of = result.as_json()
    assert json.loads(json.dumps(told_of)) == told_of
    assert json.loads((tmp_path / "seeds.json").read_text()) == told_of
    assert list(told_of) == ["seeds", "best_seed", "test", "trainable", "bytes", "seconds", "out"]
    assert told_of["seeds"] == [0, 1, 2]
    assert set(told_of["test"]) == {"accuracy", "macro_f1"}
    each = told_of["test"]["accuracy"]["each"]
    assert len(each) == 3
    assert told_of["test"]["accuracy"]["mean"] == pytest.approx(sum(each) / 3)
    assert told_of["out"] == str(tmp_path)
    assert result.best.best == max((run.best for run in result.runs), key=lambda m: (m["accuracy"], -m["loss"]))
    for seed, run in zip(result.seeds, result.runs, strict=True):
        folder = tmp_path / f"seed-{seed}"
        record = store.describe(folder)
        assert record["metrics"] == {"dev": run.best, "test": {k: v["each"][seed] for k, v in result.test.items()}}
        assert run.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert [c[2] for c in shown.calls if c[0] == "start"] == ["seed-0 … seed-2: 3 in one pass"]
    assert all(p.requires_grad for p in backbone.model.parameters())  # all models were taken off

    shown.calls.clear()
    again = fitted(resume=True)
    assert again == result
    assert not shown.calls


def test_one_seed(backbone: Backbone, tmp_path: Path) -> None:
    result = fit_seeds(
        lambda seeds: make(backbone, seeds=seeds), lambda seed: (TRAIN, None), seeds=[7], training=FAST, out=tmp_path
    )
    assert store.holds_adaptation(tmp_path)
    assert (result.best_seed, result.test, result.as_json()["test"]) == (7, {}, {})
    assert not (tmp_path / "seeds.json").exists()


def test_seeds_that_are_none_or_twice(backbone: Backbone) -> None:
    for seeds in ([], [1, 1]):
        with pytest.raises(ConfigError, match="there is one or more, and each once"):
            fit_seeds(lambda seeds: make(backbone, seeds=seeds), lambda seed: (TRAIN, None), seeds=seeds)


def test_mean_and_sample_standard_deviation() -> None:
    assert told([0.5, 0.7]) == {
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.1 * math.sqrt(2)),
        "each": [0.5, 0.7],
    }
    assert told([0.5])["std"] == 0.0
