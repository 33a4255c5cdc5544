"""Gradient checkpointing: the same gradients, in the slots of each row's own forward pass, whoever turned it on."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from deltaprompt.backbone.layers import layers_of
from deltaprompt.compose import Adapted
from deltaprompt.compose.recomputing import FUNCTION, Around
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError
from deltaprompt.model import Task, adapt
from deltaprompt.trainer import Training, fit
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, adapted_to, gradients, inputs_for, loss_of, made, mask_of, shake

FAMILIES = ["bert", "gpt2", "qwen2", "t5"]
OLD = {"use_reentrant": True}  # transformers' default is the new form, which finds what needs a gradient by itself
ways = [pytest.param(d, f, OLD, id=f"{d}-{f}-reentrant") for d in DELTAS for f in FAMILIES]
ways += [pytest.param(d, f, None, id=f"{d}-{f}") for d in DELTAS for f in ("bert", "t5")]


def learned(adapted, inputs, indices):
    """The gradients of the sum of passes in several slots, the backward pass coming after all of them."""
    adapted.zero_grad()
    sum((i + 1) * loss_of(adapted.states(inputs, index), mask_of(inputs)) for i, index in enumerate(indices)).backward()
    return gradients(adapted)


def same(found, expected, atol=1e-9):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "family", "way"), ways)
def test_transformers_own_switch_gives_the_same_gradients(name, family, way):
    """Also in the first layer, behind a frozen embedding, and where passes in other slots come in between."""
    adapted = adapted_to(family, name, 2).train()
    inputs = inputs_for(name, adapted.backbone)
    indices = (0, torch.tensor([1, 0]), 1)
    expected = learned(adapted, inputs, indices)
    adapted.model.activation_checkpointing_enable(way)
    same(learned(adapted, inputs, indices), expected)
    assert all(g.any() or n.endswith(".k.bias") for n, g in expected.items())


def test_the_switch_may_be_on_before_anything_is_attached():
    expected = learned(adapted_to("bert", "lora", 2).train(), zoo.inputs_of(zoo.build("bert")), (1, 0))
    backbone = zoo.build("bert", torch.float64)
    with pytest.warns(FutureWarning, match="gradient_checkpointing_enable"):
        backbone.model.gradient_checkpointing_enable()
    adapted = shake(Adapted(backbone, [LoRA()], 2)).train()
    same(learned(adapted, zoo.inputs_of(backbone), (1, 0)), expected)
    functions = {vars(layer)[FUNCTION] for layer in layers_of(backbone.model)}
    assert all(type(function) is Around for function in functions)
    adapted.remove()
    assert {type(vars(layer)[FUNCTION]) for layer in layers_of(backbone.model)} == {partial}


def test_reentrant_checkpointing_without_a_gradient_at_the_embedding():
    """Where transformers' hook at the embedding is not run, PyTorch alone would give no gradient, and only warn."""
    adapted = adapted_to("qwen2", "lora").train()
    ids = zoo.inputs_of(adapted.backbone)["input_ids"]
    embedded = adapted.model.get_input_embeddings()(ids).detach()
    run = partial(adapted.states, {"inputs_embeds": embedded})
    loss_of(run(), torch.ones(ids.shape)).backward()
    expected = gradients(adapted)
    adapted.zero_grad()
    adapted.model.activation_checkpointing_enable({"use_reentrant": True})
    loss_of(run(), torch.ones(ids.shape)).backward()
    same(gradients(adapted), expected)


def test_reentrant_checkpointing_that_can_reach_no_delta_is_refused():
    around = Around(lambda function, *args: checkpoint(function, *args, use_reentrant=True))
    with pytest.raises(ConfigError, match="its layers their states by name. Turn it on with use_reentrant=False"):
        around(partial(torch.relu), torch.tensor([1]))
    assert around(lambda n, x: x + n, torch.tensor([1]), torch.zeros(1)).requires_grad


