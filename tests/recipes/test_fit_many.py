"""Several adaptations in one loop: early stops, folders, a kill and a resume, what goes wrong, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaprompt import store
from deltaprompt.backbone import Backbone
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError, TrainingError
from deltaprompt.model import Model, Task
from deltaprompt.model.saved import open_
from deltaprompt.trainer import Plan, Run, Training, fit, fit_many, fit_seeds, loop
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo
from tests.recipes.test_resume import TRAIN, WORDS

TRAINING = Training(epochs=4, batch_size=2, accumulate=2, learning_rate=1e-2)  # 3 steps an epoch
PLANS = (
    Plan(TRAIN, TRAIN[::3], TRAINING, seed=5),
    Plan(TRAIN[1:], TRAIN[::4], replace(TRAINING, epochs=6, learning_rate=2e-2), seed=6),
    Plan(TRAIN, None, replace(TRAINING, epochs=2), seed=7, name="short"),
)
NAMES = ["seed-5", "seed-6", "short"]


class Told:
    """What the bar was told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.steps: list[int] = []

    def start(self, total: int, what: str) -> None:
        self.started.append(what)

    def step(self, step: int, loss: float) -> None:
        self.steps.append(step)

    def evaluated(self, metrics: Any, best: bool) -> None: ...
    def done(self) -> None: ...


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return zoo.build("bert")


def made(backbone: Backbone, seeds: Sequence[int], dropout: float = 0.3) -> Model:
    return Model(
        backbone, Task("{text} It was {mask}.", WORDS, SoftVerbalizer()), [LoRA(rank=2, dropout=dropout)], seeds
    )


def many(
    backbone: Backbone, plans: Sequence[Plan] = PLANS, dropout: float = 0.3, **options: Any
) -> tuple[list[Run], list[dict[str, Tensor]]]:
    """The runs, and what every slot learned."""
    model = made(backbone, [plan.seed for plan in plans], dropout)
    try:
        runs = fit_many(model, plans, **{"progress": Told()} | options)
        return runs, [{n: t.clone() for n, t in model.stored(slot).items()} for slot in range(len(plans))]
    finally:
        model.adapted.remove()


def result(out: Path, names: Sequence[str] = NAMES) -> list[Any]:
    """The bytes of the tensors in every folder, and the records without the times."""
    found = list[Any]()
    for name in names:
        record, _ = store.read(out / name)
        assert record["training"]["finished"]
        assert sorted(path.name for path in (out / name).iterdir()) == [store.JSON, store.TENSORS]
        told = {key: value for key, value in record["training"]["run"].items() if key != "seconds"}
        found += [(out / name / store.TENSORS).read_bytes(), told, record["metrics"]]
    return found


