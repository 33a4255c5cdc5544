"""Laws of gates, which any delta may have: y + σ(w x + b) (y' − y) at every token, and σ(b) on a prefix."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from deltaprompt import registry
from deltaprompt.compose import Adapted, parameters_of
from deltaprompt.deltas._base import KeyValue, Reparametrised, VirtualTokens
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError
from deltaprompt.model import Model, Task
from deltaprompt.model.saved import describe, open_
from deltaprompt.report import anatomy
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, gradients, loss_of, made, mask_of, shake
from tests.backbones_zoo import inputs_of

FAMILIES = ["bert", "gpt2", "llama", "opt", "t5"]
GATED = [n for n in DELTAS if not issubclass(registry.variant("deltas", n), VirtualTokens)]
TEXTS = [Example({"text": text}) for text in ("a great movie", "It was there and bad . " * 9, "")]
every = pytest.mark.parametrize("name", GATED)
families = pytest.mark.parametrize("family", FAMILIES)


@cache
def shared(family):
    return zoo.build(family, torch.float64)


@contextmanager
def gated(name, family, slots=1):
    adapted = Adapted(shared(family), [replace(made(name), gated=True)], slots)
    try:
        yield adapted
    finally:
        adapted.remove()


def gates_of(adapted):
    return {name: tensor for name, tensor in adapted.parts() if name.rpartition(".")[2] in ("gate", "gate_bias")}


@families
@every
@torch.no_grad()
def test_it_is_the_identity_at_the_start_where_the_delta_is(name, family):
    inputs = inputs_of(shared(family))
    before = shared(family).states(inputs)
    with gated(name, family) as adapted:
        assert torch.equal(adapted.states(inputs), before) == made(name).identity_at_start


@torch.no_grad()
def ungated(name, family, inputs, parts, by=1.0):
    """The states with the delta and no gate, its tensors those of `parts`, `by` times as large."""
    adapted = Adapted(shared(family), [made(name)])
    for part, tensor in adapted.parts():
        tensor.copy_(parts[part] * by)
    states = adapted.states(inputs)
    adapted.remove()
    return states


@families
@every
@torch.no_grad()
def test_it_lies_between_nothing_and_the_whole_delta(name, family):
    """What a prefix has instead of nothing are keys and values of 0."""
    inputs = inputs_of(shared(family))
    with gated(name, family) as adapted:
        shake(adapted)
        parts, found = {part: tensor.clone() for part, tensor in adapted.parts()}, []
        for bias in (-60.0, 0.0, 60.0):
            for part, tensor in gates_of(adapted).items():
                tensor.fill_(bias if part.endswith("gate_bias") else 0.0)
            found.append(adapted.states(inputs))
        adapted.routing.index = None
    prefix = issubclass(type(made(name)), KeyValue)
    nothing = ungated(name, family, inputs, parts, 0.0) if prefix else shared(family).states(inputs)
    assert_close(found[0], nothing, rtol=0, atol=1e-9)
    assert_close(found[2], ungated(name, family, inputs, parts), rtol=0, atol=1e-9)
    assert not any(torch.allclose(found[1], states) for states in (found[0], found[2]))


@families
@every
def test_the_gate_learns_with_the_delta(name, family):
    with gated(name, family) as adapted:
        inputs = inputs_of(adapted.backbone)
        largest = {part: 0.0 for part, _ in adapted.parts()}
        for _ in range(2):
            adapted.zero_grad()
            loss_of(adapted.states(inputs), mask_of(inputs)).backward()
            largest = {part: max(largest[part], float(g.abs().max())) for part, g in gradients(adapted).items()}
            shake(adapted)
    of_keys = (".k.bias", ".pos_k.bias")  # softmax does not see what is added to all scores, nor whether it is gated
    assert {part for part, size in largest.items() if size < 1e-12 and not part.endswith(of_keys)} == set()


@families
@every
@torch.no_grad()
def test_each_row_has_the_gate_of_its_adaptation(name, family):
    with gated(name, family, slots=3) as adapted:
        inputs = inputs_of(shake(adapted).backbone)
        mixed = adapted.states(inputs, torch.tensor([2, 1]))
        for row, slot in enumerate((2, 1)):
            alone = adapted.states({n: t[row : row + 1] for n, t in inputs.items()}, slot)
            assert_close(mixed[row], alone[0], rtol=0, atol=1e-6)


@families
@every
def test_its_numbers_are_the_deltas_and_one_for_every_input_and_one(name, family):
    with gated(name, family) as adapted:
        sizes = [1 if isinstance(made(name), KeyValue) else patch.site.inputs + 1 for patch in adapted.patches]
        count, gates = adapted.parameter_count(), gates_of(adapted)
    assert count == parameters_of(made(name), shared(family)) + sum(sizes)
    assert sum(t.numel() for t in gates.values()) == sum(sizes)
    assert count == parameters_of(replace(made(name), gated=True), shared(family))


@every
def test_it_is_counted_where_a_backbone_is_shown(name):
    found = anatomy(shared("bert"), [made(name), replace(made(name), gated=True)])
    plain, with_gate = found.placements
    costs = [sum(g.layers * (s.costs[i] or 0) for g in found.groups for s in g.sites) for i in (0, 1)]
    assert costs[1] - costs[0] == with_gate.parameters - plain.parameters > 0


@every
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_is_saved_and_opened(tmp_path, name, family):
    backbone = zoo.build(family)
    delta = replace(made(name), gated=True)
    task = Task("{text} It was {mask}", ["bad", "good"], SoftVerbalizer())
    model = Model(backbone, task, [delta, LoRA(rank=2, gated=True)])
    shake(model.adapted)
    expected = model.probabilities(TEXTS)
    model.save(tmp_path)
    model.settle()
    assert torch.equal(model.probabilities(TEXTS), expected)
    model.adapted.remove()
    again = open_(tmp_path, backbone)
    assert torch.equal(again.probabilities(TEXTS), expected)
    kept = delta.plain() if isinstance(delta, Reparametrised) else delta
    assert again.chosen == (kept, LoRA(rank=2, gated=True))
    assert [stored["gated"] for stored in describe(tmp_path)["deltas"]] == [True, True]


@pytest.mark.parametrize("name", [n for n in DELTAS if n not in GATED])
def test_what_sees_token_ids_has_no_gate(name):
    with pytest.raises(ConfigError, match=r"cannot be gated: what enters embed are token ids; leave out gated"):
        Adapted(shared("bert"), [replace(made(name), gated=True)])
    assert all(p.requires_grad for p in shared("bert").model.parameters())
