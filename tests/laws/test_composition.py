"""Laws of deltas that come and go: in whatever order they are attached and detached, what is left acts as if it had
been alone from the start, and a backbone without any is bitwise what it was."""

import itertools
import random
from functools import cache

import pytest
import torch

from deltaprompt import registry
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import VirtualTokens
from deltaprompt.deltas.adapter import Adapter
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.ia3 import IA3
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.model import Model, Task
from deltaprompt.model.saved import open_
from deltaprompt.types import Example
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, made, same, shake, snapshot

FAMILIES = ["bert", "gpt2", "phi3", "t5"]  # plain, fused and gated maps; causal and two-sided ones
SETS = {
    "apart": [LoRA(2, at=("attn.v",)), Adapter(3, at=("ffn.down",)), Prefix(2)],
    "one map": [LoRA(2, at=("attn.v",)), IA3(("attn.v",), ("attn.o",)), BitFit(("attn.v", "attn.o"))],
    "before and after": [IA3((), ("ffn.down",)), LoRA(2, at=("ffn.down",)), Adapter(3, at=("ffn.down",))],
    "two prefixes": [Prefix(2), LoRA(2, at=("attn.k",)), Prefix(3)],
    "at the embedding": [SoftPrompt(2), Prefix(2), SoftPrompt(3, first=2)],
}
families = pytest.mark.parametrize("family", FAMILIES)
sets = pytest.mark.parametrize("chosen", SETS.values(), ids=SETS)


@cache
def another(family):
    """The same backbone once more, for what is compared with."""
    return zoo.build(family, torch.float64)


def inputs_for(backbone, deltas):
    """Inputs with virtual tokens where a delta knows them."""
    inputs = zoo.inputs_of(backbone)
    known = [d for d in deltas if isinstance(d, VirtualTokens)]
    for column, delta in enumerate(known[:3]):
        inputs["input_ids"][:, column] = backbone.vocabulary + delta.first + delta.length - 1
    return inputs


@torch.no_grad()
def as_if_alone(adapted, family):
    """Whether outputs are, bitwise and in both slots, those of deltas attached together to a fresh backbone."""
    fresh = Adapted(another(family), adapted.deltas, 2)
    theirs = dict(fresh.parts())
    assert list(theirs) == [name for name, _ in adapted.parts()]
    for name, tensor in adapted.parts():
        theirs[name].copy_(tensor)
    inputs = inputs_for(adapted.backbone, adapted.deltas)
    found = [torch.equal(fresh.states(inputs, slot), adapted.states(inputs, slot)) for slot in (0, 1)]
    fresh.remove()
    return all(found)


@families
@sets
def test_attached_one_by_one_is_attached_together(family, chosen):
    together = Adapted(another(family), chosen, 2, [3, 4])
    expected = {name: tensor.detach().clone() for name, tensor in together.parts()}
    together.remove()
    adapted = Adapted(zoo.build(family, torch.float64), [], 2, [3, 4])
    for delta in chosen:
        adapted.attach(delta)
    found = dict(adapted.parts())
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert adapted.deltas == tuple(chosen)
    assert as_if_alone(shake(adapted), family)


@families
@sets
def test_detached_in_any_order(family, chosen):
    backbone = zoo.build(family, torch.float64)
    plain = zoo.inputs_of(backbone)
    with torch.no_grad():
        before, output = snapshot(backbone), backbone.states(plain)
    for order in itertools.permutations(chosen):
        adapted = shake(Adapted(backbone, chosen, 2))
        kept = {id(tensor) for _, tensor in adapted.parts()}
        for delta in order:
            adapted.detach(adapted.deltas.index(delta))
            assert delta not in adapted.deltas
            assert {id(tensor) for _, tensor in adapted.parts()} < kept  # not copies: an optimizer goes on with them
            assert as_if_alone(adapted, family)
        assert list(adapted.parts()) == []
        with torch.no_grad():
            assert torch.equal(adapted.states(plain), output)
        adapted.remove()
        assert same(snapshot(backbone), before)


@families
@pytest.mark.parametrize("first", [0, 1])
@sets
def test_two_on_one_backbone_are_removed_in_either_order(family, chosen, first):
    backbone = zoo.build(family, torch.float64)
    frozen = next(backbone.model.parameters()).requires_grad_(False)
    before = snapshot(backbone)
    both = [shake(Adapted(backbone, chosen[:2], 2)), shake(Adapted(backbone, chosen[2:], 2))]
    inputs = inputs_for(backbone, chosen)
    states = both[1].states(inputs)
    together = Adapted(another(family), chosen, 2)
    with torch.no_grad():
        for tensor, (_, other) in zip((t for each in both for _, t in each.parts()), together.parts(), strict=True):
            other.copy_(tensor)
    assert torch.equal(together.states(inputs), states)
    together.remove()
    both[first].remove()
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert as_if_alone(both[1 - first], family)
    both[1 - first].remove()
    assert same(snapshot(backbone), before)
    assert not frozen.requires_grad


