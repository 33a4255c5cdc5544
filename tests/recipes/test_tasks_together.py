"""Adaptations of several templates and label words in one pass: each ends as it would alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.deltas.adapter import Adapter
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError
from deltaprompt.model import Model, Task
from deltaprompt.model.saved import open_
from deltaprompt.trainer import Plan, Training, fit, fit_many
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo

TEXTS = ("a good movie", "so bad", "one two three good", "it was bad", "good good", "three bad movie so it")
ROWS = [Example({"text": text}, "a" if "good" in text else "b") for text in TEXTS]
TASKS = {
    "words": Task("{text} it was {mask}", {"a": "good", "b": "bad"}),
    "other words": Task("{text} it was {mask}", {"a": "one", "b": "two"}),
    "longer words": Task("{text} it was {mask}", {"a": "good movie", "b": "bad"}),
    "other template": Task("so {text} : {mask}", {"a": "good", "b": "bad"}),
    "head": Task("{text} {mask}", ("a", "b"), SoftVerbalizer()),
    "same again": Task("{text} it was {mask}", {"a": "good", "b": "bad"}),
}
SEEDS = range(len(TASKS))
HOW = Training(epochs=3, batch_size=2, learning_rate=2e-2)


def plans(training: Training = HOW) -> list[Plan]:
    return [Plan(ROWS, ROWS[::2], training, seed, name) for seed, name in zip(SEEDS, TASKS, strict=True)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_each_ends_as_it_would_alone(family: str, dropout: float, tmp_path: Path) -> None:
    backbone = zoo.build(family, torch.float64)
    deltas = [LoRA(rank=2, dropout=dropout)]
    alone, expected = [], []
    for plan, task in zip(plans(), TASKS.values(), strict=True):
        model = Model(backbone, task, deltas, [plan.seed])
        run = fit(model, plan.train, plan.dev, training=plan.training, seed=plan.seed)
        alone.append(([entry["loss"] for entry in run.history], run.best_step, model.stored()))
        expected.append(model.probabilities(ROWS))
        model.adapted.remove()
    model = Model(backbone, list(TASKS.values()), deltas, list(SEEDS))
    runs = fit_many(model, plans(), out=tmp_path)
    assert len({len(model.reader(slot).features.answer_lengths) for slot in SEEDS}) == 2
    for slot, (run, (losses, best_step, kept)) in enumerate(zip(runs, alone, strict=True)):
        assert run.best_step == best_step
        assert_close([entry["loss"] for entry in run.history], losses, rtol=0, atol=1e-9)
        stored = model.stored(slot)
        assert stored.keys() == kept.keys()
        for name, tensor in kept.items():
            assert_close(stored[name], tensor, rtol=0, atol=1e-9)
        assert_close(model.probabilities(ROWS, slot=slot), expected[slot], rtol=0, atol=1e-7)
    model.adapted.remove()
    for name, probabilities in zip(TASKS, expected, strict=True):  # each is a folder like any other
        opened = open_(tmp_path / name, backbone)
        assert opened.task.template == TASKS[name].template
        assert_close(opened.probabilities(ROWS), probabilities, rtol=0, atol=1e-5)
        opened.adapted.remove()


def test_a_batch_has_rows_of_several_tasks() -> None:
    chosen = [TASKS[name] for name in ("words", "other template", "head")]
    model = Model(zoo.build("bert"), chosen, [Adapter(2)], [0, 1, 2])
    slots = torch.tensor([2, 0, 1, 0, 2, 1])
    rows = [model.encode([example], slot)[0] for example, slot in zip(ROWS, slots.tolist(), strict=True)]
    with torch.no_grad():
        mixed = model(model.features.collate(rows), slots)["logits"]
        for i, slot in enumerate(slots.tolist()):
            assert_close(mixed[i], model(model.features.collate(rows[i : i + 1]), slot)["logits"][0])


def test_what_is_refused() -> None:
    backbone, words = zoo.build("gpt2"), TASKS["words"]
    with pytest.raises(ConfigError, match=r"same labels in the same order; got \['a', 'b'\] and \['b', 'a'\]"):
        Model(backbone, [words, Task(words.template, {"b": "bad", "a": "good"})], [], [0, 1])
    with pytest.raises(ConfigError, match=r"as many soft tokens each; got 0 and 3. Put those that differ in a model"):
        Model(backbone, [words, Task("{soft:3} {text} {mask}", words.labels)], [], [0, 1])
    with pytest.raises(ConfigError, match="1 tasks for 2 seeds; give one task for all, or one a seed"):
        Model(backbone, [words], [], [0, 1])
    model = Model(backbone, [words, TASKS["longer words"]], [LoRA(2)], [0, 1])
    rows = [model.encode(ROWS[:1], slot)[0] for slot in (0, 1)]
    with pytest.raises(ConfigError, match=r"answers of several tokens are scored one task at a time"):
        model(model.features.collate(rows), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="adaptation 2 was named; 0 to 1 are possible"):
        model.predict(["good"], slot=2)