def broken_off(backbone: Backbone, out: Path, at: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A run in `out` that was broken off after that step."""
    plain = loop.Loop._one_step

    def one_step(self: loop.Loop, running: Any) -> None:
        if self.made == at:
            raise KeyboardInterrupt
        plain(self, running)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_one_step", one_step)
        with pytest.raises(KeyboardInterrupt):
            many(backbone, out=out, **options)


# Stops


def test_one_stops_early_while_others_go_on(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    dev = {0: iter([0.5, 0.4, 0.3, 0.9]), 1: iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])}
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def measure(of: Any, rows: Any, batch_size: int, slot: int, through: Any) -> dict[str, float]:
        seen[slot].append(of.stored(slot)["verbalizer.bias"].clone())
        return {"accuracy": next(dev[slot]), "macro_f1": 0.0, "loss": 1.0}

    monkeypatch.setattr(Model, "measure", measure)
    plans = [replace(plan, training=replace(plan.training, patience=2)) for plan in PLANS]
    runs, learned = many(backbone, plans)
    assert [(run.stopped, run.steps, run.best_step) for run in runs] == [
        ("early", 9, 3),
        ("done", 18, 18),
        ("done", 6, 6),
    ]
    assert torch.equal(learned[0]["verbalizer.bias"], seen[0][0])  # the best is back, and nothing decayed it since
    assert torch.equal(learned[1]["verbalizer.bias"], seen[1][5])


def test_seconds_are_shared_out(backbone: Backbone) -> None:
    runs, _ = many(backbone)
    assert runs[1].seconds > runs[0].seconds > runs[2].seconds > 0


# On disk


def test_each_is_kept_in_a_folder_of_its_own(backbone: Backbone, tmp_path: Path) -> None:
    runs, learned = many(backbone, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES])
    for name, run, tensors, plan in zip(NAMES, runs, learned, PLANS, strict=True):
        record, saved = store.read(tmp_path / name)
        assert all(torch.equal(saved[key], tensor) for key, tensor in tensors.items())
        assert record["training"]["run"] == run.record()
        assert record["training"]["settings"]["seed"] == plan.seed
        assert run.bytes == sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    model = made(backbone, [6])
    alone = fit(model, PLANS[1].train, PLANS[1].dev, training=PLANS[1].training, seed=6)
    says = model.probabilities(TRAIN)
    model.adapted.remove()
    assert alone.best_step == runs[1].best_step
    opened = open_(tmp_path / "seed-6", backbone)
    torch.testing.assert_close(opened.probabilities(TRAIN), says, atol=1e-4, rtol=0)
    opened.adapted.remove()


@pytest.mark.parametrize("dropout", [0.3, 0.0])
@pytest.mark.parametrize("at", [2, 8, 17])
def test_broken_off_and_gone_on_with(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, dropout: float
) -> None:
    broken_off(backbone, tmp_path / "out", at, monkeypatch, dropout=dropout)
    assert (tmp_path / "out" / "checkpoint").is_dir()
    shown = Told()
    many(backbone, dropout=dropout, out=tmp_path / "out", resume=True, together=1, progress=shown)
    assert shown.steps[0] == at // 3 * 3  # from the newest checkpoint, together as before
    many(backbone, dropout=dropout, out=tmp_path / "whole")
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_killed_while_it_finishes(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is kept as finished, the others are not, the checkpoint is still there."""
    plain = loop.Course.save

    def save(self: Any, run: Any = None) -> None:
        if run is not None and self.slot == 1:
            raise KeyboardInterrupt
        plain(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Course, "save", save)
        with pytest.raises(KeyboardInterrupt):
            many(backbone, out=tmp_path / "out")
    many(backbone, out=tmp_path / "out", resume=True)
    many(backbone, out=tmp_path / "whole")
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_what_is_finished_is_not_trained_again(backbone: Backbone, tmp_path: Path) -> None:
    first, learned = many(backbone, PLANS[:2], out=tmp_path)
    before = result(tmp_path, NAMES[:2])
    shown = Told()
    again, same = many(backbone, PLANS, out=tmp_path, resume=True, progress=shown)
    assert shown.started == ["short"]
    assert again[:2] == first
    assert result(tmp_path, NAMES[:2]) == before
    for one, other in zip(learned, same, strict=False):
        assert all(torch.equal(one[name], other[name]) for name in one)
    shown = Told()
    assert many(backbone, PLANS, out=tmp_path, resume=True, progress=shown)[0] == again
    assert not shown.started


def test_without_resume_all_begin_anew(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(backbone, tmp_path / "out", 8, monkeypatch)
    many(backbone, out=tmp_path / "out")
    many(backbone, out=tmp_path / "whole")
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_what_was_begun_alone_goes_on_alone(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_off(backbone, tmp_path / "out", 4, monkeypatch, together=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["seed-5"]
    shown = Told()
    many(backbone, out=tmp_path / "out", resume=True, progress=shown)
    assert shown.started == ["seed-5", "seed-6 … short: 2 in one pass"]
    assert shown.steps[0] == 3


def test_other_settings_are_refused(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(backbone, tmp_path, 8, monkeypatch)
    other = replace(PLANS[1], training=replace(PLANS[1].training, learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"learning_rate of seed-6 was 0.02 and is now 0.5\. Set it back"):
        many(backbone, (PLANS[0], other, PLANS[2]), out=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="also trained seed-6, short; add that again, or start without resume"):
        many(backbone, PLANS[:1], out=tmp_path, resume=True)


# What goes wrong, and what cannot be


def test_one_whose_loss_is_no_number_stops_alone(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.Loop._losses

    def losses(self: Any, running: Any, picked: Any) -> list[Tensor]:
        found = plain(self, running, picked)
        bad = [n for n, (course, _, _) in enumerate(picked) if running[course].slot == 0 and self.made == 4]
        return [loss * float("nan") if n in bad else loss for n, loss in enumerate(found)]

    monkeypatch.setattr(loop.Loop, "_losses", losses)
    with pytest.raises(TrainingError, match="seed-5: the loss is nan at step 5, so training stopped; the best so far"):
        many(backbone, out=tmp_path / "out")
    monkeypatch.undo()
    assert store.describe(tmp_path / "out" / "seed-5")["training"]["finished"] is False
    many(backbone, out=tmp_path / "whole")
    assert result(tmp_path / "out", NAMES[1:]) == result(tmp_path / "whole", NAMES[1:])
    many(backbone, out=tmp_path / "out", resume=True)
    assert store.describe(tmp_path / "out" / "seed-5")["training"]["finished"] is True


def test_memory_that_runs_out(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(self: Any, running: Any, picked: Any) -> list[Tensor]:
        raise MemoryError

    monkeypatch.setattr(loop.Loop, "_losses", losses)
    with pytest.raises(TrainingError, match="batch_size = 2 and 3 together; seed-5: nothing was .* Try together = 1"):
        many(backbone)


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        ({"backbone_dropout": True}, "the backbone's own dropout is drawn for a whole batch"),
        ({"precision": "bf16"}, "they differ in precision or checkpointing"),
    ],
)
def test_one_after_another_where_a_pass_cannot_be_shared(
    backbone: Backbone, training: dict[str, Any], reason: str
) -> None:
    shown = Told()
    plans = (replace(PLANS[0], training=replace(TRAINING, epochs=1, **training)), PLANS[2])
    runs, _ = many(backbone, plans, progress=shown)
    assert shown.started == [f"{name}, not in one pass: {reason}" for name in ("seed-5", "short")]
    assert [run.steps for run in runs] == [3, 6]


def test_one_after_another_where_a_site_mixes_rows() -> None:
    backbone, shown = zoo.build("deberta-v3"), Told()
    model = Model(backbone, Task("{text} It was {mask}.", WORDS), [LoRA(rank=2, at=("attn.k",))], [5, 7])
    runs = fit_many(model, [PLANS[0], PLANS[2]], progress=shown)
    model.adapted.remove()
    assert shown.started[-2:] == [
        f"{n}, not in one pass: a site mixes the rows of a batch" for n in ("seed-5", "short")
    ]
    assert [run.steps for run in runs] == [12, 6]


def test_checkpointed_layers_meet_the_same_dropout(backbone: Backbone) -> None:
    plain = many(backbone)
    again = many(backbone, [replace(plan, training=replace(plan.training, checkpointing=True)) for plan in PLANS])
    for one, other in zip(plain[1], again[1], strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-3)


def test_what_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    model = made(backbone, [0, 1])
    for plans, options, message in (
        (PLANS, {}, "3 plans for a model of 2 slots; give a plan for each"),
        (PLANS[:2], {"together": 0}, "together = 0 is not possible: it is a whole number, 1 or more"),
        ([PLANS[0]] * 2, {"out": tmp_path}, r"1 names of plans are not their own \('seed-5'\); give each plan a name"),
        ([PLANS[0], replace(PLANS[1], train=[])], {}, "there are no examples to train on"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_many(model, plans, **options)
    model.adapted.remove()


# Seeds


def test_seeds_in_one_pass_and_one_after_another_agree(backbone: Backbone, tmp_path: Path) -> None:
    found = [
        fit_seeds(
            lambda seeds: made(backbone, seeds),
            lambda seed: (TRAIN, TRAIN[::3]),
            TRAIN,
            seeds=[0, 1, 2],
            training=TRAINING,
            together=together,
            out=tmp_path / str(together),
            progress=Told(),
        )
        for together in (1, 2, 8)
    ]
    for other in found[1:]:
        assert other.test["accuracy"] == found[0].test["accuracy"]
        assert [run.best_step for run in other.runs] == [run.best_step for run in found[0].runs]
    assert json.loads((tmp_path / "8" / "seeds.json").read_text())["seeds"] == [0, 1, 2]