@pytest.mark.parametrize("seed", range(12))
def test_deltas_of_every_kind_come_and_go(seed):
    """A walk of twelve steps, each of which attaches a delta or detaches one."""
    chance = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    backbone = zoo.build(family, torch.float64)
    before = snapshot(backbone)
    adapted = Adapted(backbone, [], 2)
    for _ in range(12):
        if adapted.deltas and chance.random() < 0.4:
            adapted.detach(chance.randrange(-len(adapted.deltas), len(adapted.deltas)))
        else:
            adapted.attach(made(chance.choice(DELTAS)))
            shake(adapted, 0.05)
        assert as_if_alone(adapted, family)
    adapted.remove()
    assert same(snapshot(backbone), before)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize(
    "template", ["{text} It was {mask}", '{text} {soft:"In summary"} {mask}'], ids=["hard", "soft"]
)
def test_what_is_left_is_saved_and_opened_as_one(tmp_path, family, template):
    task = Task(template, {"bad": "bad", "good": "good"})
    model = Model(zoo.build(family), task, [LoRA(2), SoftPrompt(2), Adapter(3)])
    model.adapted.attach(Prefix(2, gated=True))
    model.adapted.detach(model.adapted.deltas.index(LoRA(2)))
    model.adapted.attach(registry.build("deltas", "reparametrised_prefix", {"length": 2, "mid": 4, "embed": 4}))
    shake(model.adapted)
    examples = [Example({"text": text}) for text in ("a great movie", "so bad")]
    answers = model.probabilities(examples)
    model.save(tmp_path)
    model.adapted.remove()
    again = open_(tmp_path, model.backbone)
    assert torch.equal(again.probabilities(examples), answers)
    assert [type(delta) for delta in again.chosen] == [SoftPrompt, Adapter, Prefix, Prefix]
    again.adapted.detach(again.adapted.deltas.index(again.chosen[1]))
    changed = again.probabilities(examples)
    assert not torch.equal(changed, answers)
    again.save(tmp_path)
    again.adapted.remove()
    assert torch.equal(open_(tmp_path, again.backbone).probabilities(examples), changed)


def test_a_delta_never_starts_as_another_did():
    adapted = Adapted(zoo.build("bert"), [Prefix(2), Prefix(2)])
    adapted.detach(0)
    adapted.attach(Prefix(2))
    starts = [patch.tensors[name][0].flatten() for patch in adapted.patches for name in ("k", "v")]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(starts, 2))


def test_what_is_attached_follows_the_mode():
    adapted = Adapted(zoo.build("bert"), [LoRA(dropout=0.5)]).eval()
    adapted.attach(LoRA(dropout=0.5))
    adapted.detach(0)
    assert not any(module.training for module in adapted.modules())
    adapted.train()
    adapted.attach(LoRA(dropout=0.5))
    assert all(patch.training for patch in adapted.patches)


@pytest.mark.parametrize("number", [2, -3])
def test_a_delta_that_is_not_there_is_not_detached(number):
    adapted = Adapted(zoo.build("bert"), [LoRA(), BitFit()])
    with pytest.raises(ConfigError, match=f"there is no delta {number}; this backbone carries 2, counted from 0"):
        adapted.detach(number)
    assert adapted.deltas == (LoRA(), BitFit())


def test_a_delta_that_cannot_act_is_not_attached_and_changes_nothing():
    adapted = shake(Adapted(zoo.build("bert", torch.float64), [LoRA()], 2))
    before, names = snapshot(adapted.backbone), [name for name, _ in adapted.parts()]
    with pytest.raises(SiteError, match="matches no site of this backbone"):
        adapted.attach(LoRA(at=("attn.qq",)))
    assert same(snapshot(adapted.backbone), before)
    assert [name for name, _ in adapted.parts()] == names
    assert as_if_alone(adapted, "bert")


def test_nothing_comes_to_what_is_removed_or_merged():
    for end in (Adapted.remove, Adapted.merge):
        adapted = Adapted(zoo.build("bert"), [LoRA()])
        end(adapted)
        for change in (lambda a: a.attach(LoRA()), Adapted.detach, Adapted.merge):
            with pytest.raises(ConfigError, match="merged or removed; unmerge.. first, or make a new Adapted"):
                change(adapted)


def test_removing_twice_is_removing_once():
    backbone = zoo.build("bert")
    before = snapshot(backbone)
    other = Adapted(backbone, [BitFit()])
    adapted = Adapted(backbone, [LoRA()])
    adapted.remove()
    adapted.remove()
    assert not any(p.requires_grad for p in backbone.model.parameters())  # the other still holds it
    other.remove()
    assert same(snapshot(backbone), before)


def test_every_registered_delta_takes_part():
    assert {"lora", "adapter", "prefix"} <= set(DELTAS) == set(registry.variants("deltas"))
