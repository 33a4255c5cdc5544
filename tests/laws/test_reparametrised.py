"""Laws of deltas that train other tensors than they keep: what is kept answers as what was trained, bitwise."""

import copy
import pickle

import pytest
import torch

from deltaprompt import registry, store
from deltaprompt.deltas._base import Reparametrised
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import SiteError
from deltaprompt.model import Model, Task
from deltaprompt.model.saved import describe, fill, open_, tensors
from deltaprompt.trainer import Training, fit, loop
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo

NAMES = [n for n in registry.variants("deltas") if issubclass(registry.variant("deltas", n), Reparametrised)]
FAMILIES = ("bert", "gpt2", "llama", "t5")
SMALL = {"p_tuning": {"length": 3, "hidden": 4}, "reparametrised_prefix": {"length": 3, "embed": 4, "mid": 6}}
TASK = Task("{soft:2} {text} It was {mask}.", {"good": "great", "bad": "terrible"}, SoftVerbalizer())
TEXTS = {
    "good": ["a great movie", "a good film", "great plot", "a great film"],
    "bad": ["terrible acting", "a bad film", "terrible movie", "bad plot"],
}
TRAIN = [Example({"text": text}, label) for label, texts in TEXTS.items() for text in texts]
TRAINING = Training(epochs=3, batch_size=4, learning_rate=1e-2)
every = pytest.mark.parametrize("name", NAMES)


def delta(name):
    return registry.build("deltas", name, SMALL.get(name, {}))


def made(name, family="bert", seeds=(0,)):
    """A model with the delta inside and a LoRA with dropout around it; every parameter has moved."""
    model = Model(zoo.build(family), TASK, [delta(name), LoRA(rank=2, dropout=0.5)], seeds)
    chance = torch.Generator().manual_seed(3)
    for _, tensor in model.parts():
        tensor.data.add_(torch.randn(tensor.shape, generator=chance), alpha=0.3)
    return model


def answers(model, slot=0):
    return model.probabilities(TRAIN, slot=slot)


@every
@pytest.mark.parametrize("family", FAMILIES)
def test_settling_changes_no_answer(name, family):
    model = made(name, family, seeds=(0, 1))
    before, trained = [answers(model, slot) for slot in (0, 1)], model.parameter_count()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = answers(model)
    model.settle()
    assert [torch.equal(answers(model, slot), before[slot]) for slot in (0, 1)] == [True, True]
    assert not torch.equal(*before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(answers(model), rounded)
    assert not torch.equal(rounded, before[0])
    assert model.chosen == (delta(name).plain(), LoRA(rank=2, dropout=0.5))
    assert model.parameter_count() == sum(t.numel() for t in model.stored().values()) != trained
    assert not any(module.training for module in model.modules())
    parts = dict(model.parts())
    model.settle()
    assert all(tensor is parts[name] for name, tensor in model.parts())


@every
@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_computed_is_saved(tmp_path, name, family):
    model = made(name, family, seeds=(0, 1))
    model.save(tmp_path, 1)
    assert model.chosen[0] == delta(name)
    expected = answers(model, 1)
    model.adapted.remove()
    again = open_(tmp_path, model.backbone)
    assert torch.equal(answers(again), expected)
    record = describe(tmp_path)
    assert registry.from_description("deltas", record["deltas"][0]) == delta(name).plain()
    assert record["parameters"] == again.parameter_count()


@every
def test_saved_tensors_fill_a_model_that_still_trains_the_others(name):
    model, other = made(name), Model(zoo.build("bert"), TASK, [delta(name), LoRA(rank=2)])
    expected = answers(model)
    fill(other, tensors(model))
    assert torch.equal(answers(other), expected)


@every
def test_what_is_fitted_saved_and_opened_answers_alike(tmp_path, name):
    model = made(name)
    trained = model.parameter_count()
    run = fit(model, TRAIN, TRAIN, training=TRAINING, out=tmp_path)
    assert run.trainable == trained != describe(tmp_path)["parameters"]
    assert not any(module.training for module in model.modules())
    expected = answers(model)
    assert model.evaluate(TRAIN)["accuracy"] == run.best["accuracy"]
    model.adapted.remove()
    again = open_(tmp_path, model.backbone)
    assert torch.equal(answers(again), expected)
    again.adapted.remove()
    finished = made(name)
    assert fit(finished, TRAIN, TRAIN, training=TRAINING, out=tmp_path, resume=True) == run
    assert torch.equal(answers(finished), expected)


def result(out):
    """What a finished run left, without its times."""
    record, _ = store.read(out)
    told = {n: v for n, v in record["training"]["run"].items() if n != "seconds"}
    return (out / store.TENSORS).read_bytes(), told, record["deltas"], record["parameters"]


@every
def test_a_run_that_is_broken_off_goes_on_bitwise(tmp_path, monkeypatch, name):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(made(name), TRAIN, TRAIN, training=TRAINING, out=whole)
    plain = loop.Loop._one_step

    def one_step(self, running):
        if self.made == 3:
            raise KeyboardInterrupt
        plain(self, running)

    model = made(name)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_one_step", one_step)
        with pytest.raises(KeyboardInterrupt):
            fit(model, TRAIN, TRAIN, training=TRAINING, out=broken)
    assert model.chosen[0] == delta(name)  # training can go on with it
    expected = answers(model)
    model.adapted.remove()
    best = open_(broken, model.backbone)
    assert torch.equal(answers(best), expected)
    best.adapted.remove()
    fit(made(name), TRAIN, TRAIN, training=TRAINING, out=broken, resume=True)
    assert result(broken) == result(whole)


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_on_by_itself(name, copied):
    model = made(name)
    expected = answers(model)
    twin = copied(model)
    model.settle()
    assert torch.equal(answers(twin), expected)
    assert twin.chosen[0] == delta(name)
    fit(twin, TRAIN, training=TRAINING)
    assert not torch.equal(answers(twin), expected)
    assert torch.equal(answers(model), expected)


@every
def test_it_is_not_merged(name):
    model = made(name)
    expected = answers(model)
    with pytest.raises(SiteError, match="has no form in weights: it is no linear change of a map. Keep it attached"):
        model.adapted.merge()
    assert torch.equal(answers(model), expected)