def test_two_at_one_backbone_each_keep_their_slots():
    backbone = zoo.build("bert", torch.float64)
    first, second = (shake(Adapted(backbone, [delta], 2)).train() for delta in (LoRA(), BitFit()))
    inputs = zoo.inputs_of(backbone)

    def both():
        second.zero_grad()
        second.route(1)
        loss = loss_of(first.states(inputs, 0), mask_of(inputs))
        second.route(0)
        loss = loss + loss_of(first.states(inputs, 1), mask_of(inputs))
        first.zero_grad()
        loss.backward()
        return gradients(first) | gradients(second)

    expected = both()
    backbone.model.activation_checkpointing_enable()
    same(both(), expected)
    first.remove()
    same(learned(second, inputs, (0, 1)), learned(copy.deepcopy(second), inputs, (0, 1)))
    second.remove()
    assert {type(vars(layer)[FUNCTION]) for layer in layers_of(backbone.model)} == {partial}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_its_own_layers_again(copied):
    adapted = adapted_to("t5", "prefix", 2)
    inputs = zoo.inputs_of(adapted.backbone)
    adapted.checkpointing()
    expected = learned(adapted, inputs, (1, 0))
    twin = copied(adapted)
    same(learned(twin, inputs, (1, 0)), expected)
    twin.routing.index = 1
    assert adapted.routing.index == 0


class Calls:
    """Counts the forward passes of a module."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self.note)

    def note(self, *_):
        self.count += 1


@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_layers_in_evaluation_mode_are_computed_again_without_dropout(family):
    """BART's layers have dropout without a module for it, which looks at the layer's own mode."""
    backbone = zoo.build(family, torch.float64)
    for module in backbone.model.modules():
        vars(module).update({"dropout": 0.5} if isinstance(vars(module).get("dropout"), float) else {})
        vars(module).update({"p": 0.5} if isinstance(module, torch.nn.Dropout) else {})
    adapted = shake(Adapted(backbone, [LoRA()])).eval()
    inputs = zoo.inputs_of(backbone)
    expected = learned(adapted, inputs, (0,))
    calls = Calls(adapted.model.get_submodule(next(s.path for s in backbone.sites.select(["layers[0].attn.v"]))))
    adapted.checkpointing()
    same(learned(adapted, inputs, (0,)), expected)
    assert calls.count == 2
    assert not any(module.training for module in adapted.modules())
    with torch.no_grad():
        adapted.states(inputs)
    assert calls.count == 3
    adapted.remove()
    assert not backbone.model.is_activation_checkpointing


def test_the_last_layers_are_not_computed_again():
    adapted = adapted_to("bert", "lora")
    inputs = zoo.inputs_of(adapted.backbone)
    calls = [Calls(adapted.model.get_submodule(f"bert.encoder.layer.{n}.attention.self.query")) for n in (0, 1)]
    seen = []
    for share in (0.1, 0.5, 0.75, 1.0):
        adapted.checkpointing(share=share)
        learned(adapted, inputs, (0,))
        seen.append([each.count for each in calls])
        for each in calls:
            each.count = 0
    assert seen == [[2, 1], [2, 1], [2, 1], [2, 2]]
    adapted.checkpointing(False)
    assert not any(layer.gradient_checkpointing for layer in layers_of(adapted.model))


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_that_is_none(share):
    with pytest.raises(ConfigError, match="above 0 and up to 1 is possible"):
        adapted_to("bert", "lora").checkpointing(share=share)


WORDS = {"good": ("great",), "bad": ("terrible",)}
TEXTS = {"good": ["a great movie", "a good film"], "bad": ["a bad film", "terrible plot"]}
ROWS = [Example({"text": text}, label) for label, texts in TEXTS.items() for text in texts]


@pytest.mark.parametrize(("name", "dropout"), [*((d, False) for d in DELTAS), ("lora", True)])
def test_fit_gives_the_same_numbers_with_checkpointing(name, dropout):
    found, calls = [], []
    for on in (False, True):
        backbone = zoo.build("qwen2")
        model = adapt(backbone, Task("{text} It was {mask}.", WORDS, SoftVerbalizer()), [made(name)])
        calls.append(Calls(backbone.model.get_submodule(backbone.sites["layers.0.attn.v"].path)))
        training = Training(steps=2, learning_rate=1e-2, checkpointing=on, backbone_dropout=dropout, keep=False)
        fit(model, ROWS, training=training)
        assert not backbone.model.is_activation_checkpointing
        found.append({n: p.detach() for n, p in model.parts()})
    same(found[1], found[0], atol=0)
    within = any(patch.site.name.startswith(("embed", "layers.0.")) for patch in model.adapted.patches)
    assert [each.count for each in calls] == [2, 4 if within else 2]  # a layer with no delta in it has nothing to keep
