"""LoRA with A frozen (LoRA-FA: Zhang et al. 2023) is LoRA whose A is held, in less memory."""

import pytest
import torch
from torch.testing import assert_close

import deltaprompt as dp
from deltaprompt.compose import Adapted, parameters_of, sites_of
from deltaprompt.deltas.lora import LoRA
from deltaprompt.interchange import open_peft, save_peft
from deltaprompt.memory import kept
from deltaprompt.model import Model
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo
from tests.adapted_zoo import loss_of, mask_of, shake

EVERY = ("attn.*", "ffn.*")
FAMILIES = ["bert", "gpt2", "llama", "t5"]
WORDS = {"good": ("great",), "bad": ("terrible",)}
ROWS = [Example({"text": "a great movie"}, "good"), Example({"text": "a bad film"}, "bad")]


def passed(family, delta, index=None):
    """Gradients, states and bytes kept by one pass."""
    adapted = shake(Adapted(zoo.build(family, torch.float64), [delta], 2))
    inputs = zoo.inputs_of(adapted.backbone)
    with kept(adapted) as counted:
        states = adapted.states(inputs, index)
    found = counted.bytes
    loss_of(states, mask_of(inputs)).backward()
    return {n: p.grad for n, p in adapted.parts()}, states.detach(), found


@pytest.mark.parametrize("index", [None, 1, torch.tensor([1, 0])], ids=["first", "second", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_b_has_the_gradients_that_it_has_where_a_is_held(family, index):
    plain, states, whole = passed(family, LoRA(at=EVERY), index)
    frozen, same_states, less = passed(family, LoRA(at=EVERY, freeze_a=True), index)
    assert torch.equal(states, same_states)
    for name, gradient in frozen.items():
        if name.endswith(".a"):
            assert gradient is None
        else:
            assert_close(gradient, plain[name], rtol=0, atol=1e-12)
    assert less < 0.92 * whole


def test_of_x_only_the_rank_is_kept():
    """On one linear map that stands alone: x [2, 7, 16] and A x [2, 7, 8], or A x alone."""
    sizes = [passed("bert", LoRA(at=("layers[1].ffn.up",), freeze_a=frozen))[2] for frozen in (False, True)]
    assert sizes[0] - sizes[1] == 2 * 7 * 16 * 8


def test_the_parameter_count_is_the_closed_form():
    delta, backbone = LoRA(3, at=EVERY, freeze_a=True), zoo.build("bert")
    count = sum(3 * site.outputs for site in sites_of(delta, backbone))
    assert parameters_of(delta, backbone) == count
    adapted = Adapted(backbone, [delta], 2)
    assert adapted.parameter_count() == count
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 2 * count


def test_each_slot_draws_its_own_a_and_keeps_it():
    adapted = Adapted(zoo.build("bert"), [LoRA(freeze_a=True)], 2, [3, 4])
    plain = Adapted(zoo.build("bert"), [LoRA()], 2, [3, 4])
    for (name, tensor), (_, other) in zip(adapted.parts(), plain.parts(), strict=True):
        assert torch.equal(tensor, other)
        assert name.endswith(".b") or not torch.equal(tensor[0], tensor[1])
        assert tensor.requires_grad == name.endswith(".b")


@pytest.fixture
def trained():
    backbone = zoo.build("bert")
    model = dp.adapt(backbone, dp.Task("{text} It was {mask}.", WORDS, SoftVerbalizer()), [LoRA(freeze_a=True)])
    start = {n: t.detach().clone() for n, t in model.parts()}
    run = dp.fit(model, ROWS, training=dp.Training(steps=3, learning_rate=0.05, weight_decay=0.5))
    return backbone, model, start, run


def test_training_leaves_a_as_it_was(trained):
    _, model, start, run = trained
    for name, tensor in model.parts():
        assert torch.equal(tensor, start[name]) == name.endswith(".a"), name
    assert run.trainable == sum(t.numel() for n, t in start.items() if not n.endswith(".a"))


def test_it_is_the_same_when_it_is_opened(trained, tmp_path):
    backbone, model, _, _ = trained
    expected = model.predict(["a great film"])
    model.save(tmp_path)
    model.adapted.remove()
    opened = dp.open(tmp_path, backbone)
    assert opened.predict(["a great film"]) == expected
    assert {n for n, t in opened.parts() if not t.requires_grad} == {n for n, _ in opened.parts() if n.endswith(".a")}


def test_merged_it_is_what_it_was_attached():
    adapted = shake(Adapted(zoo.build("bert", torch.float64), [LoRA(at=EVERY, freeze_a=True)], 2))
    inputs = zoo.inputs_of(adapted.backbone)
    attached = adapted.states(inputs, 1).detach()
    assert_close(adapted.merge(1).states(inputs), attached, rtol=0, atol=1e-9)
    adapted.unmerge()
    assert torch.equal(adapted.states(inputs, 1), attached)


def test_as_a_folder_of_peft_it_is_an_ordinary_lora(tmp_path):
    adapted = shake(Adapted(zoo.build("gpt2", torch.float64), [LoRA(at=("attn.*",), freeze_a=True)]))
    inputs = zoo.inputs_of(adapted.backbone)
    attached = adapted.states(inputs).detach()
    save_peft(adapted, tmp_path)
    again = open_peft(tmp_path, adapted.remove())
    assert_close(again.states(inputs), attached, rtol=0, atol=1e-6)
    assert all(tensor.requires_grad for _, tensor in again.parts())


def test_several_train_at_once_as_each_alone():
    task = dp.Task("{text} It was {mask}.", WORDS, SoftVerbalizer())
    training = dp.Training(steps=2, learning_rate=0.05, weight_decay=0.5)
    plans = [dp.Plan(ROWS, training=training, seed=seed) for seed in (1, 2)]
    together = Model(zoo.build("bert", torch.float64), task, [LoRA(freeze_a=True)], (1, 2))
    runs = dp.fit_many(together, plans)
    for slot, plan in enumerate(plans):
        alone = Model(zoo.build("bert", torch.float64), task, [LoRA(freeze_a=True)], (plan.seed,))
        run = dp.fit(alone, ROWS, training=training, seed=plan.seed)
        assert run.trainable == runs[slot].trainable == alone.parameter_count()
        for (name, tensor), (_, both) in zip(alone.parts(), together.parts(), strict=True):
            assert_close(tensor[0], both[slot], rtol=0, atol=1e-9, msg=name)


def test_it_is_served_beside_an_ordinary_lora(tmp_path):
    task = dp.Task("{text} It was {mask}.", WORDS, SoftVerbalizer())
    alone = {}
    for name, delta in {"frozen": LoRA(4, freeze_a=True), "plain": LoRA(2)}.items():
        model = Model(zoo.build("bert"), task, [delta])
        shake(model.adapted)
        model.save(tmp_path / name)
        alone[name] = model.predict(["a great film"])[0]
    many = dp.open_many([tmp_path / "frozen", tmp_path / "plain"], zoo.build("bert"))
    found = many.predict(["a great film"] * 2, adaptation=["frozen", "plain"])
    for one, name in zip(found, alone, strict=True):
        assert one["score"] == pytest.approx(alone[name]["score"], abs=1e-6)
        assert one["label"] == alone[name]["label"]
